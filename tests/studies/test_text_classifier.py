"""Hugging Face classifiers: their predictions are explained, and what is none is refused."""

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

from mechcausal.studies.explanations.text_classifier import TextClassifier
from mechcausal.studies.targets import TargetError
from probes.causal_discovery.explanation import METHODS
from tests.hugging_face import malicious_pickle

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
        result = classifier.explain(TEXT, method=method)
        with torch.no_grad():
            assert result.label == f"LABEL_{int(model(ids).logits.argmax())}"
            if not result.explanation.found:
                continue
            changed = ids.clone()
            changed[0, list(result.explanation.positions)] = VOCAB.index("[MASK]")
            assert result.new_label == f"LABEL_{int(model(changed).logits.argmax())}"
        assert result.new_label != result.label
        assert set(result.words) <= set(TEXT.split())
        assert not {0, 9} & set(result.explanation.positions)
    for text, message in (("", "no token that could be replaced"), ("film " * 20, "22 tokens")):
        with pytest.raises(TargetError, match=message):
            classifier.explain(text)


def test_a_classifier_without_cls_predicts_at_its_last_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    make_config: Any = GPT2Config
    config = make_config(
        vocab_size=len(VOCAB), n_embd=16, n_layer=2, n_head=2, n_positions=12, num_labels=2
    )
    make: Any = GPT2ForSequenceClassification
    make(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, special=False)
    explanation = TextClassifier(tmp_path).explain(TEXT).explanation
    assert [graph.nodes for graph in explanation.graphs] == [tuple(range(8))] * 2
    assert 7 not in explanation.positions


def test_a_folder_without_a_usable_classifier_is_refused_in_one_line(tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(TargetError) as error:
            TextClassifier(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "config.json: no such file" in refusal(tmp_path / "absent")
    save_bert(tmp_path, labels=1)
    assert "1 label" in refusal(tmp_path)
    save_bert(tmp_path, head=False)
    assert "weights are missing" in refusal(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in refusal(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    marker = malicious_pickle(tmp_path / "pytorch_model.bin")
    assert "safetensors alone: pytorch_model.bin is a pickle" in refusal(tmp_path)
    assert not marker.exists()
    (tmp_path / "config.json").write_text("{")
    assert "not readable as JSON" in refusal(tmp_path)
