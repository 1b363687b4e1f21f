"""The causal graph, with edges as wide as the model's attention; wrong edges are marked."""

from collections.abc import Iterable, Sequence

import networkx as nx
import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from mechcausal.pictures.interactive.style import WRONG_COLOUR, by_head, new_figure
from mechcausal.pictures.static.style import EDGE_COLOUR, REFERENCE_GREY
from mechcausal.records.run_data import RunData

WIDTHS = (0.6, 1.5, 2.6, 3.8, 5.2, 7.0)
"""Line widths in pixels, for equal intervals of attention; Plotly allows one width per trace."""
WRONG = 0.1
"""Minimum attention at which a non-edge is drawn."""
_BEND = 0.14  # relative to an edge's length; straight edges along a column would overlap
_NAMES = {"edge": "true edge", "wrong": f"attention elsewhere, from {WRONG:g}"}
_COLOURS = {"edge": EDGE_COLOUR, "wrong": WRONG_COLOUR}
_DASHES = {"edge": "solid", "wrong": "dot"}

Pair = tuple[int, int, int]


def causal_graph(run: RunData, step: int | None = None) -> go.Figure:
    """True edges as wide as layer-1 attention on them, and attention on other positions.

    Attention is the maximum over heads. Rows without parents are skipped. A circle attends most to
    one of its parents, a diamond to another position; a square has no parents.

    Args:
        run: a run on a causal graph.
        step: one of `run.steps`; the last when absent.

    Raises:
        RunDataError: the run has no matrices, or none at this step.
    """
    _, matrices = run.frame(step, needs="attention/layer0")
    attention = by_head(matrices["attention/layer0"]).max(0)
    true, wrong = _pairs(run)
    visible = [(row, key, node) for row, key, node in wrong if attention[row, key] >= WRONG]
    positions, bend = _layout(run)
    kinds = ((true, "edge", bend), (visible, "wrong", -bend))
    figure = new_figure("attention on the causal graph")
    for pairs, mark, side in kinds:
        levels = [level_of(float(attention[row, key])) for row, key, _ in pairs]
        for level, width in enumerate(WIDTHS):
            chosen = [p for p, of_pair in zip(pairs, levels, strict=True) if of_pair == level]
            xs, ys = _lines(chosen, positions, side)
            figure.add_scatter(
                x=xs,
                y=ys,
                mode="lines",
                line={
                    "width": width,
                    "shape": "spline",
                    "color": _COLOURS[mark],
                    "dash": _DASHES[mark],
                },
                opacity=0.9,
                hoverinfo="skip",
                showlegend=False,
                meta={"as": "lines", "kind": mark, "level": level},
            )
    for pairs, mark, side in kinds:
        figure.add_trace(_midpoints(pairs, positions, attention, mark, side))
        figure.add_trace(_legend(mark))
    figure.add_trace(_nodes(run, positions, attention))
    figure.update_xaxes(visible=False, range=[-1.15, 1.15])
    figure.update_yaxes(visible=False, range=[-1.2, 1.15], scaleanchor="x")
    figure.update_layout(
        margin={"l": 8, "r": 8, "t": 36, "b": 36},
        legend={"y": 0, "yanchor": "top"},
        meta={
            "from": "attention/layer0",
            "edges": [list(pair) for pair in true],
            "rows": rows_of(run),
            "places": positions.tolist(),
            "wrong": WRONG,
            "bend": bend,
            "levels": len(WIDTHS),
        },
    )
    return figure


def graph_panels(run: RunData, step: int | None = None) -> list[go.Figure]:
    """`causal_graph` as the only panel."""
    return [causal_graph(run, step)]


def level_of(share: float) -> int:
    """Index in `WIDTHS` of an attention."""
    return max(0, min(len(WIDTHS) - 1, int(share * len(WIDTHS))))


def _pairs(run: RunData) -> tuple[list[Pair], list[Pair]]:
    """(row, key, node) of all true edges, and of all other pairs.

    If the graph has query parents, the last row gets a separate node after the positions.
    """
    true: list[Pair] = []
    wrong: list[Pair] = []
    for row, node, n_keys in rows_of(run):
        for key in range(n_keys):
            (true if run.truth[row, key] else wrong).append((row, key, node))
    return true, wrong


def rows_of(run: RunData) -> list[Pair]:
    """Rows of attention with parents, each with its node and its number of keys.

    A position's attention to itself is excluded, because it cannot be drawn as a line.
    """
    graph = run.graph
    rows = [(child, child, child) for child in range(run.n_graph_rows) if graph.parents[child]]
    if graph.query_parents is not None:
        n = graph.n_positions
        rows.append((n - 1, n, n))
    return rows


