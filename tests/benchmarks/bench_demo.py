"""Where users wait: the demo from its command to its end, and long sequences: `make bench`.

Nothing here asserts a time. Seconds are those of this machine at this moment; ratios are of sides
that took turns. With BEFORE=<a revision> the demo of that revision takes turns with this one's:

    BEFORE=v0.1.0 python -m pytest -s tests/benchmarks/bench_demo.py -k demo
"""

import io
import os
import resource
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from mechcausal.graphs import chain
from mechcausal.tasks import SingleParentTask
from mechcausal.tasks.ahead import BatchesAhead
from mechcausal.tasks.dirichlet import sample_dirichlet
from mechcausal.tasks.priors import DirichletPrior

pytestmark = pytest.mark.benchmark

_REPOSITORY = Path(__file__).parents[2]


def _command(tree: Path, *arguments: str) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "mechcausal.cli.main", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
    )
    clock = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _tree_before(folder: Path) -> Path | None:
    revision = os.environ.get("BEFORE")
    if not revision:
        return None
    archive = subprocess.run(
        ["git", "archive", revision], cwd=_REPOSITORY, check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as content:
        content.extractall(folder, filter="data")
    return folder


def test_demo(tmp_path: Path) -> None:
    before = _tree_before(tmp_path / "before")
    sides = {"now": _REPOSITORY} | ({"before": before} if before else {})
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(3):
        for name, tree in sides.items():
            out = str(tmp_path / f"{name}{turn}")
            arguments = ("markov_chain", "--quiet", "--wandb-mode", "offline", "--out", out)
            measured[name].append(_command(tree, "train", *arguments))
    least = {
        name: [min(column) for column in zip(*rows, strict=True)] for name, rows in measured.items()
    }
    print()
    for name, (clock, processor) in least.items():
        print(f"demo {name}: {clock:.1f} s on the clock, {processor:.1f} s of the processor")
    if before:
        clocks, processors = (least["now"][i] / least["before"][i] for i in range(2))
        print(f"now / before: {clocks:.2f} on the clock, {processors:.2f} of the processor")


def test_start(tmp_path: Path) -> None:
    """What has to be loaded before the first step, with and without looking for garbage."""
    code = (
        "import gc; gc.set_threshold({threshold})\n"
        "import time; start = time.process_time()\n"
        "import {first}wandb.apis.public, torch, transformer_lens\n"
        "import wandb.sdk.launch.inputs.internal\n"
        "print(time.process_time() - start)"
    )
    settings = {
        "as the command does": (100_000, ""),
        "looking for garbage": (700, ""),
        "W&B after TransformerLens": (100_000, "transformer_lens, "),
    }
    measured: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(3):
        for name, (threshold, first) in settings.items():
            text = code.format(threshold=threshold, first=first)
            done = subprocess.run([sys.executable, "-c", text], capture_output=True, check=True)
            measured[name].append(float(done.stdout))
    print()
    for name, seconds in measured.items():
        print(f"loading {name}: {min(seconds):.2f} s of the processor")


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _least(actions: dict[str, Callable[[], object]], rounds: int = 30) -> dict[str, float]:
    """Least milliseconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * min(values) for name, values in times.items()}


def test_dirichlet_samplers() -> None:
    """1,024 transition matrices of S = 10, alpha = 0.1: ours, torch's own, numpy's."""
    generator = torch.Generator().manual_seed(0)
    numbers, shape = np.random.default_rng(0), (1024, 10, 10)
    alpha = torch.full((10,), 0.1)
    everywhere = alpha.expand(shape).contiguous()

    def of_numpy() -> np.ndarray:
        draws = numbers.standard_gamma(0.1, shape, dtype=np.float32)
        rows: np.ndarray = draws / draws.sum(-1, keepdims=True)
        return rows  # 0/0 where all draws of a row underflow

    with _one_thread():
        measured = _least(
            {
                "ours": lambda: sample_dirichlet(alpha, shape, generator=generator),
                "torch's": lambda: torch._sample_dirichlet(everywhere, generator=generator),
                "numpy's, zeros and all": of_numpy,
            }
        )
    print()
    for name, milliseconds in measured.items():
        print(f"{name}: {milliseconds:.2f} ms, {milliseconds / measured['ours']:.2f} times ours")


def test_batches_drawn_ahead() -> None:
    """A batch while a model is trained, drawn by the same thread or by another one."""
    task = SingleParentTask(chain(19), DirichletPrior.symmetric(0.1, 10))
    generator = torch.Generator().manual_seed(0)
    ahead = BatchesAhead(task, torch.Generator().manual_seed(0))
    work = torch.rand(300, 300)

    def other() -> None:
        for _ in range(4):
            work @ work

    def together(draw: Callable[[], object]) -> None:
        for _ in range(20):
            draw()
            other()

    with _one_thread():
        measured = _least(
            {
                "in turn": lambda: together(lambda: task.sample(1024, generator=generator)),
                "ahead": lambda: together(lambda: ahead.sample(1024)),
            },
            rounds=8,
        )
    print(
        f"\n20 batches beside other work: {measured['in turn']:.0f} ms in turn, "
        f"{measured['ahead']:.0f} ms ahead, ratio {measured['ahead'] / measured['in turn']:.2f}"
    )


def test_long_sequences(tmp_path: Path) -> None:
    """T = 1,000, S = 100: forty steps, thirteen looks, theory and pictures."""
    arguments = ("markov_chain", "--quiet", "--wandb-mode", "offline", "--out", str(tmp_path / "r"))
    sizes = ("--graph.sequence-length", "1000", "--task.vocab-size", "100")
    steps = ("--training.stage1.steps", "20", "--training.stage2.steps", "20")
    clock, processor = _command(_REPOSITORY, "train", *arguments, *sizes, *steps)
    print(
        f"\nT = 1,000, S = 100, 40 steps: {clock:.0f} s on the clock (at most 600 on two busy "
        f"cores), {processor:.0f} s of the processor"
    )
