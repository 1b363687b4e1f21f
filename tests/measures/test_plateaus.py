"""Plateaus and drops of curves that were made with known ones, with noise and without."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from mechcausal.measures.plateaus import Plateau, find_drops, find_plateaus, steepest_drop

EVERY_10 = range(0, 4000, 10)
LOGARITHMIC = sorted({int(s) - 1 for s in np.geomspace(1, 4000, 140)})
LEVELS, DROPS = (1.6, 1.2, 0.9), (20, 400)


def steps_down(step: float) -> float:
    """From plateau to plateau, each drop a logistic curve in the logarithm of the step."""
    loss = LEVELS[0]
    for before, after, drop in zip(LEVELS, LEVELS[1:], DROPS, strict=False):
        loss -= (before - after) / (1 + ((1 + drop) / (1 + step)) ** 10)
    return loss


def steady(step: float) -> float:
    return 2 - 0.1 * math.log(1 + step)


def rows_of(
    curve: Callable[[float], float], steps: Sequence[int], noise: float = 0.0, seed: int = 0
) -> list[dict[str, float | int | None]]:
    draws = np.random.default_rng(seed).normal(size=len(steps))
    return [
        {"train/step": step, "loss/eval": curve(step) + noise * draw}
        for step, draw in zip(steps, draws.tolist(), strict=True)
    ]


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.01])
@pytest.mark.parametrize("steps", [EVERY_10, LOGARITHMIC], ids=["every 10", "logarithmic"])
def test_known_plateaus_are_found(steps: Sequence[int], noise: float) -> None:
    rows = rows_of(steps_down, steps, noise)
    plateaus = find_plateaus(rows)[-2:]  # every 10 steps is too rare for a plateau of 10 steps
    ends = [(DROPS[0], DROPS[1]), (DROPS[1], 4000)]
    for plateau, level, (start, stop) in zip(plateaus, LEVELS[1:], ends, strict=True):
        assert plateau.level == pytest.approx(level, abs=0.01 + noise)
        assert start < plateau.start < 2.2 * start
        assert stop / 2 < plateau.stop < stop
    if steps is LOGARITHMIC:
        assert len(find_plateaus(rows)) == 3


@pytest.mark.parametrize("seed", range(5))
def test_drops_are_located_within_noise(seed: int) -> None:
    drops = find_drops(rows_of(steps_down, LOGARITHMIC, 0.005, seed))
    assert len(drops) == 2
    for drop, middle, height in zip(drops, DROPS, (0.4, 0.3), strict=True):
        assert drop.start < drop.middle < drop.stop
        assert math.log(drop.middle / middle) == pytest.approx(0, abs=0.1)  # rows are 6% apart
        assert drop.height == pytest.approx(height, abs=0.015)


@pytest.mark.parametrize("steps", [EVERY_10, LOGARITHMIC], ids=["every 10", "logarithmic"])
@pytest.mark.parametrize("curve", [steady, lambda step: 1.5], ids=["steady fall", "constant"])
def test_curves_without_plateaus_have_none(
    curve: Callable[[float], float], steps: Sequence[int]
) -> None:
    total = steady(0) - steady(4000)
    for seed in range(10):
        assert find_plateaus(rows_of(curve, steps, 0.01 * total, seed)) == []
        assert find_drops(rows_of(curve, steps, 0.01 * total, seed)) == []
    assert find_plateaus(rows_of(curve, steps)) == []


def test_a_steady_fall_that_ends_has_its_end_alone() -> None:
    rows = rows_of(lambda step: max(steady(step), steady(150)), LOGARITHMIC, 0.003)
    (plateau,) = find_plateaus(rows)
    assert plateau.level == pytest.approx(steady(150), abs=0.005)
    assert plateau.start == pytest.approx(150, rel=0.5)
    assert find_drops(rows) == []


def test_spikes_are_no_drops() -> None:
    rows = rows_of(steps_down, LOGARITHMIC)
    for n in (40, 100, 101):
        rows[n]["loss/eval"] = 3.0
    clean = find_plateaus(rows_of(steps_down, LOGARITHMIC))
    plateaus = find_plateaus(rows)
    assert [p.level for p in plateaus] == pytest.approx([p.level for p in clean], abs=0.01)


def test_plateaus_name_the_strategy_with_the_smallest_divergence() -> None:
    rows = rows_of(steps_down, LOGARITHMIC, 0.003)
    for number, row in enumerate(rows):
        if number % 2:
            continue  # strategies are compared in fewer steps than the loss
        row |= {f"strategy/kl_{name}": 1.0 for name in ("uniform", "unigram", "bigram")}
        step = row["train/step"] or 0
        best = "uniform" if step < DROPS[0] else "unigram" if step < DROPS[1] else "bigram"
        row |= {f"strategy/kl_{best}": 0.1, "strategy/kl_trigram": None}
    assert [p.strategy for p in find_plateaus(rows)] == ["uniform", "unigram", "bigram"]
    pairs = [(d.from_strategy, d.to_strategy) for d in find_drops(rows)]
    assert pairs == [("uniform", "unigram"), ("unigram", "bigram")]


@pytest.mark.parametrize("infinite", [None, math.inf])
def test_a_strategy_that_is_ever_infinitely_far_names_no_plateau(infinite: float | None) -> None:
    """In a run's rows infinite is null: one finite row must not speak for the others."""
    rows = rows_of(steps_down, LOGARITHMIC)
    for number, row in enumerate(rows):
        row |= {"strategy/kl_bigram": infinite if number % 2 else 0.1}
    assert {p.strategy for p in find_plateaus(rows)} == {None}
    for row in rows:
        row["strategy/kl_uniform"] = 1.0
    assert {p.strategy for p in find_plateaus(rows)} == {"uniform"}


