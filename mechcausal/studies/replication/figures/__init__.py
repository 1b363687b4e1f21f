"""Every figure that can be reproduced, by its name on the command line."""

from mechcausal.studies.replication.figures import (
    clamps,
    forests,
    gradients,
    in_context_graphs,
    interventions,
    lags,
    mixtures,
    out_of_distribution,
    several_parents,
    single_parent,
    trees,
)
from mechcausal.studies.replication.figures.base import Figure

FIGURES: dict[str, Figure] = {
    "figure2": Figure(
        single_parent.members, single_parent.measure_losses, single_parent.draw_losses
    ),
    "figure5": Figure(
        several_parents.members, several_parents.measure_losses, several_parents.draw_losses
    ),
    "figure6": Figure(
        single_parent.members, single_parent.measure_blocks, single_parent.draw_blocks
    ),
    "figure7": Figure(
        several_parents.members, several_parents.measure_heads, several_parents.draw_heads
    ),
    "figure8": Figure(single_parent.mlp_members, single_parent.measure_mlp, single_parent.draw_mlp),
    "figure9": Figure(forests.members, forests.measure, forests.draw),
    "theory": Figure(gradients.members, gradients.measure, gradients.draw, group="theory"),
    "ood": Figure(
        out_of_distribution.members,
        out_of_distribution.measure,
        out_of_distribution.draw,
        group="theory",
    ),
    "interventions": Figure(
        interventions.members, interventions.measure, interventions.draw, group="theory"
    ),
    "clamps": Figure(clamps.members, clamps.measure, clamps.draw, group="theory"),
    "mixtures": Figure(mixtures.members, mixtures.measure, mixtures.draw, group="tasks"),
    "in_context_graphs": Figure(
        in_context_graphs.members, in_context_graphs.measure, in_context_graphs.draw, group="tasks"
    ),
    "lags": Figure(lags.members, lags.measure, lags.draw, group="tasks"),
    "trees": Figure(trees.members, trees.measure, trees.draw, group="tasks"),
}

__all__ = ["FIGURES", "Figure"]
