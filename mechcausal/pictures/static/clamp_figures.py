"""Figures of clamped training: when the induction head forms."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mechcausal.pictures.static.style import CYCLE, REFERENCE_GREY, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMED = 0.5
"""The score at which the head counts as formed."""

Curve = Sequence[tuple[int, float]]


def draw_formation(curves: Mapping[str, Mapping[str, Sequence[Curve]]]) -> "Figure":
    """The induction score against the step, a line for each seed, a colour for each condition.

    Args:
        curves: by graph and condition, for every seed pairs (step, score); step 0 is left out of
            the logarithmic axis.
    """
    figure, axes = new_figure(1, len(curves))
    for axis, (graph, by_condition) in zip(axes, curves.items(), strict=True):
        for (condition, seeds), colour in zip(by_condition.items(), CYCLE, strict=False):
            for number, curve in enumerate(seeds):
                steps, scores = zip(*[pair for pair in curve if pair[0] > 0], strict=True)
                label = f"layer 1 {condition}" if number == 0 else None
                axis.plot(steps, scores, color=colour, lw=1.2, alpha=0.8, label=label)
        axis.axhline(FORMED, color=REFERENCE_GREY, lw=0.8, ls="--")
        axis.set(xscale="log", xlabel="step", title=graph, ylim=(-0.04, 1.0))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("induction score (0: chance)")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle("The induction head forms once layer 1 shows the graph", fontsize=12)
    return figure
