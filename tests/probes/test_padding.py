"""Padded text scores as the text alone, whichever side is padded and whatever tells where."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from probes import (
    AttentionTo,
    InductionScores,
    ProbeError,
    ablation_effects,
    attach,
    duplicate_token_score,
    mean_ablate,
    prefix_matching_score,
    previous_token_score,
    score_heads,
    uniform_baseline,
)
from probes.heads.in_context import repeated_pairs
from probes.heads.scores import duplicate_token_mask, prefix_matching_mask, uniform_pattern
from probes.reading.padding import real_positions
from probes.reading.passes import token_losses

close = torch.testing.assert_close
VOCAB, PAD, BOS = 20, 0, 19
NOTHING_RECURS = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [10, 11]]
SOMETHING_RECURS = [[1, 2, 3, 1, 2, 4], [7, 8, 7, 8], [10, 11, 12, 10]]
ONE_LENGTH = [[1, 2, 3, 1, 2, 4], [7, 8, 7, 9, 8, 7], [10, 11, 12, 10, 11, 5]]
SIDES = ("left", "right")


def padded(rows: list[list[int]], side: str, width: int = 9) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask."""
    tokens, mask = [], []
    for row in rows:
        fill = width - len(row)
        tokens.append([PAD] * fill + row if side == "left" else row + [PAD] * fill)
        mask.append([0] * fill + [1] * len(row) if side == "left" else [1] * len(row) + [0] * fill)
    return torch.tensor(tokens), torch.tensor(mask)


