"""Helpers of all interactive pictures: templates, colours, drawing matrices, joining figures.

Colours are safe for colour-blind readers, and no information is in colour only. The `meta` of a
trace says which matrix of the run it shows, so that a page's script can redraw it at another step.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int, Shaped
from plotly.subplots import make_subplots

from mechcausal.pictures.static.style import EDGE_COLOUR
from mechcausal.records.run_data import RunData

Panels = Callable[[RunData, int | None], list[go.Figure]]
"""Draws one step of a run as one or more pictures."""

WRONG_COLOUR = "#8f6fd6"
ATTENTION_SCALE = "Viridis"
_NEAR_ZERO = "rgba(140,146,156,0.13)"  # visible on light and dark pages
SIGNED_SCALE = (
    (0.0, "rgba(94,60,153,1)"),
    (0.3, "rgba(148,128,196,0.75)"),
    (0.5, _NEAR_ZERO),
    (0.7, "rgba(245,158,66,0.8)"),
    (1.0, "rgba(202,92,10,1)"),
)
INFORMATION_SCALE = (
    (0.0, _NEAR_ZERO),
    (0.4, "rgba(245,158,66,0.8)"),
    (1.0, "rgba(202,92,10,1)"),
)
MARK_COLOUR = "#00a08a"
MOST_HEADS = 8  # for more heads, draw only their maximum attention or the sum of their gradients
LARGE = 60  # for more positions, marks would hide the cells
COLORBAR = {
    "orientation": "h",
    "thickness": 8,
    "len": 0.8,
    "y": -0.16,
    "yanchor": "top",
    "outlinewidth": 0,
    "tickfont": {"size": 10},
}

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


def template(*, dark: bool = False) -> go.layout.Template:
    """Fonts, grids and line colours for a light or dark page, with transparent backgrounds."""
    ink, grid = ("#d7dce2", "#343b45") if dark else ("#2b3138", "#e3e7ec")
    lines = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#4aa3df")
    on_dark = ("#5ab4f0", "#ff9345", "#2fd0a5", "#e9a3c9", "#e6c84a", "#a9c7ff")
    axis = {
        "gridcolor": grid,
        "linecolor": grid,
        "zerolinecolor": grid,
        "ticks": "",
        "title": {"standoff": 6, "font": {"size": 12}},
        "tickfont": {"size": 11},
        "automargin": True,
    }
    layout = {
        "font": {"family": FONT, "size": 12, "color": ink},
        "title": {"font": {"size": 14}, "x": 0.5, "xanchor": "center", "y": 0.97, "yanchor": "top"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": list(on_dark if dark else lines),
        "xaxis": axis,
        "yaxis": axis,
        "margin": {"l": 48, "r": 16, "t": 36, "b": 40},
        "hoverlabel": {"font": {"family": FONT}},
        "legend": {"orientation": "h", "y": -0.2, "x": 0, "font": {"size": 11}},
    }
    return go.layout.Template(layout=layout)


def new_figure(title: str, **layout: Any) -> go.Figure:
    """An empty figure with the common template."""
    # Given at once, as plotly otherwise copies its own large template first.
    figure = go.Figure(layout={"template": _shared_template()})
    figure.update_layout(title_text=title, **layout)
    return figure


@cache
def _shared_template() -> go.layout.Template:
    """The light template, which every figure copies."""
    return template()


def by_head(matrix: Float[np.ndarray, "*any query key"]) -> Float[np.ndarray, "head query key"]:
    """A matrix of layer 1 with a head axis, which is added if it is missing."""
    return matrix[None] if matrix.ndim == 2 else matrix


def head_choices(n_heads: int, name: str) -> list[int | str]:
    """The heads to draw; for more than `MOST_HEADS`, "max" for attention or "sum" for gradients."""
    if n_heads > MOST_HEADS:
        return ["max" if name.startswith("attention") else "sum"]
    return list(range(n_heads))


def reduced(
    values: Float[np.ndarray, "head query key"], head: int | str
) -> Float[np.ndarray, "query key"]:
    """One head, or the maximum or sum over heads."""
    if head == "max":
        return np.asarray(values.max(0))
    return np.asarray(values.sum(0) if head == "sum" else values[int(head)])


def head_label(head: int | str, n_choices: int) -> str:
    """Suffix of a title that names the head; empty for a single head."""
    names = {"max": ", largest over heads", "sum": ", sum over heads"}
    if isinstance(head, str):
        return names[head]
    return f", head {head}" if n_choices > 1 else ""


def causal(
    matrix: Float[np.ndarray, "query key"], diagonal: int = 0
) -> Float[np.ndarray, "query key"]:
    """The matrix with NaN (not drawn) for keys after the query."""
    visible = np.tril(np.ones(matrix.shape, dtype=bool), diagonal)
    return np.where(visible, matrix, np.nan).astype(np.float32)


def limit_of(matrix: Shaped[np.ndarray, "..."]) -> float:
    """The largest finite absolute value; 1 if all values are 0."""
    finite = np.abs(matrix[np.isfinite(matrix)])
    return float(finite.max(initial=0.0)) or 1.0


def draw_matrix(
    matrix: Float[np.ndarray, "query key"],
    title: str,
    *,
    signed: bool = False,
    high: float | None = None,
    unit: str = "",
    scale: Any = None,
    meta: dict[str, Any] | None = None,
) -> go.Figure:
    """Draw a matrix over positions, with queries as rows and keys as columns; NaN is blank.

    Args:
        matrix: values to draw.
        title: title of the picture.
        signed: make colours symmetric about 0.
        high: value of the last colour; the largest entry when absent.
        unit: unit shown on hover.
        scale: colour scale; that of attention when absent.
        meta: which matrix of the run this is, for the page's script.
    """
    limit = limit_of(matrix) if high is None else high
    length = len(matrix)
    figure = new_figure(title)
    figure.add_heatmap(
        z=matrix,
        zmin=-limit if signed else 0.0,
        zmax=limit,
        colorscale=scale or (SIGNED_SCALE if signed else ATTENTION_SCALE),
        xgap=1 if length <= 40 else 0,
        ygap=1 if length <= 40 else 0,
        hoverongaps=False,
        hovertemplate=f"query %{{y}}, key %{{x}}<br>{unit} %{{z:.4g}}<extra></extra>",
        colorbar=COLORBAR | {"nticks": 5, "exponentformat": "power"},
        meta=meta,
    )
    square_axes(figure, length)
    figure.update_layout(margin={"b": 78})
    return figure


def square_axes(figure: go.Figure, length: int) -> None:
    """Set square axes of key and query positions, with the first query on top."""
    figure.update_xaxes(
        title="key position",
        range=[-0.5, length - 0.5],
        constrain="domain",
        showgrid=False,
        zeroline=False,
        tickformat="d",
        nticks=8,
    )
    figure.update_yaxes(
        title="query position",
        range=[length - 0.5, -0.5],
        constrain="domain",
        scaleanchor="x",
        showgrid=False,
        zeroline=False,
        tickformat="d",
        nticks=8,
    )


def mark_parents(
    figure: go.Figure, run: RunData, colour: str = EDGE_COLOUR, n_rows: int | None = None
) -> None:
    """Put an open square on each true edge, unless the matrix is too large."""
    children, parents = np.nonzero(run.truth[:n_rows])
    length = run.graph.sequence_length
    if length > LARGE or not len(children):
        return
    size, line = float(np.clip(190 / length, 5, 18)), 2 if length <= 24 else 1
    add_squares(figure, children, parents, "parent", size=size, colour=colour, line=line)


def add_squares(
    figure: go.Figure,
    rows: Int[np.ndarray, "square"],
    columns: Int[np.ndarray, "square"],
    name: str,
    *,
    size: float,
    colour: str = EDGE_COLOUR,
    line: int = 2,
) -> None:
    """Put open squares on entries of a matrix; `size` and `line` are in pixels."""
    figure.add_scatter(
        x=columns.tolist(),
        y=rows.tolist(),
        mode="markers",
        marker={
            "symbol": "square-open",
            "size": size,
            "color": colour,
            "line": {"width": line},
        },
        hoverinfo="skip",
        showlegend=False,
        name=name,
    )


def side_by_side(figures: Sequence[go.Figure], width: int = 380) -> go.Figure:
    """Join single-axes figures in a row, each `width` pixels wide, with one legend."""
    row = make_subplots(1, len(figures), subplot_titles=[f.layout.title.text for f in figures])
    row.update_layout(template=template(), height=420, width=max(460, width * len(figures)))
    named: set[str] = set()
    for column, figure in enumerate(figures, 1):
        name = "" if column == 1 else str(column)
        target = row.layout[f"xaxis{name}"]
        left, right = target.domain
        for trace in figure.data:
            if trace.type == "heatmap" and trace.showscale is not False:
                trace = go.Heatmap(trace)
                trace.colorbar.update(
                    x=(left + right) / 2, xanchor="center", len=0.8 * (right - left)
                )
            row.add_trace(trace, row=1, col=column)
            if trace.name in named:
                row.data[-1].showlegend = False
            named |= {trace.name} - {None}
        for axis, other in (("xaxis", f"y{name}"), ("yaxis", f"x{name}")):
            settings = figure.layout[axis].to_plotly_json()
            if "scaleanchor" in settings:
                settings["scaleanchor"] = f"x{name}"
            row.layout[f"{axis}{name}"].update(settings | {"anchor": other})
    row.update_layout(margin={"b": 90, "t": 60}, meta=figures[0].layout.meta)
    return row


def in_a_row(panels: Panels, width: int = 380) -> Callable[..., go.Figure]:
    """A function that draws the panels of `panels` side by side, with the same arguments."""

    def draw(run: RunData, step: int | None = None) -> go.Figure:
        return side_by_side(panels(run, step), width)

    draw.__doc__ = panels.__doc__
    return draw
