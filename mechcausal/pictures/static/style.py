"""Colours, margins and axes of all static pictures.

Colours are safe for colour-blind readers. Drawing needs only matplotlib and no display.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from mechcausal.measures.figures import HEAD_SCORES as HEAD_SCORES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ATTENTION_COLOURS = "viridis"
GRADIENT_COLOURS = "PuOr_r"
EDGE_COLOUR, OTHER_COLOUR, REFERENCE_COLOUR = "#d55e00", "#9aa5b1", "#0072b2"
REFERENCE_GREY = "#8a94a0"
REFERENCE_DASHES = {
    **{"loss/bayes": "dash", "loss/construction": "dashdot", "loss/chance": "dash"},
    **{"loss/unigram": "dash", "loss/bigram": "dashdot", "loss/trigram": "dot"},
    "lags/posterior": "dash",
    "parents/oracle_top1": "dash",
}
"""Line styles of constants to compare with, as Plotly names them."""
CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def new_figure(n_rows: int, n_columns: int) -> "tuple[Figure, list[Axes]]":
    """A figure and its axes, row by row, with room for titles and labels."""
    # Without pyplot, drawing has no global state and needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (4.1 * n_columns, 3.6 * n_rows + 0.5)
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    # Fixed margins: matplotlib's layout engines draw everything at least twice.
    width, height = size
    figure.subplots_adjust(
        left=0.7 / width,
        right=1 - 0.2 / width,
        bottom=0.55 / height,
        top=1 - 0.75 / height,
        wspace=0.36,
        hspace=0.36,
    )
    return figure, axes


def label_positions(axis: "Axes") -> None:
    """Name the axes of a matrix over positions, with ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set(xlabel="key position", ylabel="query position")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))


def colours(n: int) -> list[str]:
    """n colours: up to four from `CYCLE`, safe for colour-blind readers, more from a scale."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if n <= len(CYCLE):
        return list(CYCLE[:n])
    return [to_hex(colour) for colour in colormaps[ATTENTION_COLOURS](np.linspace(0, 0.95, n))]


def circle(axis: "Axes", cells: Sequence[tuple[int, int]], length: int, colour: str) -> None:
    """Circle the cells (key, query) of a matrix over `length` positions, unless it is too large."""
    if cells and length <= 60:  # circles would hide the cells
        x, y = zip(*cells, strict=True)
        size = (180 / length) ** 2
        axis.scatter(x, y, s=size, facecolors="none", edgecolors=colour, lw=1.5)


def write_values(
    axis: "Axes",
    values: Float[np.ndarray, "row column"],
    text: Callable[[float], str],
    *,
    bright: float,
    missing: str = "",
) -> None:
    """Write the values into the cells of a heatmap: black from `bright` on, else white."""
    for (row, column), value in np.ndenumerate(values):
        label, colour = missing, "grey"
        if np.isfinite(value):
            label, colour = text(value), "black" if value > bright else "white"
        axis.text(column, row, label, ha="center", va="center", color=colour, fontsize=7)
