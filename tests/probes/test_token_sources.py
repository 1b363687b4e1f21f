"""Stimuli of frequent tokens and of real text, alone and beside random ids."""

from typing import Any

import pytest
import torch

from probes import (
    ProbeError,
    frequent_tokens,
    loss_by_position,
    score_heads,
    text_segments,
)
from probes.heads.head_scores import score_heads_on
from probes.heads.stimuli import draw_stimuli
from probes.reading.passes import run
from tests.probes.wired import VOCAB, planted

Build = Any


def _text(n: int = 400, vocab: int = VOCAB) -> torch.Tensor:
    """A text in which low ids are frequent."""
    source = torch.Generator().manual_seed(1)
    weights = 1 / torch.arange(1.0, vocab + 1)
    return torch.cat(
        [torch.arange(vocab), torch.multinomial(weights, n, replacement=True, generator=source)]
    )


def test_frequent_tokens_are_those_that_the_text_has_most():
    text = torch.arange(60).repeat_interleave(torch.arange(1, 61))
    source = frequent_tokens(text, n_tokens=25)
    blocks = source.draw(40, 12, torch.Generator().manual_seed(0))
    assert blocks.shape == (40, 12)
    assert set(blocks.flatten().tolist()) == set(range(35, 60))
    assert all(len(set(block)) == 12 for block in blocks.tolist())
    assert source.draw(2, 30, torch.Generator().manual_seed(0)).shape == (2, 30)


def test_segments_lie_in_the_text():
    text = _text()
    blocks = text_segments(text).draw(50, 9, torch.Generator().manual_seed(0))
    windows = {tuple(text[i : i + 9].tolist()) for i in range(len(text) - 8)}
    assert {tuple(block) for block in blocks.tolist()} <= windows
    assert len({tuple(block) for block in blocks.tolist()}) > 30


@pytest.mark.parametrize("make", [frequent_tokens, text_segments])
def test_a_stimulus_repeats_a_block_and_its_control_does_not(make: Any, build: Build):
    model = build(n_ctx=17, d_vocab=VOCAB)
    options: dict[str, Any] = {"n_sequences": 6, "repeat_lengths": (5, 8), "bos": 3}
    for stimulus, length in zip(
        draw_stimuli(model, source=make(_text()), **options), (5, 8), strict=True
    ):
        assert stimulus.tokens.shape == stimulus.control.shape == (3, 2 * length + 1)
        assert (stimulus.tokens[:, 0] == 3).all()
        assert (stimulus.control[:, 0] == 3).all()
        first, second = stimulus.tokens[:, 1 : length + 1], stimulus.tokens[:, length + 1 :]
        assert torch.equal(first, second)
        assert not torch.equal(
            stimulus.control[:, 1 : length + 1], stimulus.control[:, length + 1 :]
        )


@pytest.mark.parametrize("seed", range(5))
def test_wired_heads_keep_their_verdicts_on_every_stimulus(seed: int):
    wiring = planted(seed)
    sources = [None, frequent_tokens(_text()), text_segments(_text())]
    random, frequent, text = score_heads_on(wiring.model, sources, n_sequences=20)
    for scores in (random, frequent):
        assert {head: v for head, v in scores.verdicts.items() if v} == wiring.verdicts
    # In a text tokens recur within a block: attention is spread over several occurrences.
    induction = {head for head, verdicts in text.verdicts.items() if "induction" in verdicts}
    assert induction == {wiring.induction, wiring.useless}


def test_scores_beside_each_other_equal_scores_alone_and_make_no_further_pass(
    build: Build, monkeypatch: pytest.MonkeyPatch
):
    model = build(n_ctx=17, d_vocab=VOCAB)
    sources = [None, frequent_tokens(_text()), text_segments(_text())]
    passes: list[int] = []

    def counted(model: Any, tokens: Any, real: Any = None) -> None:
        passes.append(len(tokens))
        run(model, tokens, real)

    monkeypatch.setattr("probes.heads.head_scores.run", counted)
    options: dict[str, Any] = {"n_sequences": 6, "repeat_lengths": (5, 8)}
    together = score_heads_on(model, sources, seed=4, **options)
    assert passes == [3] * 12  # two lengths, each with its control, for each of three sources
    for scores, source in zip(together, sources, strict=True):
        generator = torch.Generator().manual_seed(4)
        alone = score_heads(model, source=source, generator=generator, **options)
        assert alone.to_dict() == scores.to_dict()
    assert not torch.equal(together[0].prefix_matching, together[1].prefix_matching)


def test_the_loss_by_position_of_a_text(build: Build):
    model = build(n_ctx=16, d_vocab=VOCAB)
    readings = [loss_by_position(model, source=s) for s in (None, text_segments(_text()))]
    assert readings[0].loss.shape == readings[1].loss.shape
    assert not torch.equal(readings[0].loss, readings[1].loss)


def test_bad_texts_are_refused(build: Build):
    model = build(n_ctx=17, d_vocab=VOCAB)
    for make in (frequent_tokens, text_segments):
        with pytest.raises(ValueError, match="3 different tokens; at least 20"):
            make(torch.tensor([1, 2, 3, 1]))
        with pytest.raises(ProbeError, match="tokens run from"):
            score_heads(model, source=make(torch.arange(VOCAB, VOCAB + 30)))
    with pytest.raises(ValueError, match="the text has 25 tokens: a segment of 30"):
        text_segments(torch.arange(25)).draw(1, 30, torch.Generator())
