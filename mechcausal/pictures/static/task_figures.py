"""Curves of several runs side by side, one panel for each run or group."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mechcausal.measures.figures import History, curves
from mechcausal.pictures.static.run_figures import plot_curves
from mechcausal.pictures.static.style import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_side_by_side(histories: Mapping[str, History], *names: str) -> "Figure":
    """Pictures over training: a column for each run, a row for each name.

    Args:
        histories: rows of figures, by the title of the run.
        names: of pictures in the list of figures, such as "weights"; see `curves`.
    """
    figure, axes = new_figure(len(names), len(histories))
    panels = iter(axes)
    for name in names:
        for title, history in histories.items():
            heading, keys = curves(history, name)
            plot_curves(next(panels), history, f"{title}: {heading}", keys)
    return figure