def test_rows_without_a_loss_change_nothing() -> None:
    rows = rows_of(steps_down, LOGARITHMIC, 0.003)
    expected = find_plateaus(rows)
    absent: list[dict[str, float | int | None]] = [
        {"train/step": 5, "loss/eval": None},
        {"train/step": 90, "loss/eval": math.nan},
        {"loss/eval": 7.0},
        {"train/step": 3000, "loss/bayes": 0.8},
    ]
    assert find_plateaus(absent + rows[::-1]) == expected
    assert {plateau.strategy for plateau in expected} == {None}


@pytest.mark.parametrize("n_rows", [0, 1, 2, 3])
def test_short_histories_have_no_plateaus(n_rows: int) -> None:
    assert find_plateaus(rows_of(steps_down, range(0, 1000 * n_rows, 1000))) == []
    assert find_drops(rows_of(steps_down, range(0, 1000 * n_rows, 1000))) == []


def test_another_loss_can_be_asked_for() -> None:
    rows = [
        {"train/step": row["train/step"], "loss/train": row["loss/eval"]}
        for row in rows_of(steps_down, LOGARITHMIC)
    ]
    assert find_plateaus(rows) == []
    plateaus = find_plateaus(rows, loss="loss/train")
    assert len(plateaus) == 3
    assert isinstance(plateaus[0], Plateau)


def test_a_shoulder_and_the_drop_after_it_are_found_where_nothing_stands_still() -> None:
    steps = range(0, 4001, 100)
    levels = [1.6 / (1 + s / 400) ** 0.3 - (0.3 if s > 1000 else 0.0) for s in steps]
    history = [{"train/step": s, "loss/eval": v} for s, v in zip(steps, levels, strict=True)]
    assert find_drops(history) == []
    steepest = steepest_drop(history)
    assert steepest is not None
    shoulder, drop = steepest
    assert (drop.start, drop.stop) == (1000, 1100)
    assert 1000 < drop.middle < 1100
    assert drop.height == pytest.approx(levels[10] - levels[11])
    assert (shoulder.start, shoulder.stop) == (500, 1000)
    assert shoulder.level == pytest.approx(levels[7], abs=0.03)


@pytest.mark.parametrize("power", [0.3, 1.0])
def test_a_steady_fall_has_no_shoulder(power: float) -> None:
    history = [{"train/step": s, "loss/eval": 1 / (1 + s) ** power} for s in range(0, 4001, 100)]
    assert steepest_drop(history) is None


def test_a_rise_or_too_few_rows_have_no_drop() -> None:
    assert steepest_drop([{"train/step": s, "loss/eval": 1.0 + s} for s in range(10)]) is None
    assert steepest_drop([{"train/step": s, "loss/eval": 1.0 - s} for s in (0, 1, 2)]) is None
