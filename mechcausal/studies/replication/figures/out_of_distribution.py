"""Out of distribution: transition matrices that the prior never draws, and longer sequences."""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

import torch

from mechcausal.graphs import chain
from mechcausal.measures.generalisation import (
    GeneralisationTable,
    OODRow,
    evaluate_ood,
    generalisation_table,
)
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.pictures.static.generalisation_figures import draw_generalisation, draw_ood
from mechcausal.studies.replication.evaluation import SEED
from mechcausal.studies.replication.result import Row
from mechcausal.studies.replication.runs import Member, Run
from mechcausal.tasks import SingleParentTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


def members(quick: bool) -> list[Member]:
    """Algorithm 1 on the chain."""
    del quick
    return [Member("markov_chain", 0)]


def measure(runs: list[Run], quick: bool) -> list[Row]:
    """Loss above Bayes and above the oracle by family; exponent of T in the error."""
    rows = []
    for result in _families(runs[0], quick):
        label = f"{result.family} ({result.description}): loss above"
        to_bayes = (result.gap_to_bayes, result.gap_to_bayes_stderr)
        to_oracle = (result.gap_to_oracle, result.gap_to_oracle_stderr)
        rows += [
            Row("ood", f"{label} Bayes of the training prior, nats", *to_bayes),
            Row("ood", f"{label} the oracle who knows the matrix, nats", *to_oracle),
        ]
    table = _table(runs[0], quick)
    for gamma in sorted(table.fits):
        for model, fit, theory in (
            ("trained model", table.fits[gamma], None),
            ("sharp layer 2, counts alone", table.ideal_fits[gamma], -0.5),
        ):
            quantity = (
                f"power of T in the error, entries ≥ {gamma:g}/S: {model}; "
                "must be below 0 by 2 standard errors"
            )
            holds = fit.slope + 2 * fit.stderr < 0
            row = Row("ood", quantity, fit.slope, fit.stderr, theory=theory, holds=holds)
            rows.append(row)
    return rows


def draw(runs: list[Run], quick: bool) -> "Mapping[str, Drawing]":
    """Gaps by family, and error against T."""
    return {
        "ood_families": draw_ood(_families(runs[0], quick)),
        "ood_theorem": draw_generalisation(_table(runs[0], quick)),
    }


@cache
def _families(run: Run, quick: bool) -> list[OODRow]:
    assert isinstance(run.task, SingleParentTask)  # the recipe says so
    return evaluate_ood(
        run.model,
        run.task,
        n_sequences=run.recipe.evaluation.n_sequences * (1 if quick else 4),
        generator=torch.Generator(device=run.recipe.device).manual_seed(SEED),
        epsilon=run.recipe.training.epsilon,
        bayes_draws=run.recipe.evaluation.bayes_draws,
    )


@cache
def _table(run: Run, quick: bool) -> GeneralisationTable:
    assert isinstance(run.model, SimplifiedTransformer)  # the recipe says so
    return generalisation_table(
        run.model,
        chain,
        n_sequences=run.recipe.evaluation.n_sequences * (1 if quick else 4),
        generator=torch.Generator(device=run.recipe.device).manual_seed(SEED),
    )
