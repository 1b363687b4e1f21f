"""Figures of edge interventions: rises of the loss."""

from typing import TYPE_CHECKING

import numpy as np

from mechcausal.measures.interventions import EdgeEffects, Kind
from mechcausal.pictures.static.style import EDGE_COLOUR, OTHER_COLOUR, REFERENCE_COLOUR, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS: tuple[tuple[Kind, str, str], ...] = (
    ("edge", "edge knocked out", EDGE_COLOUR),
    ("redirect", "edge to a wrong parent", REFERENCE_COLOUR),
    ("non_edge", "non-edge knocked out", OTHER_COLOUR),
)


def draw_edge_effects(effects: EdgeEffects, title: str) -> "Figure":
    """Rise of the loss in nats by changed row, with standard errors, and the means per kind.

    Args:
        effects: result of `interventions.edge_effects`.
        title: title of the figure.
    """
    figure, (by_row, means) = new_figure(1, 2)
    for number, (kind, label, colour) in enumerate(_KINDS):
        interventions = effects.of(kind)
        if not interventions:
            continue
        rows = np.array([effect.child for effect in interventions], dtype=float)
        rises = [effect.rise for effect in interventions]
        errors = [effect.stderr for effect in interventions]
        offset = (number - 1) * 0.2  # separates the kinds within a row
        by_row.errorbar(
            rows + offset, rises, errors, fmt="o", ms=4, lw=1, color=colour, label=label
        )
        mean, stderr = effects.means[kind]
        means.bar(number, mean, yerr=stderr, color=colour, width=0.6)
    by_row.axhline(0, color="black", lw=0.6)
    by_row.set(xlabel="row of layer 1 changed", ylabel="rise of the loss (nats)", title="by row")
    if effects.means:  # a graph without edges has no labels
        by_row.legend(frameon=False, fontsize=8)
    by_row.grid(alpha=0.25)
    means.set_xticks(range(len(_KINDS)), [label.replace(" ", "\n", 1) for _, label, _ in _KINDS])
    means.set(title="mean over rows", ylabel="rise of the loss (nats)")
    means.tick_params(axis="x", labelsize=8)
    figure.suptitle(title, fontsize=12)
    return figure