@pytest.fixture(scope="module", params=["hooked", "bridge"])
def built(
    request: pytest.FixtureRequest, build: Any, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A model in float64, with a tokenizer whose PAD is token 0."""
    if request.param == "hooked":
        hooked = build(n_ctx=12, d_vocab=VOCAB, d_model=16, dtype=torch.float64)
        hooked.tokenizer = SimpleNamespace(pad_token_id=PAD, bos_token_id=BOS, padding_side="right")
        return hooked
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 12}
    config = GPT2Config(**sizes, vocab_size=VOCAB, bos_token_id=BOS, eos_token_id=BOS)
    original: Any = GPT2LMHeadModel(config)
    for parameter in original.parameters():
        parameter.data.mul_(20)
    folder = tmp_path_factory.mktemp("gpt2")
    original.save_pretrained(folder)
    words = WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t1")
    special = {"bos_token": f"t{BOS}", "eos_token": f"t{BOS}", "pad_token": f"t{PAD}"}
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=Tokenizer(words), unk_token="t1", **special)
    tokenizer.save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float64)


@pytest.fixture
def model(built: Any) -> Iterator[Any]:
    """The model; what a test does to its tokenizer is undone."""
    tokenizer = built.tokenizer
    bos = tokenizer.bos_token_id
    yield built
    tokenizer.bos_token_id = bos
    built.tokenizer = tokenizer


@pytest.fixture
def unknowing(model: Any) -> Any:
    """A model whose tokenizer does not tell what is padding."""
    model.tokenizer = None
    return model


def alone(model: Any, rows: list[list[int]]) -> Tensor:
    """`[score layer sequence head]` of every sequence without padding."""
    readings = []
    for row in rows:
        with attach(model, InductionScores(attention_mask=torch.ones(1, len(row)))) as (scores,):
            model(torch.tensor([row]))
        readings.append(scores.reading().values)
    return torch.cat(readings, dim=2)


# --- Attached probes ---


@pytest.mark.parametrize("side", SIDES)
def test_padding_does_not_recur(model: Any, side: str) -> None:
    tokens, _ = padded(NOTHING_RECURS, side)
    to_duplicates = AttentionTo(None, duplicate_token_mask)
    with attach(model, InductionScores(), to_duplicates) as (scores, duplicates):
        model(tokens)
    reading = scores.reading()
    assert reading.sel(score="prefix_matching").values.isnan().all()
    assert reading.sel(score="duplicate_token").values.isnan().all()
    assert reading.sel(score="previous_token").values.isfinite().all()
    assert duplicates.reading().values.isnan().all()


@pytest.mark.parametrize("way", ["call", "hooks", "probe"])
@pytest.mark.parametrize("side", SIDES)
def test_a_mask_says_where_the_text_is(unknowing: Any, side: str, way: str) -> None:
    tokens, mask = padded(SOMETHING_RECURS, side)
    scores = InductionScores(attention_mask=mask if way == "probe" else None)
    with attach(unknowing, scores):
        run = unknowing.run_with_hooks if way == "hooks" else unknowing
        run(tokens, attention_mask=mask)
    close(scores.reading().values, alone(unknowing, SOMETHING_RECURS), equal_nan=True)


def test_the_mask_of_one_pass_is_not_that_of_the_next(unknowing: Any) -> None:
    tokens, mask = padded(NOTHING_RECURS, "right")
    with attach(unknowing, InductionScores()) as (scores,):
        unknowing.run_with_hooks(tokens, attention_mask=mask)
        unknowing.run_with_hooks(tokens)
    result = scores.reading().sel(score="duplicate_token", layer=0).values
    assert result[:3].isnan().all()
    assert result[3:].isfinite().all()


def test_a_mask_of_another_shape_is_one_line(model: Any) -> None:
    tokens, mask = padded(NOTHING_RECURS, "left")
    scores = InductionScores(attention_mask=mask[:, 1:])
    with attach(model, scores), pytest.raises(ProbeError, match=r"\(3, 8\).*\(3, 9\)"):
        model(tokens)
    with pytest.raises(ValueError, match=r"\(3, 8\).*\(3, 9\)"):
        score_heads(model, tokens, attention_mask=mask[:, 1:])


def test_a_bos_that_is_the_padding_token_stays(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.tokenizer.bos_token_id = PAD
    tokens = torch.tensor([[PAD, PAD, PAD, 5, 6], [PAD, 4, 5, 6, PAD], [1, 2, 3, PAD, PAD]])
    expected = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    result = real_positions(model, tokens)
    assert result is not None
    assert result.int().tolist() == expected
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False)
    result = real_positions(model, tokens)
    assert result is not None
    assert result[:, :3].int().tolist() == [[0, 0, 0], [0, 1, 1], [1, 1, 1]]


# --- Whatever scores given tokens ---


def same(left: Any, right: Any) -> None:
    for name in (
        *("prefix_matching", "positional_control", "previous_token", "duplicate_token"),
        *("duplicate_control", "positional", "positional_offset", "uniform_baseline"),
        *("prefix_matching_stderr", "duplicate_control_stderr"),
    ):
        close(getattr(left, name), getattr(right, name), equal_nan=True)


@pytest.mark.parametrize("by_mask", [True, False], ids=["by a mask", "by the tokenizer"])
@pytest.mark.parametrize("side", SIDES)
def test_padded_text_is_scored_as_the_text_alone(model: Any, side: str, by_mask: bool) -> None:
    tokens, mask = padded(ONE_LENGTH, side)
    if by_mask:
        model.tokenizer = None
    unpadded = score_heads(model, torch.tensor(ONE_LENGTH), threshold=0.9)
    result = score_heads(model, tokens, attention_mask=mask if by_mask else None, threshold=0.9)
    same(result, unpadded)
    assert result.verdicts == unpadded.verdicts


def test_sequences_of_several_lengths_score_alike_on_both_sides(unknowing: Any) -> None:
    left, right = (
        score_heads(unknowing, tokens, attention_mask=mask)
        for tokens, mask in (padded(SOMETHING_RECURS, side) for side in SIDES)
    )
    same(left, right)
    expected = alone(unknowing, SOMETHING_RECURS)
    close(left.prefix_matching, expected[0].mean(1))
    close(left.previous_token, expected[1].mean(1))
    close(left.duplicate_token, expected[2].mean(1))


@pytest.mark.parametrize("side", SIDES)
def test_padding_alone_is_nothing_to_score(model: Any, side: str) -> None:
    tokens, _ = padded(NOTHING_RECURS, side)
    with pytest.raises(ProbeError, match="no token recurs"):
        score_heads(model, tokens)
    with pytest.raises(ProbeError, match="no pair of tokens recurs"):
        ablation_effects(model, [(0, 0)], tokens=tokens)


@pytest.mark.parametrize("side", SIDES)
def test_losses_of_padded_text_are_those_of_the_text(unknowing: Any, side: str) -> None:
    tokens, mask = padded(SOMETHING_RECURS, side)
    losses = token_losses(unknowing, tokens, attention_mask=mask)
    for row, result in zip(SOMETHING_RECURS, losses, strict=True):
        expected = token_losses(unknowing, torch.tensor([row]))[0]
        close(result[result.isfinite()], expected)


@pytest.mark.parametrize("by_mask", [True, False], ids=["by a mask", "by the tokenizer"])
@pytest.mark.parametrize("side", SIDES)
def test_ablation_on_padded_text_is_that_on_the_text(model: Any, side: str, by_mask: bool) -> None:
    heads = [(0, 1), (1, 0)]
    tokens, mask = padded(ONE_LENGTH, side)
    if by_mask:
        model.tokenizer = None
    unpadded = ablation_effects(model, heads, tokens=torch.tensor(ONE_LENGTH))
    result = ablation_effects(model, heads, tokens=tokens, attention_mask=mask if by_mask else None)
    for one, other in zip(result, unpadded, strict=True):
        close(
            torch.tensor([one.rise, one.stderr, one.loss]),
            torch.tensor([other.rise, other.stderr, other.loss]),
        )
        assert one.rise != 0
    text = torch.tensor(ONE_LENGTH)
    with mean_ablate(model, heads, tokens=text):
        expected = model(text)
    with mean_ablate(model, heads, tokens=tokens, attention_mask=mask if by_mask else None):
        close(model(text), expected)


# --- Functions of a pattern ---


@pytest.mark.parametrize("side", SIDES)
def test_a_padded_pattern_scores_as_that_of_the_text(side: str) -> None:
    tokens, mask = padded(SOMETHING_RECURS, side, width=8)
    uniform = uniform_pattern(8, causal=True, attention_mask=mask)
    assert not (uniform.sum(-1)[:, 0] - mask).any()
    for n, row in enumerate(SOMETHING_RECURS):
        text, attention = torch.tensor([row]), uniform_pattern(len(row), causal=True)
        for score, keys in (
            (prefix_matching_score, prefix_matching_mask),
            (duplicate_token_score, duplicate_token_mask),
        ):
            expected = score(attention, text)[0]
            close(score(uniform, tokens, mask)[n], expected)
            close(uniform_baseline(keys(tokens, mask), attention_mask=mask)[n], expected[0])
        close(previous_token_score(uniform, mask)[n], previous_token_score(attention)[0])
        pairs = repeated_pairs(tokens, mask)[n]
        assert pairs.sum() == repeated_pairs(text).sum()
