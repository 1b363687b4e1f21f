"""The causal graph as the model sees it: edges as wide as its attention, wrong ones marked."""

from collections.abc import Iterable, Sequence

import networkx as nx
import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from mechcausal.pictures.interactive.style import REFERENCE_GREY, WRONG_COLOUR, by_head, new_figure
from mechcausal.pictures.static.style import EDGE_COLOUR
from mechcausal.records.run_data import RunData, RunDataError

WIDTHS = (0.6, 1.5, 2.6, 3.8, 5.2, 7.0)
"""Line widths, in pixels, of attention from 0 to 1 in equal parts (Plotly: one a trace)."""
WRONG = 0.1
"""Attention to a position that is no parent is drawn from here on."""
_BEND = 0.14  # of an edge's length; without it edges along a column would cover each other
_NAMES = {"edge": "true edge", "wrong": f"attention elsewhere, from {WRONG:g}"}
_COLOURS = {"edge": EDGE_COLOUR, "wrong": WRONG_COLOUR}
_DASHES = {"edge": "solid", "wrong": "dot"}

Pair = tuple[int, int, int]


def causal_graph(run: RunData, step: int | None = None) -> go.Figure:
    """The true edges, as wide as layer-1 attention on them, and attention that went elsewhere.

    Of several heads the largest attention counts. Rows without parents are left out: there is
    nothing for them to find. A round node attends most to a parent of its own, a diamond to another
    position; a square has nothing to find.

    Args:
        run: a run on a causal graph.
        step: one of `run.steps`; the last when absent.

    Raises:
        RunDataError: no matrices were kept, or none at that step.
    """
    found, matrices = run.frame(step)
    if "attention/layer0" not in matrices:
        raise RunDataError(f"{run.folder or run.name}: step {found} has no attention")
    attention = by_head(matrices, "attention/layer0").max(0)
    true, wrong = _pairs(run)
    seen = [(row, key, node) for row, key, node in wrong if attention[row, key] >= WRONG]
    places, bend = _layout(run)
    kinds = ((true, "edge", bend), (seen, "wrong", -bend))
    figure = new_figure("attention on the causal graph")
    for pairs, mark, side in kinds:
        levels = [level_of(float(attention[row, key])) for row, key, _ in pairs]
        for level, width in enumerate(WIDTHS):
            chosen = [p for p, found in zip(pairs, levels, strict=True) if found == level]
            xs, ys = _lines(chosen, places, side)
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
        figure.add_trace(_midpoints(pairs, places, attention, mark, side))
        figure.add_trace(_legend(mark))
    figure.add_trace(_nodes(run, places, attention))
    figure.update_xaxes(visible=False, range=[-1.15, 1.15])
    figure.update_yaxes(visible=False, range=[-1.2, 1.15], scaleanchor="x")
    figure.update_layout(
        margin={"l": 8, "r": 8, "t": 36, "b": 36},
        legend={"y": 0, "yanchor": "top"},
        meta={
            "from": "attention/layer0",
            "edges": [list(pair) for pair in true],
            "rows": rows_of(run),
            "places": places.tolist(),
            "wrong": WRONG,
            "bend": bend,
            "levels": len(WIDTHS),
        },
    )
    return figure


def level_of(share: float) -> int:
    """Which of the widths an attention gets."""
    return max(0, min(len(WIDTHS) - 1, int(share * len(WIDTHS))))


def _pairs(run: RunData) -> tuple[list[Pair], list[Pair]]:
    """Row and key of attention, with the node it is drawn at: true edges, and all others.

    The last row of a graph that names the query's parents is drawn at a node of its own, after the
    positions.
    """
    true: list[Pair] = []
    wrong: list[Pair] = []
    for row, node, n_keys in rows_of(run):
        for key in range(n_keys):
            (true if run.truth[row, key] else wrong).append((row, key, node))
    return true, wrong


def rows_of(run: RunData) -> list[Pair]:
    """Rows of attention that look for parents, the node each is drawn at, and how many keys.

    A position's attention to itself would be a loop, which has no line.
    """
    graph = run.graph
    rows = [(child, child, child) for child in range(run.n_graph_rows) if graph.parents[child]]
    if graph.query_parents is not None:
        n = graph.n_positions
        rows.append((n - 1, n, n))
    return rows


def _layout(run: RunData) -> tuple[Float[np.ndarray, "node xy"], float]:
    """Where the nodes lie, and how far edges bend.

    In columns by depth, or, where these would be too thin, on a circle.
    """
    graph = run.graph
    digraph = graph.to_networkx()
    if graph.n_positions < 2 * len(graph.levels):
        start = nx.circular_layout(list(digraph))
        # Clockwise from the top.
        layout = {node: np.array([y, x]) for node, (x, y) in start.items()}
        bend = 0.0
    else:
        bend = _BEND
        depths = dict(enumerate(graph.depths))
        last = max((depths[parent] for parent in graph.query_parents or ()), default=0) + 1
        nx.set_node_attributes(digraph, {n: depths.get(n, last) for n in digraph}, "depth")
        layout = nx.multipartite_layout(digraph, subset_key="depth", scale=1.0)
        found = np.array(list(layout.values()))
        spread = np.maximum(np.abs(found).max(0), 1e-9)
        # Each column from top to bottom, over the whole width and height.
        layout = {node: place / spread * [1, -1] for node, place in layout.items()}
    # Rounded, so that a page that redraws the edges puts them exactly where these are.
    return np.array([layout[node] for node in digraph]).round(4), bend


def _lines(
    pairs: Iterable[Pair], places: Float[np.ndarray, "node xy"], bend: float
) -> tuple[list[float | None], list[float | None]]:
    """Bent lines from key to node, with a gap after each."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for _, key, node in pairs:
        (x0, y0), (x1, y1) = start, end = places[key].tolist(), places[node].tolist()
        x, y = _middle(start, end, bend)
        xs += [x0, x, x1, None]
        ys += [y0, y, y1, None]
    return xs, ys


def _middle(start: Sequence[float], end: Sequence[float], bend: float) -> tuple[float, float]:
    (x0, y0), (x1, y1) = start, end
    return (x0 + x1) / 2 - bend * (y1 - y0), (y0 + y1) / 2 + bend * (x1 - x0)


def _midpoints(
    pairs: Sequence[Pair],
    places: Float[np.ndarray, "node xy"],
    attention: Float[np.ndarray, "query key"],
    mark: str,
    bend: float,
) -> go.Scatter:
    """What hovering over an edge tells; crosses on wrong ones."""
    middles = [_middle(places[key].tolist(), places[node].tolist(), bend) for _, key, node in pairs]
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
    """What a kind of edge is called, whether or not there is one at this step."""
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
    run: RunData, places: Float[np.ndarray, "node xy"], attention: Float[np.ndarray, "query key"]
) -> go.Scatter:
    graph = run.graph
    names = [str(position) for position in range(graph.n_positions)]
    if graph.query_parents is not None:
        names.append("?")
    crowded, many = len(names) > 40, len(names) > 20
    return go.Scatter(
        x=places[:, 0].tolist(),
        y=places[:, 1].tolist(),
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
    """Square: nothing to find. Circle: attends most to a parent. Diamond: to another position."""
    n, row = run.graph.n_positions, node
    if node == n:
        row = n - 1
    elif node >= run.n_graph_rows or not run.graph.parents[node]:
        return "square"
    return "circle" if run.truth[row, int(attention[row, : row + 1].argmax())] else "diamond"
