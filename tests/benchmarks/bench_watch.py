"""What `--watch` costs: the same run with and without it, by turns in one process: `make bench`.

Nothing here asserts a time. The terminal is one that takes everything at once.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from mechcausal.cli.display import LiveView
from mechcausal.recipes import Recipe, load_recipe
from mechcausal.training.run import Progress, train

pytestmark = pytest.mark.benchmark


def _recipe(length: int) -> Recipe:
    return load_recipe("markov_chain").with_overrides(
        graph__sequence_length=length,
        training__batch_size=1024 if length < 100 else 64,
        training__stage2__steps=0,
        evaluation__n_sequences=256,
        evaluation__theory_priors=10,
        probing__images=2,
        probing__report=False,
        checkpoints__schedule="none",
        wandb__mode="disabled",
    )


def _seconds(recipe: Recipe, out: Path, show: Callable[[Progress], None]) -> float:
    """From the first step to the last: what comes before and after has no display."""
    times: list[float] = []

    def on_progress(progress: Progress) -> None:
        if progress.step == 0:
            times.append(time.perf_counter())
        show(progress)
        if progress.step == progress.n_steps:
            times.append(time.perf_counter())

    train(recipe, out=out, on_progress=on_progress)
    return times[1] - times[0]


@pytest.mark.parametrize("length", [20, 200])
def test_watching_against_not_watching(length: int, tmp_path: Path) -> None:
    recipe = _recipe(length)
    ratios, shares = [], []
    for number in range(5):
        spent = 0.0
        with Path(os.devnull).open("w", encoding="utf-8") as terminal:
            console = Console(
                file=terminal, force_terminal=True, width=160, height=50, color_system="truecolor"
            )
            view = LiveView(recipe, console)

            def show(progress: Progress, view: LiveView = view) -> None:
                nonlocal spent
                began = time.perf_counter()
                view.show(progress)
                spent += time.perf_counter() - began

            watched = _seconds(recipe, tmp_path / f"w{number}", show)
            view.close()
        alone = _seconds(recipe, tmp_path / f"a{number}", lambda progress: None)
        ratios.append(watched / alone)
        shares.append(spent / (watched - spent))
    print(
        f"\nT={length}: with --watch {statistics.median(ratios):.3f} of the time without "
        f"({min(ratios):.3f} to {max(ratios):.3f}); drawing took "
        f"{statistics.median(shares) * 100:.1f} % of the run (target ≤ 5 %)"
    )
