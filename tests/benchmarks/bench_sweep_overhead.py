"""What a sweep costs beside its members: `pytest -s tests/benchmarks/bench_sweep_overhead.py`.

Nothing here asserts a time. What is measured runs in processes of its own, without the checks of
shapes that come with pytest: `python tests/benchmarks/bench_sweep_overhead.py overhead`.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.benchmark

TINY = """
recipe = "manual"
seeds = {seeds}
[changes]
training = {{ batch_size = 32, stage1.steps = 5, stage2.steps = 5 }}
evaluation = {{ n_sequences = 32, bayes_draws = 4, theory_priors = 10 }}
probing = {{ enabled = false, frames = 0, images = 0 }}
checkpoints.schedule = "none"
"""


@pytest.mark.parametrize("figure", ["plan", "overhead", "memory"])
def test_figure(figure: str) -> None:
    subprocess.run([sys.executable, __file__, figure], check=True)


def _file(folder: Path, seeds: int) -> Path:
    file = folder / "tiny.toml"
    file.write_text(TINY.format(seeds=seeds))
    return file


def plan(folder: Path) -> None:
    """Ten thousand members planned by the command."""
    command = [sys.executable, "-m", "mechcausal.cli.main", "sweep", str(_file(folder, 10_000))]
    begin = time.perf_counter()
    subprocess.run([*command, "--dry-run"], check=True, stdout=subprocess.DEVNULL)
    print(f"10,000 members planned in {time.perf_counter() - begin:.2f} s (at most 5)")


def overhead(folder: Path) -> None:
    """Dispatch, process and W&B of a member, beyond the same runs one after another."""
    import torch

    from mechcausal.sweeps.definition import load_sweep
    from mechcausal.sweeps.driver import SweepProgress, run_sweep
    from mechcausal.sweeps.plan import plan as members_of
    from mechcausal.training.run import train

    torch.set_num_threads(1)
    sweep = load_sweep(_file(folder, 40))
    alone = [
        member.recipe.with_overrides(wandb__mode="disabled") for member in members_of(sweep, folder)
    ]
    own, paces = [], []
    for turn in range(3):  # in turns, so that a busy machine slows both
        for number, recipe in enumerate(alone):
            begin = time.perf_counter()
            train(recipe, out=folder / f"alone{turn}" / str(number))
            own.append(time.perf_counter() - begin)
        ends: list[float] = []

        def look(progress: SweepProgress, ends: list[float] = ends) -> None:
            # The pace of members: the start of the worker is paid once, not by each.
            ends += [time.perf_counter()] * (progress.done - len(ends))

        run_sweep(sweep, folder / f"sweep{turn}", workers=1, wandb_mode="offline", on_progress=look)
        paces += [after - before for before, after in pairwise(ends[3:])]
    pace, run = statistics.median(paces), statistics.median(own)
    print(f"a member of `local`, W&B offline: {1e3 * pace:.0f} ms; the run by itself, without W&B:")
    print(f"{1e3 * run:.0f} ms; overhead {1e3 * (pace - run):.0f} ms (at most 50 on idle cores)")


def memory(folder: Path) -> None:
    """The parent's memory over two thousand members."""
    from mechcausal.sweeps.definition import load_sweep
    from mechcausal.sweeps.driver import SweepProgress, run_sweep

    process, seen = psutil.Process(), []

    def look(progress: SweepProgress) -> None:
        workers = [0]
        for child in process.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                workers.append(child.memory_info().rss)
        largest = max(workers) / 2**20
        seen.append((progress.done, process.memory_info().rss / 2**20, largest))

    count = int(os.environ.get("MEMBERS", "2000"))
    run_sweep(load_sweep(_file(folder, count)), folder / "out", workers=2, on_progress=look)
    marks = [count * part // 4 or 20 for part in range(5)]
    at = [min(seen, key=lambda row: abs(row[0] - mark)) for mark in marks]
    text = ", ".join(f"{n:,} members: {own:.0f} ({worker:.0f})" for n, own, worker in at)
    print(f"MiB of the parent (and of the largest process it started) after {text}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        {"plan": plan, "overhead": overhead, "memory": memory}[sys.argv[1]](Path(scratch))
