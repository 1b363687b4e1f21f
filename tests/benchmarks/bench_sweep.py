"""What a sweep costs as one batch, against the same runs one after another: `make bench`.

Nothing here asserts a time. The two sides take turns in one process, whose start is left out: half
of the single runs before the batch, half after it, so that a busy machine slows both.
"""

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from mechcausal.pictures.static import run_figures as report
from mechcausal.recipes import Recipe, load_recipe
from mechcausal.records.run_folder import read_metrics
from mechcausal.sweeps.batch import batches, train_batch
from mechcausal.sweeps.outcome import Outcome
from mechcausal.training.run import train

pytestmark = pytest.mark.benchmark

N_FORESTS, N_SEEDS = 20, 5


def _recipes() -> list[Recipe]:
    """Figure 9's family under Algorithm 1: S = 3, T = 20, 300 + 300 steps of 1,024 sequences."""
    base = load_recipe("random_forest").with_overrides(
        wandb__mode="offline", probing__every=200, probing__dense=5
    )
    return [
        base.with_overrides(seed=N_SEEDS * forest + seed, graph__seed=forest)
        for forest in range(N_FORESTS)
        for seed in range(N_SEEDS)
    ]


def _largest_difference(one: Path, other: Path) -> float:
    """Over all figures of all rows; infinity where a row or figure is missing."""
    ours, theirs = read_metrics(one), read_metrics(other)
    if [list(row) for row in ours] != [list(row) for row in theirs]:
        return float("inf")
    return max(
        0.0 if a == b else float("inf") if a is None or b is None else abs(a - b)
        for row, wanted in zip(ours, theirs, strict=True)
        for a, b in zip(row.values(), wanted.values(), strict=True)
    )


@pytest.mark.parametrize("pictures", [True, False], ids=["as they are", "without pictures"])
def test_a_batch_against_runs_one_after_another(
    pictures: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch draws no pictures: the ratio is also printed for single runs that draw none."""
    if not pictures:
        drawn: Any = lambda *_, **__: {}  # noqa: E731
        monkeypatch.setattr(report, "draw_figures", drawn)
        monkeypatch.setattr(report, "heatmaps", drawn)
    recipes = _recipes()
    few = {"training__stage1__steps": 2, "training__stage2__steps": 2}
    train(recipes[0].with_overrides(**few), out=tmp_path / "warm")
    step = len(recipes) // int(os.environ.get("BENCH_SINGLE_RUNS", "10"))
    chosen = range(0, len(recipes), step)
    seconds: list[float] = []

    def run_singles(numbers: range) -> None:
        for number in numbers:
            start = time.perf_counter()
            train(recipes[number], out=tmp_path / f"single{number}")
            seconds.append(time.perf_counter() - start)

    run_singles(chosen[: len(chosen) // 2])
    folders = [tmp_path / f"member{number}" for number in range(len(recipes))]
    workers = os.cpu_count() or 1

    def run_batch(numbers: list[int]) -> list[Outcome]:
        return train_batch([recipes[n] for n in numbers], [folders[n] for n in numbers])

    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        outcomes = [*chain.from_iterable(pool.map(run_batch, batches(recipes, workers)))]
    batch = (time.perf_counter() - start) / len(recipes)
    run_singles(chosen[len(chosen) // 2 :])
    assert all(outcome.state == "finished" for outcome in outcomes)
    single = statistics.mean(seconds)
    difference = max(_largest_difference(folders[n], tmp_path / f"single{n}") for n in chosen)
    note = "" if pictures else ", pictures left out"
    print(
        f"\n{len(recipes)} runs ({N_FORESTS} forests x {N_SEEDS} seeds, 300 + 300 steps): one "
        f"after another {single:.2f} s each (mean of {len(seconds)}{note}), as a batch "
        f"{batch:.2f} s each, ratio {single / batch:.1f} (target ≥ 5); largest difference of a "
        f"figure {difference:.1e} (target ≤ 1e-5)"
    )
