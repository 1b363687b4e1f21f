"""What must form first? The induction head, with layer 1 clamped to the graph, free, or wrong.

Both layers train together by gradient descent from A1 = 0 and a small A2 = beta0 I. With layer 1's
pattern P and beta -> 0 the loss falls along A2 = beta I, to leading order in 1/T, at the rate

    -dL/dbeta = 1 / (S T) sum_ij P_ij g_ij,

with g_ij of the theory of the first gradient. So the true graph, whose pairs have the largest g,
gives layer 2 something to learn from step 0. The uniform pattern of a free layer 1 gives the mean
of g over keys, and a wrong graph what its pairs happen to share.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.measures.figures import STEP
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.pictures.static.clamp_figures import draw_formation
from mechcausal.studies.replication.evaluation import fresh_batch
from mechcausal.studies.replication.result import Row
from mechcausal.studies.replication.runs import Member, Run
from mechcausal.support.statistics import mean_and_stderr
from mechcausal.tasks import cross_entropies
from mechcausal.theory import PairwiseTheory, pairwise_theory
from mechcausal.training.experiments.clamping import layer1_rows, rows_as_pattern, wrong_rows
from probes import fixed_to

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

GRAPHS = {"markov_chain": "chain", "random_tree": "random tree"}
CONDITIONS = {
    "graph": "clamped to the graph",
    "free": "free",
    "wrong_graph": "clamped to a wrong graph",
}
SETTINGS: dict[str, Any] = {
    "training__algorithm": "joint",
    "training__joint__steps": 400,
    "training__joint__optimizer": "sgd",
    "training__joint__lr": 10.0,
    "training__beta0": 0.01,
    "training__batch_size": 256,
    "evaluation__n_sequences": 256,
    "evaluation__bayes_draws": 32,
    "evaluation__theory_priors": 300,
    "probing__every": 10,
    "probing__dense": 24,
    "probing__frames": 0,
    "probing__images": 0,
    "probing__report": False,
    "checkpoints__schedule": "none",
}
AGREEMENT = 0.1
"""How far a ratio of gradients may be from the theory's."""


def members(quick: bool) -> list[Member]:
    """Five seeds of each graph and condition (quick: two); the tree is one and the same."""
    trees = {"random_tree": {"graph__seed": 0}}
    return [
        Member(
            recipe,
            seed,
            {**SETTINGS, **trees.get(recipe, {}), "clamp__pattern": condition},
            f"clamped-{condition}",
        )
        for recipe in GRAPHS
        for seed in range(2 if quick else 5)
        for condition in CONDITIONS
    ]


def measure(runs: list[Run], quick: bool) -> list[Row]:
    """Formation steps and losses under each condition, and the first gradients against theory."""
    rows = []
    for recipe, label in GRAPHS.items():
        by_condition = _by_condition(runs, recipe)
        rows += _formation_rows(label, by_condition)
        rows += _gradient_rows(label, by_condition, 4 if quick else 32)
        rows += _loss_rows(label, by_condition)
    return rows


def draw(runs: list[Run], quick: bool) -> "Mapping[str, Drawing]":
    """The induction score over training under each condition, for both graphs."""
    del quick
    curves = {
        label: {
            CONDITIONS[condition]: [_curve(run) for run in group]
            for condition, group in _by_condition(runs, recipe).items()
        }
        for recipe, label in GRAPHS.items()
    }
    return {"clamps": draw_formation(curves)}


def _curve(run: Run) -> list[tuple[float, float]]:
    """Pairs (step, induction score); a graph without edges has no score."""
    rows = ((row[STEP], row.get("induction/score")) for row in run.history)
    return [(step or 0, score) for step, score in rows if score is not None]


def _by_condition(runs: list[Run], recipe: str) -> dict[str, list[Run]]:
    return {
        condition: [
            run
            for run in runs
            if run.member.recipe == recipe and run.recipe.clamp.pattern == condition
        ]
        for condition in CONDITIONS
    }


def _formation_rows(label: str, runs: Mapping[str, list[Run]]) -> list[Row]:
    steps = {
        condition: [run.summary["induction/formation_step"] for run in group]
        for condition, group in runs.items()
    }
    formed_first = [
        early is not None and (late is None or early < late)
        for early, late in zip(steps["graph"], steps["free"], strict=True)
    ]
    rows = []
    for condition, name in CONDITIONS.items():
        formed = [float(step) for step in steps[condition] if step is not None]
        quantity = f"{label}: step at which the induction head forms, layer 1 {name}"
        holds = None
        if condition == "graph":
            quantity += "; must be before that of the free one, every seed"
            holds = all(formed_first)
        ours, stderr = mean_and_stderr(formed) if formed else (None, None)
        rows.append(Row("clamps", quantity, ours, stderr, holds=holds))
    never = [float(step is None) for step in steps["wrong_graph"]]
    ours, stderr = mean_and_stderr(never)
    quantity = f"{label}: share of wrong graphs on which it never forms; must be 1"
    rows.append(Row("clamps", quantity, ours, stderr, theory=1.0, holds=ours == 1.0))
    return rows


