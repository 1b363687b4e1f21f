"""Figures of generalisation: gaps by family of matrices, and errors against the length T."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mechcausal.measures.generalisation import GeneralisationTable, OODRow
from mechcausal.pictures.static.style import (
    EDGE_COLOUR,
    OTHER_COLOUR,
    REFERENCE_COLOUR,
    colours,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_ood(rows: Sequence[OODRow]) -> "Figure":
    """Bars of the loss above Bayes (left) and above the oracle (right), one family per line.

    Error bars are one standard error of the paired difference. The right panel marks the Bayes
    predictors under the training prior and, for Dirichlet families, under the family.
    """
    figure, axes = new_figure(1, 2)
    # The height fits one line per family, the left margin the names.
    figure.set_size_inches(10.5, 1.8 + 0.32 * len(rows))
    height = figure.get_size_inches()[1]
    figure.subplots_adjust(left=0.17, wspace=0.06, bottom=0.95 / height, top=1 - 0.75 / height)
    lines = np.arange(len(rows))[::-1]
    gaps = (
        (axes[0], "gap_to_bayes", REFERENCE_COLOUR, "loss above Bayes under the training prior"),
        (axes[1], "gap_to_oracle", OTHER_COLOUR, "loss above the oracle, which knows the matrix"),
    )
    for axis, kind, colour, title in gaps:
        values = [getattr(row, kind) for row in rows]
        spread = [getattr(row, f"{kind}_stderr") for row in rows]
        axis.barh(lines, values, xerr=spread, color=colour, height=0.7, capsize=2, label="model")
        axis.axvline(0, color="black", lw=0.8)
        axis.set(xlabel="nats", title=title)
        axis.grid(alpha=0.25, axis="x")
        axis.set_axisbelow(True)
    axes[0].set_yticks(lines, [row.family for row in rows])
    axes[1].set_yticks(lines, [""] * len(rows))
    bayes = [row.bayes_loss - row.oracle_loss for row in rows]
    axes[1].plot(bayes, lines, "D", color=REFERENCE_COLOUR, ms=5, label="Bayes, training prior")
    own = [
        (row.own_bayes_loss - row.oracle_loss, line)
        for row, line in zip(rows, lines, strict=True)
        if row.own_bayes_loss is not None
    ]
    if own:
        axes[1].plot(
            *zip(*own, strict=True), "|", color=EDGE_COLOUR, ms=15, mew=2.5, label="Bayes, family"
        )
    _legend_below(figure, axes[1], n_columns=3)
    figure.suptitle("outside of the training prior", fontsize=12)
    return figure


def draw_generalisation(table: GeneralisationTable) -> "Figure":
    """Sup error against T on logarithmic axes: median (left) and 90 % quantile (right).

    One colour per gamma. Solid: the trained model transplanted to T. Dashed: the ideal model.
    Dotted (left panel): the bias of the trained A2 for T to infinity.
    """
    gammas = sorted({row.gamma for row in table.rows})
    colour_of = dict(zip(gammas, colours(len(gammas)), strict=True))
    figure, axes = new_figure(1, 2)
    figure.set_size_inches(10.5, 5.2)
    figure.subplots_adjust(bottom=0.26, top=0.87, wspace=0.18)
    errors = [getattr(row, kind) for row in table.rows for kind in _ERRORS]
    limits = 0.8 * min(error for error in errors if error > 0), 1.2 * max(errors)
    panels = (
        (axes[0], {"error_median": "o-", "ideal_median": "s--", "floor_median": ":"}, "median"),
        (axes[1], {"error_q90": "o-", "ideal_q90": "s--"}, "90 % quantile"),
    )
    for axis, curves, title in panels:
        for gamma, colour in colour_of.items():
            rows = sorted(
                (row for row in table.rows if row.gamma == gamma), key=lambda row: row.length
            )
            lengths = [row.length for row in rows]
            for kind, style in curves.items():
                values = [getattr(row, kind) for row in rows]
                axis.plot(lengths, values, style, color=colour, lw=1.5, ms=4)
        axis.set(xscale="log", yscale="log", title=title)
        axis.set_xlabel("sequence length T")
        _label_ticks(axis, sorted({row.length for row in table.rows}))
        axis.set_ylim(*limits)  # after the ticks, because setting ticks widens the limits
        axis.grid(alpha=0.25, which="both")
    axes[0].set_ylabel("sup error of the predicted row")
    for gamma, colour in colour_of.items():
        trained, ideal = table.fits[gamma].slope, table.ideal_fits[gamma].slope
        label = f"γ = {gamma:g}: $T^{{{trained:.2f}}}$, ideal $T^{{{ideal:.2f}}}$"
        axes[0].plot([], [], color=colour, label=label)
    for style, label in (("o-", "trained"), ("s--", "ideal, β → ∞"), (":", "bias of fixed β")):
        axes[1].plot([], [], style, color="black", lw=1.2, ms=4, label=label)
    for axis in axes:
        _legend_below(figure, axis, n_columns=1)
    figure.suptitle("error on matrices with entries of at least γ/S", fontsize=12)
    return figure


_ERRORS = ("error_median", "error_q90", "floor_median", "ideal_median", "ideal_q90")


def _legend_below(figure: "Figure", axis: "Axes", *, n_columns: int) -> None:
    """Put a legend below the panel, where it hides no data."""
    centre = axis.get_position().x0 + axis.get_position().width / 2
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        frameon=False,
        fontsize=8,
        ncols=n_columns,
        loc="lower center",
        bbox_to_anchor=(centre, 0.005),
    )


def _label_ticks(axis: "Axes", lengths: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator, ScalarFormatter

    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
    axis.yaxis.set_minor_locator(NullLocator())
