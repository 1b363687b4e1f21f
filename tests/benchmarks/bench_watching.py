"""Watching a run: how good the estimates are, what the gradient tells, what a look costs.

python -m pytest -s tests/benchmarks/bench_watching.py
"""

import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from mechcausal.graphs import random_tree
from mechcausal.models.adapter import HookedTransformer
from mechcausal.tasks import SingleParentTask
from mechcausal.tasks.priors import DirichletPrior, FixedTransition
from mechcausal.theory import pairwise_theory
from probes import (
    Tracker,
    pairwise_information,
)
from tests.oracles import seeded

pytestmark = pytest.mark.benchmark

T, VOCAB = 19, 10


def tree_task(seed: int, alpha: float) -> SingleParentTask:
    """A random tree of 19 positions with one transition matrix for all sequences."""
    generator = seeded(seed)
    graph = random_tree(T, generator=generator)
    matrix = DirichletPrior.symmetric(alpha, vocab_size=VOCAB).sample(1, generator=generator)[0]
    return SingleParentTask(graph, FixedTransition.from_matrix(matrix))


def sequences(task: SingleParentTask, n: int, generator: torch.Generator) -> Tensor:
    return task.sample(n, generator=generator).tokens[:, :T]


def model_of(*, mlp: bool, seed: int, n_layers: int = 2, **sizes: Any) -> HookedTransformer:
    config: dict[str, Any] = {
        "n_layers": n_layers,
        "n_heads": 4,
        "d_model": 64,
        "d_head": 16,
        "n_ctx": T,
        "d_vocab": VOCAB,
        "device": "cpu",
        "seed": seed,
    }
    if mlp:
        config |= {"d_mlp": 256, "act_fn": "gelu", "normalization_type": "LN"}
    else:
        config |= {"attn_only": True, "normalization_type": None}
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return HookedTransformer(config | sizes)


def test_bias_and_coverage_of_pairwise_information() -> None:
    """Mean bias in nats and share of |z| < 2 over 171 pairs of positions, ten data sets each."""
    before = torch.ones(T, T, dtype=torch.bool).tril(-1)
    print("\n| sequences | correction | bias, Shannon | |z| < 2 | bias, χ² | |z| < 2 |")
    for n in (256, 1024, 4096):
        for correction in ("none", "miller_madow", "jackknife", "shuffle"):
            errors: dict[str, list[Tensor]] = {"shannon": [], "chi2": []}
            inside: dict[str, list[Tensor]] = {"shannon": [], "chi2": []}
            for seed in range(10):
                task = tree_task(seed, alpha=0.3)
                theory = pairwise_theory(task.graph, task.prior)
                result: Any = pairwise_information(
                    sequences(task, n, seeded(seed)), vocab_size=VOCAB, correction=correction
                )
                for name in errors:
                    error = (getattr(result, name) - getattr(theory, name))[before]
                    spread = getattr(result, f"{name}_stderr")[before]
                    errors[name].append(error)
                    inside[name].append((error / spread).abs() < 2)
            cells = []
            for name in errors:
                share = torch.cat(inside[name]).double().mean()
                cells += [f"{torch.cat(errors[name]).mean():+.4f}", f"{share:.2f}"]
            print(f"| {n} | {correction} | {' | '.join(cells)} |", flush=True)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("mlp", [False, True], ids=["attention-only", "MLP and LayerNorm"])
def test_the_gradient_against_information_over_training(mlp: bool) -> None:
    """Correlation and edge hits of layer 0's gradient for five trees, matrices and models."""
    print(f"\n{'MLP and LayerNorm' if mlp else 'attention only'}: seed, step, ratio, r, edge hits")
    for seed in range(5):
        task = tree_task(seed, alpha=1.0)
        generator = seeded(100 + seed)
        held_out = sequences(task, 4096, generator)
        model = model_of(mlp=mlp, seed=seed)
        edges = [parents[0] if parents else -1 for parents in task.graph.parents]
        track = Tracker(model, held_out, every=64, edges=edges, n_sequences=2048)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for step in range(257):
            track(step)
            optimizer.zero_grad()
            model(sequences(task, 256, generator), return_type="loss").backward()
            optimizer.step()
        table = track.to_frame()
        name = "gradient/layer0"
        for row in table.to_dict("records"):
            cells = [row.get(f"{name}/{k}") for k in ("correlation", "edge_hits", "chance")]
            ratio = row[f"{name}/signal_to_noise"]
            print(
                f"{seed} {row['step']:4d} {ratio:6.1f} "
                + " ".join("   – " if c is None or c != c else f"{c:5.2f}" for c in cells),
                flush=True,
            )


def test_a_look_costs_little() -> None:
    """Time of a run with looks every 100 steps over that of the same run without, in turns."""
    task = tree_task(0, alpha=1.0)
    generator = seeded()
    held_out = sequences(task, 1024, generator)
    sizes = {"n_layers": 4, "d_model": 128, "d_head": 32, "d_mlp": 512}
    model = model_of(mlp=True, seed=0, **sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    track = Tracker(model, held_out, every=100, dense=False, n_sequences=256)

    def steps(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            optimizer.zero_grad()
            model(sequences(task, 256, generator), return_type="loss").backward()
            optimizer.step()
        return time.perf_counter() - start

    def look(step: int) -> float:
        start = time.perf_counter()
        track(step)
        return time.perf_counter() - start

    steps(3), look(0)
    pairs = [(steps(10) / 10, look(100 * (i + 1))) for i in range(8)]
    step_seconds, look_seconds = (sorted(x)[len(pairs) // 2] for x in zip(*pairs, strict=True))
    ratio = look_seconds / step_seconds
    print(f"\na look takes {ratio:.1f} training steps: {ratio:.1f} % at every=100")