@dataclass(frozen=True)
class _Ratio:
    """The first gradient on beta under a condition, relative to that with the true graph."""

    ours: float
    stderr: float
    theory: float


def _gradient_rows(label: str, runs: Mapping[str, list[Run]], factor: int) -> list[Row]:
    rows = []
    for condition in ("free", "wrong_graph"):
        ratios = [_ratio(run, condition, factor) for run in runs[condition]]
        if condition == "free":  # the same for every seed: one graph, A1 = 0
            ratios = ratios[:1]
        ours, over_graphs = mean_and_stderr([ratio.ours for ratio in ratios])
        theory, _ = mean_and_stderr([ratio.theory for ratio in ratios])
        quantity = (
            f"{label}: first gradient along A2 = beta I, layer 1 {CONDITIONS[condition]}, relative "
            f"to clamped to the graph; must be within {AGREEMENT:g} of theory, every graph"
        )
        holds = all(abs(ratio.ours - ratio.theory) <= AGREEMENT for ratio in ratios)
        stderr = max(over_graphs or 0.0, *(ratio.stderr for ratio in ratios))
        rows.append(Row("clamps", quantity, ours, stderr, theory=theory, holds=holds))
    return rows


def _loss_rows(label: str, runs: Mapping[str, list[Run]]) -> list[Row]:
    rows = []
    for condition, name in CONDITIONS.items():
        ours, stderr = mean_and_stderr([run.summary["loss/gap"] for run in runs[condition]])
        quantity = f"{label}: loss above Bayes at the end, layer 1 {name}, nats"
        rows.append(Row("clamps", quantity, ours, stderr))
    return rows


def _ratio(run: Run, condition: str, factor: int) -> _Ratio:
    """The ratio of the means over sequences, with its standard error by the delta method."""
    true, other = (_descents(run, kind, factor) for kind in ("graph", condition))
    ratio = (other.mean() / true.mean()).item()
    spread = (other - ratio * true).std() / true.mean() / len(true) ** 0.5
    theory = _theory(run)
    weights = {kind: _initial_pattern(run, kind) for kind in ("graph", condition)}
    n = theory.g.shape[0]
    totals = {kind: (pattern[:n, :n] * theory.g).sum() for kind, pattern in weights.items()}
    return _Ratio(ratio, spread.item(), (totals[condition] / totals["graph"]).item())


def _descents(run: Run, condition: str, factor: int) -> Float[Tensor, "batch"]:
    """`-dL/dbeta` of every sequence at the start of training, in float64."""
    batch, epsilon = fresh_batch(run, factor), run.recipe.training.epsilon
    attention1 = _initial_pattern(run, condition)
    same = (batch.tokens == batch.tokens[:, -1:]).double()
    beta = torch.full((len(batch), 1), run.recipe.training.beta0).double().requires_grad_()
    attention2 = (beta * (same @ attention1.T)).softmax(-1)
    output = attention2.new_zeros(batch.target.shape).scatter_add(1, batch.tokens, attention2)
    losses = cross_entropies(output, batch.target.double(), epsilon=epsilon)
    (gradient,) = torch.autograd.grad(losses.sum(), beta)
    return -gradient.squeeze(1)


def _initial_pattern(run: Run, condition: str) -> Float[Tensor, "query key"]:
    """Layer 1's pattern at A1 = 0 under a condition."""
    graph = run.graph
    model = SimplifiedTransformer(run.recipe.task.vocab_size, graph.sequence_length)
    model.hooked.double()
    rows = {"graph": layer1_rows(graph), "wrong_graph": wrong_rows(graph, run.member.seed)}
    if condition == "free":
        return model.attention1().detach()
    with model.clamped({0: fixed_to(rows_as_pattern(rows[condition], graph.sequence_length))}):
        return model.attention1().detach()


@cache
def _theory(run: Run) -> PairwiseTheory:
    return pairwise_theory(
        run.graph,
        run.recipe.build_prior(),
        n_priors=1000,
        generator=torch.Generator().manual_seed(run.recipe.seed),
    )
