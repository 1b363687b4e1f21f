"""Retrieve or infer: strategies of a model of chains with one of N matrices.

Source: Park, Lubana, Pres and Tanaka 2024 (arXiv 2412.01003). With few matrices a model recognises
the sequence's own, with many it infers each one anew.
"""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

import torch

from mechcausal.pictures.static.task_figures import draw_side_by_side
from mechcausal.studies.replication.evaluation import SEED
from mechcausal.studies.replication.figures.base import grouped
from mechcausal.studies.replication.result import Row
from mechcausal.studies.replication.runs import Member, Run
from mechcausal.support.statistics import mean_and_stderr
from mechcausal.tasks import SingleParentTask, cross_entropies
from mechcausal.tasks.finite_prior import FinitePrior
from mechcausal.tasks.predictors import bigram_prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

NUMBERS, NUMBERS_QUICK, N_SEEDS = (8, 64, 4096), (8, 4096), 3
N_FRESH = 4096
_RETRIEVAL = ("strategy/weight_unigram_retrieval", "strategy/weight_bigram_retrieval")
_INFERENCE = ("strategy/weight_bigram",)


def members(quick: bool) -> list[Member]:
    """Every number of matrices with three seeds; quick: the smallest and largest with one."""
    return [
        Member("finite_mixture", seed, {"task__matrices": number}, f"{number}matrices")
        for number in (NUMBERS_QUICK if quick else NUMBERS)
        for seed in range(1 if quick else N_SEEDS)
    ]


def measure(runs: list[Run], quick: bool) -> list[Row]:
    """Weights of the nearest mixture, the loss above Bayes, and what new matrices cost."""
    del quick
    rows = []
    for number, group in _by_number(runs).items():
        label = f"{number:,} matrices"
        for name, keys, extreme in (
            ("retrieval", _RETRIEVAL, min(NUMBERS)),
            ("inference", _INFERENCE, max(NUMBERS)),
        ):
            weights = [sum(run.summary[key] for key in keys) for run in group]
            quantity, holds = f"{label}: weight of {name}", None
            if number == extreme:
                quantity += "; must be above one half, every seed"
                holds = min(weights) > 0.5
            rows.append(Row("mixtures", quantity, *mean_and_stderr(weights), holds=holds))
        losses = {
            "loss above Bayes": [run.summary["loss/gap"] for run in group],
            "KL of the true row to the model, chains of new matrices": [
                _on_fresh_chains(run)[0] for run in group
            ],
            "the same of the inference itself": [_on_fresh_chains(run)[1] for run in group],
        }
        for name, values in losses.items():
            rows.append(Row("mixtures", f"{label}: {name}, nats", *mean_and_stderr(values)))
    return rows


def draw(runs: list[Run], quick: bool) -> "Mapping[str, Drawing]":
    """The nearest mixture over training, for every number of matrices."""
    del quick
    first = {f"N = {number:,}": group[0].history for number, group in _by_number(runs).items()}
    return {"mixtures": draw_side_by_side(first, "weights")}


def _by_number(runs: list[Run]) -> dict[int, list[Run]]:
    return grouped(runs, lambda run: run.recipe.task.matrices or 0)


@cache
@torch.no_grad()
def _on_fresh_chains(run: Run) -> tuple[float, float]:
    """KL of the true row to the model, and to the posterior mean of an unknown matrix, nats."""
    prior = run.recipe.build_prior()
    assert isinstance(prior, FinitePrior)  # the recipe says so
    task = SingleParentTask(run.graph, prior.base)
    generator = torch.Generator(device=run.recipe.device).manual_seed(SEED)
    batch = task.sample(N_FRESH, generator=generator)
    truth = batch.target.double()
    entropy = torch.special.entr(truth).sum(-1).mean()
    model, inferred = (
        (cross_entropies(prediction, batch.target).double().mean() - entropy).item()
        for prediction in (run.model(batch.tokens), bigram_prediction(task, batch.tokens))
    )
    return model, inferred
