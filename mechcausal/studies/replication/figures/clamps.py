"""What must form first? The induction head, with layer 1 clamped to the graph, free, or wrong.

Both layers train together by gradient descent from A1 = 0 and a small A2 = beta0 I. The true graph,
whose pairs have the largest g of the theory, gives layer 2 something to learn from step 0; the
uniform pattern of a free layer 1 gives the mean of g over keys, and a wrong graph what its pairs
happen to share (`clamp_gradients`).
"""

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from mechcausal.measures.figures import STEP
from mechcausal.pictures.static.clamp_figures import draw_formation
from mechcausal.studies.replication.evaluation import SEED, fresh_batch
from mechcausal.studies.replication.figures.clamp_gradients import (
    Descent,
    descent,
    minus,
    ratio,
)
from mechcausal.studies.replication.result import Row
from mechcausal.studies.replication.runs import Member, Run
from mechcausal.support.statistics import mean_and_stderr
from mechcausal.tasks import SingleParentTask
from mechcausal.theory import PairwiseTheory, pairwise_theory
from mechcausal.training.experiments.clamping import layer1_rows, wrong_rows

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
    lengths = (60,) if quick else (60, 180)
    chains = _by_condition(runs, "markov_chain")["free"]
    return rows + _length_rows(chains[0], lengths, 1024 if quick else 16_384)


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


def _curve(run: Run) -> list[tuple[int, float]]:
    """Pairs (step, induction score); a graph without edges has no score."""
    rows = ((row[STEP], row.get("induction/score")) for row in run.history)
    return [(int(step or 0), float(score)) for step, score in rows if score is not None]


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


def _gradient_rows(label: str, runs: Mapping[str, list[Run]], factor: int) -> list[Row]:
    """First gradients relative to that with the true graph, by graph and by wrong graph."""
    sets = [_descents(run, factor) for run in runs["wrong_graph"]]
    rows = []
    for condition in ("free", "wrong_graph"):
        quantity = (
            f"{label}: first gradient along A2 = beta I, layer 1 {CONDITIONS[condition]}, relative "
            f"to clamped to the graph; must be within {AGREEMENT:g} of theory, every seed"
        )
        ratios = [ratio(each[condition], each["graph"]) for each in sets]
        holds = all(abs(ours - theory) <= AGREEMENT for ours, _, theory in ratios)
        rows.append(_ratio_row(quantity, ratios, holds))
    quantity = f"{label}: the same of free minus wrong, relative to graph minus wrong"
    centred = [
        ratio(minus(each["free"], each["wrong_graph"]), minus(each["graph"], each["wrong_graph"]))
        for each in sets
    ]
    return [*rows, _ratio_row(quantity, centred, None)]


def _length_rows(run: Run, lengths: Sequence[int], n_sequences: int) -> list[Row]:
    """The first gradient of a free layer 1 on longer chains, where its leading order is nearer."""
    rows = []
    for length in lengths:
        recipe = run.recipe.with_overrides(graph__sequence_length=length)
        task = SingleParentTask(recipe.build_graph(), recipe.build_prior())
        batch = task.sample(n_sequences, generator=torch.Generator().manual_seed(SEED))
        options = {"beta0": recipe.training.beta0, "epsilon": recipe.training.epsilon}
        theory = _theory_of(task)
        true = descent(task, theory, batch, layer1_rows(task.graph), **options)
        free = descent(task, theory, batch, {}, **options)
        quantity = f"chain of {length} tokens: first gradient, layer 1 free, relative to clamped"
        rows.append(_ratio_row(quantity, [ratio(free, true)], None))
    return rows


def _ratio_row(
    quantity: str, ratios: Sequence[tuple[float, float, float]], holds: bool | None
) -> Row:
    ours, over_graphs = mean_and_stderr([ours for ours, _, _ in ratios])
    stderr = max(over_graphs or 0.0, *(stderr for _, stderr, _ in ratios))
    theory, _ = mean_and_stderr([theory for _, _, theory in ratios])
    return Row("clamps", quantity, ours, stderr, theory=theory, holds=holds)


def _loss_rows(label: str, runs: Mapping[str, list[Run]]) -> list[Row]:
    rows = []
    for condition, name in CONDITIONS.items():
        ours, stderr = mean_and_stderr([run.summary["loss/gap"] for run in runs[condition]])
        quantity = f"{label}: loss above Bayes at the end, layer 1 {name}, nats"
        rows.append(Row("clamps", quantity, ours, stderr))
    return rows


@cache
def _descents(run: Run, factor: int) -> dict[str, Descent]:
    """The first gradients of a run's seed, on fresh sequences of its task."""
    task = run.task
    assert isinstance(task, SingleParentTask)
    rows = {
        "graph": layer1_rows(run.graph),
        "free": {},
        "wrong_graph": wrong_rows(run.graph, run.member.seed),
    }
    batch, theory = fresh_batch(run, factor), _theory_of(task)
    training = run.recipe.training
    return {
        condition: descent(
            task, theory, batch, keys, beta0=training.beta0, epsilon=training.epsilon
        )
        for condition, keys in rows.items()
    }


@lru_cache(maxsize=8)  # the seeds of a graph share it
def _theory_of(task: SingleParentTask) -> PairwiseTheory:
    generator = torch.Generator().manual_seed(SEED)
    return pairwise_theory(task.graph, task.prior, n_priors=2000, generator=generator)
