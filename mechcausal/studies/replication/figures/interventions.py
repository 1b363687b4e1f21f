"""Interventions on edges: the model uses the graph that its attention shows."""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from mechcausal.measures.interventions import (
    EdgeEffects,
    InterventionEffect,
    edge_effects,
    patch_ideal,
)
from mechcausal.pictures.static.effect_figures import draw_edge_effects
from mechcausal.studies.replication.evaluation import fresh_batch
from mechcausal.studies.replication.result import Row
from mechcausal.studies.replication.runs import Member, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

LABELS = {
    "markov_chain": "chain, simplified",
    "figure2_chain": "chain, disentangled",
    "figure5_two_parents": "two parents",
    "figure8_mlp": "chain, MLP",
}


def members(quick: bool) -> list[Member]:
    """One run of each kind of model, shared with the other figures."""
    del quick
    return [Member(recipe) for recipe in LABELS]


def measure(runs: list[Run], quick: bool) -> list[Row]:
    """Rise of the loss after knocking out edges and non-edges, redirecting edges, and patching."""
    rows = []
    for run in runs:
        label = LABELS[run.member.recipe]
        effects, patches = _effects(run, quick)
        for name, intervention in (
            ("edge", "an edge knocked out"),
            ("non_edge", "a non-edge of the same row knocked out"),
            ("redirect", "an edge redirected to a wrong parent"),
        ):
            rise, stderr = effects.means[name]
            quantity = f"{label}: rise of the loss, {intervention}, nats"
            rows.append(Row("interventions", quantity, rise, stderr))
        rise, stderr = effects.means["edge_minus_non_edge"]
        quantity = (
            f"{label}: edge minus non-edge, nats; must be above 0 by 3 standard errors (paired)"
        )
        holds = rise > 3 * stderr
        rows.append(Row("interventions", quantity, rise, stderr, holds=holds))
        joint = [effect for kind in ("all_edges", "query") for effect in effects.of(kind)]
        for effect in (*joint, *patches):
            quantity = f"{label}: rise of the loss, {effect.kind.replace('_', ' ')}, nats"
            rows.append(Row("interventions", quantity, effect.rise, effect.stderr))
    return rows


def draw(runs: list[Run], quick: bool) -> "Mapping[str, Drawing]":
    """Rise of the loss by edge, beside that of non-edges."""
    drawings: dict[str, Any] = {}
    for run in runs:
        effects, _ = _effects(run, quick)
        name = f"interventions_{run.member.recipe}"
        title = f"{LABELS[run.member.recipe]}: what an edge is worth"
        drawings[name] = draw_edge_effects(effects, title)
    return drawings


@cache
def _effects(run: Run, quick: bool) -> tuple[EdgeEffects, tuple[InterventionEffect, ...]]:
    # Each edge takes three passes of the hooked model over the whole batch.
    batch = fresh_batch(run, 1)[: 256 if quick else None]
    epsilon = run.recipe.training.epsilon
    effects = edge_effects(run.model, run.graph, batch, epsilon=epsilon)
    return effects, patch_ideal(run.model, run.graph, batch, epsilon=epsilon)
