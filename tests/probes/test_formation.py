"""Curves with a known midpoint, and models that stand for checkpoints."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mechcausal.models.adapter import HookedTransformer
from probes import HeadScores, score_heads, track_formation
from tests.probes.wired import planted


@pytest.fixture
def along(model: HookedTransformer) -> Callable[[list[int], Tensor], list[tuple[int, HeadScores]]]:
    """Scores at some steps whose head 1.0 follows a curve and whose other heads stay at 0.1."""
    template = score_heads(model, n_sequences=2)

    def along(steps: list[int], curve: Tensor) -> list[tuple[int, HeadScores]]:
        checkpoints = []
        for step, value in zip(steps, curve, strict=True):
            scores = torch.full((2, 2), 0.1)
            scores[1, 0] = value
            checkpoints.append((step, dataclasses.replace(template, prefix_matching=scores)))
        return checkpoints

    return along


def sigmoid(steps: list[int], middle: float, width: float, *, noise: float = 0.0) -> Tensor:
    x = torch.tensor(steps, dtype=torch.float32)
    curve = 0.05 + 0.85 * torch.sigmoid((x - middle) / width)
    return curve + noise * torch.randn(len(steps), generator=torch.Generator().manual_seed(0))


def test_the_midpoint_of_a_sigmoid_is_recovered(along):
    steps = list(range(0, 1001, 50))
    formation = track_formation(along(steps, sigmoid(steps, 430, 60)))
    assert formation.midpoint[1, 0] == pytest.approx(430, abs=1)
    assert formation.first_crossing[1, 0] == 450
    assert formation.midpoint_low[1, 0] <= 430.5
    assert formation.midpoint_high[1, 0] >= 429.5
    assert formation.midpoint[0].isnan().all()
    assert formation.first_crossing[0].isnan().all()
    assert formation.layers == (0, 1)


def test_the_interval_covers_the_truth_as_often_as_it_says(along):
    steps = list(range(0, 1001, 50))
    covered = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        curve = sigmoid(steps, 430, 60) + 0.03 * torch.randn(len(steps), generator=generator)
        formation = track_formation(along(steps, curve), confidence=0.9)
        covered += bool(formation.midpoint_low[1, 0] <= 430 <= formation.midpoint_high[1, 0])
    # Four standard errors of a binomial around 90.
    assert 78 <= covered <= 100


def test_on_a_logarithmic_axis(along):
    steps = [0, *(2**i for i in range(14))]
    x = torch.tensor(steps).float().log1p()
    curve = 0.05 + 0.85 * torch.sigmoid((x - math.log1p(300)) / 0.5)
    formation = track_formation(along(steps, curve), axis="log")
    assert formation.midpoint[1, 0] == pytest.approx(300, rel=0.02)
    assert formation.midpoint_low[1, 0] <= 301
    assert formation.midpoint_high[1, 0] >= 299


def test_a_jump_lies_anywhere_between_its_two_checkpoints(along):
    steps = list(range(0, 1001, 100))
    curve = torch.tensor([0.1] * 4 + [0.9] * 7)
    formation = track_formation(along(steps, curve))
    assert formation.midpoint_low[1, 0] <= 300
    assert formation.midpoint_high[1, 0] >= 400
    assert 300 <= formation.midpoint[1, 0] <= 400


@pytest.mark.parametrize(
    "curve",
    [
        [0.1, 0.9, 0.9, 0.9],
        [0.9, 0.9, 0.9, 0.9, 0.9, 0.9],
        [0.9, 0.8, 0.7, 0.3, 0.1, 0.0],
        [0.1, 0.5, math.nan, 0.9, 0.9, 0.9],
    ],
    ids=["too few", "flat", "falling", "not a number"],
)
def test_what_cannot_be_fitted_is_nan(along, curve: list[float]):
    steps = list(range(len(curve)))
    formation = track_formation(along(steps, torch.tensor(curve)))
    assert formation.midpoint[1, 0].isnan()
    assert formation.midpoint_low[1, 0].isnan()
    assert formation.first_crossing[1, 0] == next(s for s in steps if curve[s] >= 0.4)


def test_models_are_scored_on_the_same_sequences():
    wiring = planted(1)
    formation = track_formation(
        iter([(20, wiring.model), (10, wiring.model)]),
        generator=torch.Generator().manual_seed(5),
        n_sequences=4,
    )
    assert formation.steps == (10, 20)
    assert torch.equal(formation.scores[0], formation.scores[1])
    assert formation.first_crossing[wiring.induction] == 10


def test_the_frame_is_long(along):
    steps = list(range(0, 1001, 100))
    frame = track_formation(along(steps, sigmoid(steps, 430, 60))).to_frame()
    assert len(frame) == 4 * len(steps)
    head = frame[(frame["layer"] == 1) & (frame["head"] == 0)]
    assert list(head["step"]) == steps
    assert head["prefix_matching"].iloc[-1] > 0.8
    assert (head["first_crossing"] == 500).all()
