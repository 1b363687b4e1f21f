"""A picture of a partial ancestral graph: tokens in a row, edges as arcs above them."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from probes.causal_discovery.pag import PAG

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A palette for colour-blind readers.
_COLOURS = {
    "-->": "#0072b2",
    "<->": "#d55e00",
    "o->": "#009e73",
    "o-o": "#9aa5b1",
    "---": "#cc79a7",
    "--o": "#e69f00",
}
_MEANING = {
    "-->": "--> a cause",
    "<->": "<-> hidden common cause",
    "o->": "o-> cause or hidden common cause",
    "o-o": "o-o open",
    "---": "--- selected together",
    "--o": "--o cause or selected together",
}
_INCHES_PER_TOKEN, _INCHES_PER_LETTER, _INCHES_PER_MEANING = 0.42, 0.1, 2.8
_WIDEST = 60.0
_FAINTEST = 0.15
"""The opacity of an edge that no replicate has."""


def draw(
    pag: PAG,
    tokens: Mapping[int, str] | Sequence[str] | None = None,
    *,
    title: str = "",
    shares: Mapping[tuple[int, int], float] | None = None,
) -> "Figure":
    """Draw a PAG.

    Args:
        pag: the graph.
        tokens: text by token position, shown below the position.
        title: title above the picture.
        shares: for edges, as (start, end), the share of replicates that have them: arcs are the
            fainter the smaller it is, and labelled with it.

    Returns:
        A matplotlib figure, drawn without a display.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(pag.nodes)
    labels = [str(node) if tokens is None else f"{tokens[node]} {node}" for node in pag.nodes]
    width = min(max(4.5, _INCHES_PER_TOKEN * n + 1), _WIDEST)
    lines = wrap(title, int(width / _INCHES_PER_LETTER))
    letters = max(map(len, labels), default=0) + 2 * len(lines)
    height = max(2.6, 0.45 * width) + _INCHES_PER_LETTER * letters
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    column = {node: k for k, node in enumerate(pag.nodes)}
    drawn: dict[str, None] = {}
    for edge in pag.edges():
        kind = "--o" if edge.marks == "o--" else edge.marks
        drawn[kind] = None
        share = 1.0 if shares is None else shares.get((edge.start, edge.end), 1.0)
        ends = (column[edge.start], column[edge.end])
        _arc(axes, *ends, edge.marks, _COLOURS[kind], opacity=max(_FAINTEST, share))
        if shares is not None:
            middle, top = sum(ends) / 2, abs(ends[0] - ends[1]) / 2
            place: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": "x-small"}
            axes.text(middle, top, f"{share:.0%}", color=_COLOURS[kind], **place)
    axes.scatter(range(n), [0] * n, s=16, color="black", zorder=3)
    axes.set_xticks(range(n), [_plain(label) for label in labels], rotation=90)
    axes.set_yticks([])
    axes.set_xlim(-0.7, max(n - 0.3, 0.7))
    axes.set_title("\n".join(map(_plain, lines)), fontsize="medium")
    spans = [abs(column[e.start] - column[e.end]) for e in pag.edges()]
    axes.set_ylim(-0.04 * max(spans, default=1), 0.56 * max(spans, default=1) + 0.05)
    axes.spines[["left", "right", "top", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    _legend(figure, list(drawn))
    return figure


def save_picture(
    pag: PAG,
    file: str | Path,
    tokens: Mapping[int, str] | Sequence[str] | None = None,
    *,
    title: str = "",
    shares: Mapping[tuple[int, int], float] | None = None,
) -> None:
    """Draw a PAG to a file, in the format of its suffix (.png, .svg, .pdf); see `draw`.

    Raises:
        OSError: the file cannot be written.
        ValueError: a suffix that matplotlib does not know.
    """
    figure = draw(pag, tokens, title=title, shares=shares)
    with warnings.catch_warnings():
        # matplotlib warns about characters that the font lacks, and draws a box.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(file, dpi=150)


def _arc(axes: "Axes", start: int, end: int, marks: str, colour: str, *, opacity: float) -> None:
    """Draw a half circle with a mark at each end."""
    from math import cos, pi, sin

    middle, radius = (start + end) / 2, abs(end - start) / 2
    # Marks sit a little above the ends of the arc, where they do not cover other arcs' marks.
    margin = min(0.5, 0.3 / radius)
    angles = [margin + (pi - 2 * margin) * k / 60 for k in range(61)]
    points = [(middle + radius * cos(a), radius * sin(a)) for a in angles]
    if start < end:
        points.reverse()
    line = [(start, 0.0), *points, (end, 0.0)]
    axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.2, zorder=1, alpha=opacity)
    ends: tuple[tuple[str, Any, Any], ...] = (
        (marks[0], points[1], line[0]),
        (marks[2], points[-2], line[-1]),
    )
    for mark, before, tip in ends:
        if mark == "o":
            near = points[0] if tip == line[0] else points[-1]
            axes.plot(
                *near, "o", markersize=5, markerfacecolor="white", markeredgecolor=colour, zorder=2
            )
        elif mark in "<>":
            style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 3}
            style["alpha"] = opacity
            axes.annotate("", xy=tip, xytext=before, arrowprops=style, zorder=2)


def _legend(figure: "Figure", kinds: list[str]) -> None:
    """Explain the kinds of edges above the arcs."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=_COLOURS[k], label=_MEANING[k]) for k in _COLOURS if k in kinds]
    if lines:
        columns = max(1, int(figure.get_figwidth() / _INCHES_PER_MEANING))
        options: dict[str, Any] = {"frameon": False, "fontsize": "small", "ncols": columns}
        figure.legend(handles=lines, loc="outside upper left", **options)


def _plain(text: str) -> str:
    """The text without line breaks, and with dollar signs escaped for matplotlib."""
    return "".join(c if c.isprintable() else "·" for c in text).replace("$", r"\$")
