"""The theory behind the figures: the gradient of attention follows mutual information."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from mechcausal.pictures.static.run_figures import draw_gradient
from mechcausal.records.matrices import find_matrices
from mechcausal.studies.replication.result import Row
from mechcausal.studies.replication.runs import Member, Run
from mechcausal.support.statistics import mean_and_stderr
from mechcausal.theory import pairwise_theory

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

# Far from saturation, where the leading order in 1/T dominates.
LONG = {
    "graph__sequence_length": 60,
    "task__alpha": 1.0,
    "training__beta0": 0.01,
    "training__stage1__steps": 1,
    "training__stage2__steps": 0,
    "evaluation__n_sequences": 65_536,
    "evaluation__bayes_draws": 2,
}
CORRELATION = 0.92


def members(quick: bool) -> list[Member]:
    """Algorithm 1 on the chain and on random trees, and one first gradient at T = 60."""
    seeds = range(2 if quick else 5)
    runs = [Member(name, seed) for name in ("markov_chain", "random_tree") for seed in seeds]
    long = LONG | ({"evaluation__n_sequences": 16_384} if quick else {})
    return [*runs, Member("markov_chain", 0, long, "long")]


def measure(runs: list[Run], quick: bool) -> list[Row]:
    """Edges named by the first gradient, its correlation with theory, and the final graph."""
    del quick
    short = [run for run in runs if not run.member.label]
    (long,) = (run for run in runs if run.member.label)
    first = [run.summary["first"] for run in short]
    last = [run.summary for run in short]

    def row(quantity: str, source: list[dict[str, Any]], name: str, least: float | None) -> Row:
        values = [figures[name] for figures in source]
        ours, stderr = mean_and_stderr(values)
        label = quantity + ("" if least is None else f"; must be ≥ {least:g}, every run")
        holds = None if least is None else all(value >= least for value in values)
        return Row("theory", label, ours, stderr, theory=1.0, holds=holds)

    return [
        row("rows whose first gradient is largest at the parent", first, "gradient/edge_hits", 1.0),
        row("F1 of the edges named by the first gradient", first, "graph/f1", None),
        row(
            "correlation of the first gradient with the predicted one, T = 20",
            first,
            "gradient/theory_correlation",
            CORRELATION,
        ),
        row(
            "the same at T = 60, alpha = 1, beta0 = 0.01",
            [long.summary["first"]],
            "gradient/theory_correlation",
            0.98,
        ),
        row(
            "its correlation with chi-squared information, T = 20",
            first,
            "gradient/chi2_correlation",
            None,
        ),
        row("edges recovered by Algorithm 1", last, "graph/recovered", 1.0),
        row("mean attention on the parent after it", last, "graph/parent_attention", 0.99),
    ]


def draw(runs: list[Run], quick: bool) -> "Mapping[str, Drawing]":
    """The first gradient of the long chain beside the predicted one."""
    del quick
    (run,) = (run for run in runs if run.member.label)
    frames, _, _ = find_matrices(run.folder)
    steps = {
        step: {name: torch.from_numpy(matrix) for name, matrix in matrices.items()}
        for step, matrices in frames.items()
    }
    theory = pairwise_theory(
        run.graph,
        run.recipe.build_prior(),
        generator=torch.Generator().manual_seed(run.recipe.seed),
        beta0=run.recipe.training.beta0,
    )
    return {"theory_gradient": draw_gradient(steps, theory)}
