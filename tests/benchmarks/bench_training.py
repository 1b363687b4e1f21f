"""What training costs, as ratios measured side by side: `make bench`.

Nothing here asserts a time. Each figure is printed with the target it is held against, and is the
median over repetitions in which the two sides take turns, so that a busy machine slows both.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mechcausal.graphs import chain, two_parents
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.tasks import SingleParentTask, build_task, soft_cross_entropy
from mechcausal.tasks.priors import DirichletPrior

pytestmark = pytest.mark.benchmark

SIZES = [(10, 20, 1024, 10), (10, 100, 256, 60)]


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _side_by_side(
    first: Callable[[], object], second: Callable[[], object], *, rounds: int = 15
) -> tuple[float, float]:
    """Median seconds of each, taking turns; the faster one is repeated to be measurable."""
    first(), second()
    times: list[tuple[float, float]] = [
        (_seconds(first), min(_seconds(second) for _ in range(5))) for _ in range(rounds)
    ]
    return tuple(statistics.median(column) for column in zip(*times, strict=True))  # type: ignore[return-value]


def _setting(vocab: int, length: int, batch: int):
    task = SingleParentTask(chain(length - 1), DirichletPrior.symmetric(0.1, vocab))
    generator = torch.Generator().manual_seed(0)
    model = SimplifiedTransformer(vocab, length)
    model.initialise(beta0=1.0)
    return task, generator, model, task.sample(batch, generator=generator)


def _steps(model, batch, names=("A1",)) -> tuple[Callable[[], None], Callable[[], None]]:
    optimizer = torch.optim.SGD([model.parameters_by_name[name] for name in names], lr=1e-3)

    def step(forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        loss = soft_cross_entropy(forward(batch.tokens), batch.target, epsilon=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return (
        lambda: step(lambda tokens: model.probabilities(model.hooked(tokens))),
        lambda: step(model),
    )


@pytest.mark.parametrize(("vocab", "length", "batch", "target"), SIZES)
@pytest.mark.parametrize("names", [("A1",), ("A2",), ("A1", "A2")], ids="+".join)
def test_step_of_the_closed_form_against_the_hooked_model(vocab, length, batch, target, names):
    _, _, model, data = _setting(vocab, length, batch)
    with model.training_only(names):
        hooked, closed = _side_by_side(*_steps(model, data, names))
    print(
        f"\nstep training {'+'.join(names)}, S={vocab} T={length} B={batch}: hooked "
        f"{hooked * 1e3:.1f} ms, closed form {closed * 1e3:.2f} ms, ratio {hooked / closed:.0f} "
        f"(target ≥ {target})"
    )


def _disentangled(vocab: int, length: int, heads: tuple[int, ...]) -> DisentangledTransformer:
    model = DisentangledTransformer(vocab, length, heads)
    model.initialise(scale=0.1, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize(
    ("graph", "vocab", "heads", "batch", "target"),
    [(chain(19), 10, (1, 1), 1024, 8), (two_parents(32), 5, (2, 1), 512, None)],
    ids=["chain", "two parents"],
)
def test_step_of_the_disentangled_model(graph, vocab, heads, batch, target):
    task = build_task(graph, DirichletPrior.symmetric(0.1, vocab))
    generator = torch.Generator().manual_seed(0)
    model = _disentangled(vocab, task.sequence_length, heads)
    data = task.sample(batch, generator=generator)
    hooked, closed = _side_by_side(*_steps(model, data, tuple(model.parameters_by_name)))
    sampling = statistics.median(
        _seconds(lambda: task.sample(batch, generator=generator)) for _ in range(9)
    )
    aim = "" if target is None else f" (target ≥ {target})"
    print(
        f"\ndisentangled, heads {list(heads)}, S={vocab} T={task.sequence_length} B={batch}: "
        f"hooked {hooked * 1e3:.1f} ms, closed form {closed * 1e3:.2f} ms, "
        f"ratio {hooked / closed:.1f}{aim}; sampling {sampling / closed:.2f} closed-form steps"
    )


@pytest.mark.parametrize(("vocab", "length", "batch", "_target"), SIZES)
def test_sampling_against_a_step(vocab, length, batch, _target):
    task, generator, model, data = _setting(vocab, length, batch)
    with model.training_only(("A1",)):
        hooked_step, step = _steps(model, data)
        sampling, closed = _side_by_side(lambda: task.sample(batch, generator=generator), step)
        hooked = statistics.median(_seconds(hooked_step) for _ in range(5))
    print(
        f"\nsampling, S={vocab} T={length} B={batch}: {sampling * 1e3:.2f} ms = "
        f"{sampling / closed:.1f} closed-form steps (target ≤ 2) = "
        f"{sampling / hooked:.2f} steps of the hooked model"
    )


def _train_seconds(folder: Path, *options: str) -> float:
    command = [sys.executable, "-m", "mechcausal.cli.main", "train", "markov_chain", "--quiet"]
    arguments = [*command, "--out", str(folder), *options]
    start = time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("label", "target", "options"),
    [
        ("demo (600 steps)", 30, ()),
        (
            "5,000 steps at the default cadence",
            10,
            (
                "--training.stage1.steps=2500",
                "--training.stage2.steps=2500",
                "--probing.every=200",
                "--probing.dense=5",
            ),
        ),
    ],
    ids=["demo", "long"],
)
def test_probing_and_wandb_against_neither(label, target, options, tmp_path):
    bare = ("--probing.no-enabled", "--wandb-mode=disabled")
    times = []
    for number in range(3):
        watched = _train_seconds(tmp_path / f"w{number}", "--wandb-mode=offline", *options)
        times.append((watched, _train_seconds(tmp_path / f"b{number}", *bare, *options)))
    watched, alone = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"\n{label}: {watched:.1f} s with probes and W&B, {alone:.1f} s without: "
        f"+{(watched / alone - 1) * 100:.0f} % (target ≤ {target} %)"
    )
