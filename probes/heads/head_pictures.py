"""Pictures of head scores: a figure for papers, a table for notebooks."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_NUMBERS = 200
"""Panels with more heads show colours alone."""


def draw_panels(
    panels: Mapping[str, Tensor],
    layers: Sequence[int],
    marked: Mapping[str, Sequence[tuple[int, int]]],
    title: str,
) -> "Figure":
    """Scores by layer (rows) and head (columns), one panel per score, drawn without a display.

    Args:
        panels: the values `[layer head]` by name; colours run from 0 to 1.
        layers: the layer number of each row.
        marked: the heads, as (layer, head), that get a frame in a panel.
        title: title above the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    n_rows, n_heads = next(iter(panels.values())).shape
    size = (1.2 + len(panels) * max(2.4, 0.45 * n_heads), max(2.4, 1.4 + 0.4 * n_rows))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        grid = values.float().cpu().numpy()
        image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axis.set(title=name.replace("_", " "), xlabel="head", ylabel="layer")
        axis.set_xticks(range(n_heads))
        axis.set_yticks(range(n_rows), [str(layer) for layer in layers])
        for layer, head in marked.get(name, ()):
            corner = (head - 0.5, layers.index(layer) - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#d55e00", linewidth=2))
        if grid.size <= _MOST_NUMBERS:
            for row in range(n_rows):
                for head in range(n_heads):
                    value = grid[row, head]
                    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
                    colour = "black" if value > 0.6 else "white"
                    axis.text(head, row, f"{value:.2f}", color=colour, **style)
    figure.colorbar(image, ax=list(axes), shrink=0.75, label="attention")
    figure.suptitle(title, fontsize=11)
    return figure


def html_table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain HTML table; every text is escaped."""
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return (
        f"<table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
