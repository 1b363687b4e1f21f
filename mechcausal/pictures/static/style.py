"""Colours, margins and axes of all static pictures.

Colours are safe for colour-blind readers. Drawing needs only matplotlib and no display.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ATTENTION_COLOURS = "viridis"
GRADIENT_COLOURS = "PuOr_r"
EDGE_COLOUR, OTHER_COLOUR, REFERENCE_COLOUR = "#d55e00", "#9aa5b1", "#0072b2"
CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
HEAD_SCORES = ("induction", "previous_token", "duplicate_token")
"""The scores of a head that pictures show."""


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