def _layout(run: RunData) -> tuple[Float[np.ndarray, "node xy"], float]:
    """Coordinates of the nodes, and the bend of edges.

    Nodes are in columns by depth, or on a circle if the columns would be too short.
    """
    graph = run.graph
    digraph = graph.to_networkx()
    if graph.n_positions < 2 * len(graph.levels):
        start = nx.circular_layout(list(digraph))
        # Clockwise, starting at the top.
        layout = {node: np.array([y, x]) for node, (x, y) in start.items()}
        bend = 0.0
    else:
        bend = _BEND
        depths = dict(enumerate(graph.depths))
        last = max((depths[parent] for parent in graph.query_parents or ()), default=0) + 1
        nx.set_node_attributes(digraph, {n: depths.get(n, last) for n in digraph}, "depth")
        layout = nx.multipartite_layout(digraph, subset_key="depth", scale=1.0)
        coordinates = np.array(list(layout.values()))
        extent = np.maximum(np.abs(coordinates).max(0), 1e-9)
        # Each column runs from top to bottom; the layout fills [-1, 1] in both directions.
        layout = {node: xy / extent * [1, -1] for node, xy in layout.items()}
    # Rounded so that the page's script, which redraws the edges, uses the same coordinates.
    return np.array([layout[node] for node in digraph]).round(4), bend


def _lines(
    pairs: Iterable[Pair], positions: Float[np.ndarray, "node xy"], bend: float
) -> tuple[list[float | None], list[float | None]]:
    """Bent lines from key to node, separated by None."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for _, key, node in pairs:
        (x0, y0), (x1, y1) = start, end = positions[key].tolist(), positions[node].tolist()
        x, y = _middle(start, end, bend)
        xs += [x0, x, x1, None]
        ys += [y0, y, y1, None]
    return xs, ys


def _middle(start: Sequence[float], end: Sequence[float], bend: float) -> tuple[float, float]:
    (x0, y0), (x1, y1) = start, end
    return (x0 + x1) / 2 - bend * (y1 - y0), (y0 + y1) / 2 + bend * (x1 - x0)


def _midpoints(
    pairs: Sequence[Pair],
    positions: Float[np.ndarray, "node xy"],
    attention: Float[np.ndarray, "query key"],
    mark: str,
    bend: float,
) -> go.Scatter:
    """Markers at the middle of edges that carry the hover text; crosses on wrong edges."""
    middles = [
        _middle(positions[key].tolist(), positions[node].tolist(), bend) for _, key, node in pairs
    ]
    return go.Scatter(
        x=[x for x, _ in middles],
        y=[y for _, y in middles],
        customdata=[[row, key, float(attention[row, key])] for row, key, _ in pairs],
        mode="markers",
        showlegend=False,
        marker={
            "symbol": "circle" if mark == "edge" else "x-thin",
            "size": 7,
            "color": _COLOURS[mark],
            "opacity": 0 if mark == "edge" else 1,
            "line": {"width": 0 if mark == "edge" else 2, "color": WRONG_COLOUR},
        },
        hovertemplate="from %{customdata[1]} to %{customdata[0]}"
        "<br>attention %{customdata[2]:.4g}<extra></extra>",
        meta={"as": "middles", "kind": mark},
    )


def _legend(mark: str) -> go.Scatter:
    """Legend entry of a kind of edge, independent of the edges at this step."""
    colour = _COLOURS[mark]
    return go.Scatter(
        x=[None],
        y=[None],
        name=_NAMES[mark],
        mode="lines" if mark == "edge" else "lines+markers",
        line={"color": colour, "width": 3, "dash": _DASHES[mark]},
        marker={"symbol": "x-thin", "size": 7, "line": {"width": 2, "color": colour}},
        hoverinfo="skip",
    )


def _nodes(
    run: RunData, positions: Float[np.ndarray, "node xy"], attention: Float[np.ndarray, "query key"]
) -> go.Scatter:
    graph = run.graph
    names = [str(position) for position in range(graph.n_positions)]
    if graph.query_parents is not None:
        names.append("?")
    crowded, many = len(names) > 40, len(names) > 20
    return go.Scatter(
        x=positions[:, 0].tolist(),
        y=positions[:, 1].tolist(),
        mode="markers" if crowded else "markers+text",
        text=names,
        textposition="middle center",
        textfont={"color": "#ffffff", "size": 8 if many else 11},
        marker={
            "size": (4 if len(names) > 100 else 7) if crowded else 14 if many else 22,
            "color": "#4a5460",
            "line": {"color": REFERENCE_GREY, "width": 1},
            "symbol": [_symbol(run, node, attention) for node in range(len(names))],
        },
        hovertemplate="position %{text}<extra></extra>",
        showlegend=False,
        meta={"as": "nodes"},
    )


def _symbol(run: RunData, node: int, attention: Float[np.ndarray, "query key"]) -> str:
    """Square: no parents. Circle: attends most to a parent. Diamond: to another position."""
    n, row = run.graph.n_positions, node
    if node == n:
        row = n - 1
    elif node >= run.n_graph_rows or not run.graph.parents[node]:
        return "square"
    return "circle" if run.truth[row, int(attention[row, : row + 1].argmax())] else "diamond"
