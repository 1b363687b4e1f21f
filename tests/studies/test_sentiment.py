"""Sentiment: the rule of the reviews, a model that learns it, and Hugging Face classifiers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from mechcausal.studies.explanations.hugging_face import TextClassifier
from mechcausal.studies.explanations.reviews import CLASSES, CLS, NOT, PAD, WORDS, ReviewRule
from mechcausal.studies.explanations.sentiment import ClassifierSettings, train_classifier
from mechcausal.studies.targets import TargetError
from probes.causal_discovery.explanation import METHODS
from tests.hugging_face import malicious_pickle

IDS = {word: i for i, word in enumerate(WORDS)}


def label(text: str) -> str:
    tokens = torch.tensor([[IDS[word] for word in text.split()]])
    return CLASSES[int(ReviewRule().label(tokens))]


@pytest.mark.parametrize(
    ("text", "sentiment"),
    [
        ("[CLS] the film was good", "positive"),
        ("[CLS] the film was not good", "negative"),
        ("[CLS] not bad and not dull", "positive"),
        ("[CLS] good and bad", "neutral"),
        ("[CLS] not the good", "positive"),
        ("[CLS] good good bad not", "positive"),
        ("[CLS] the film", "neutral"),
    ],
)
def test_negation_flips_the_cue_word_behind_it(text: str, sentiment: str) -> None:
    assert label(text) == sentiment


def test_drawn_reviews_have_cue_words_and_every_not_stands_before_one() -> None:
    rule = ReviewRule(length=9, most=3, negated=0.5)
    batch = rule.sample(400, torch.Generator().manual_seed(0))
    assert batch.tokens.shape == (400, 10)
    assert (batch.tokens[:, 0] == CLS).all()
    assert (batch.label == rule.label(batch.tokens)).all()
    assert not (batch.tokens == PAD).any()
    negations = batch.tokens == NOT
    cues = batch.causes & ~negations
    assert (negations[:, :-1] == (negations[:, :-1] & cues[:, 1:])).all()
    assert set(cues.sum(1).tolist()) == {1, 2, 3}
    assert set(batch.label.tolist()) == {0, 1, 2}
    share = negations.sum() / cues.sum()
    assert abs(share - 0.5) < 4 * 0.5 / float(cues.sum()) ** 0.5


@pytest.mark.parametrize("sizes", [{"most": 0}, {"length": 7}, {"negated": 1.5}])
def test_a_rule_that_cannot_be_is_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="most must be at least 1"):
        ReviewRule(**sizes)


def test_training_lowers_the_loss_and_repeats_from_its_seed() -> None:
    settings = ClassifierSettings(steps=40, batch_size=64)
    rule = ReviewRule()
    models = [train_classifier(rule, seed=3, settings=settings) for _ in range(2)]
    batch = rule.sample(500, torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = [model(batch.tokens)[:, 0] for model in models]
    assert torch.equal(logits[0], logits[1])
    share = batch.label.bincount().max() / 500
    assert (logits[0].argmax(-1) == batch.label).float().mean() > share


# --- Hugging Face ---

TEXT = "the film was good and fun but long"
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(TEXT.split())]


def save_tokenizer(folder: Path, *, special: bool = True) -> None:
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(VOCAB)}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    options = {"unk_token": "[UNK]"}
    if special:
        words.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        options |= {"pad_token": "[PAD]", "cls_token": "[CLS]"}
        options |= {"sep_token": "[SEP]", "mask_token": "[MASK]"}
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=words, **options).save_pretrained(folder)


def save_bert(folder: Path, *, labels: int = 3, seed: int = 0, head: bool = True) -> Any:
    torch.manual_seed(seed)
    make_config: Any = BertConfig
    config = make_config(
        vocab_size=len(VOCAB),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        num_labels=labels,
        initializer_range=1.0,
    )
    kind: Any = BertForSequenceClassification if head else BertModel
    model = kind(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


@pytest.mark.parametrize("seed", range(3))
def test_a_local_classifier_is_explained_and_the_set_holds_when_recomputed(
    tmp_path: Path, seed: int
) -> None:
    model = save_bert(tmp_path, seed=seed)
    classifier = TextClassifier(tmp_path)
    assert classifier.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    ids = torch.tensor([[2, *(VOCAB.index(word) for word in TEXT.split()), 3]])
    for method in METHODS:
        found = classifier.explain(TEXT, method=method)
        with torch.no_grad():
            assert found.label == f"LABEL_{int(model(ids).logits.argmax())}"
            if not found.explanation.found:
                continue
            changed = ids.clone()
            changed[0, list(found.explanation.positions)] = VOCAB.index("[MASK]")
            assert found.new_label == f"LABEL_{int(model(changed).logits.argmax())}"
        assert found.new_label != found.label
        assert set(found.words) <= set(TEXT.split())
        assert not {0, 9} & set(found.explanation.positions)


def test_a_classifier_without_cls_decides_at_its_last_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    make_config: Any = GPT2Config
    config = make_config(
        vocab_size=len(VOCAB), n_embd=16, n_layer=2, n_head=2, n_positions=12, num_labels=2
    )
    make: Any = GPT2ForSequenceClassification
    make(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, special=False)
    found = TextClassifier(tmp_path).explain(TEXT)
    assert [graph.nodes for graph in found.explanation.graphs] == [tuple(range(8))] * 2
    assert 7 not in found.explanation.positions


def test_folders_that_are_no_classifier_are_refused_in_one_line(tmp_path: Path) -> None:
    pickled, headless, regression, torn, bare = (
        tmp_path / name for name in ("pickled", "headless", "regression", "torn", "bare")
    )
    save_bert(pickled)
    (pickled / "model.safetensors").unlink()
    marker = malicious_pickle(pickled / "pytorch_model.bin")
    save_bert(headless, head=False)
    save_bert(regression, labels=1)
    save_bert(torn)
    (torn / "config.json").write_text("{")
    save_bert(bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    for folder, message in (
        (tmp_path / "gone", "config.json: No such file"),
        (pickled, "safetensors alone: pytorch_model.bin is a pickle"),
        (headless, "weights are missing"),
        (regression, "1 label"),
        (torn, "not readable as JSON"),
        (bare, "no tokenizer"),
    ):
        with pytest.raises(TargetError) as error:
            TextClassifier(folder)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert not marker.exists()


def test_texts_that_cannot_be_explained_are_refused(tmp_path: Path) -> None:
    save_bert(tmp_path)
    classifier = TextClassifier(tmp_path)
    for text, message in (("", "no token that could be replaced"), ("film " * 20, "22 tokens")):
        with pytest.raises(TargetError, match=message):
            classifier.explain(text)
