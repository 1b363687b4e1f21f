"""The paper's figures, drawn for our models: blocks, heads, loss curves, many graphs.

Source: Nichani, Damian, Lee, ICML 2024 (arXiv 2402.14735), figures 2, 5 to 7 and 9.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.measures.blocks import solution_blocks
from mechcausal.measures.figures import History
from mechcausal.measures.matching import match_heads
from mechcausal.measures.plateaus import Plateau, curve
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.pictures.static.style import (
    ATTENTION_COLOURS,
    EDGE_COLOUR,
    OTHER_COLOUR,
    REFERENCE_COLOUR,
    circle,
    colours,
    label_positions,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PERCENTILES = (15.0, 100.0)
"""Percentiles of a matrix that limit the colours of its heatmap, as in the paper's code."""
# In inches: gaps between blocks, width of labels, sides of A1 and of later matrices, height of W.
_STREAM_GAP, _GROUP_GAP, _LABELS = 0.04, 0.14, 0.75
_FIRST_SIDE, _SIDE, _READOUT_HEIGHT = 3.8, 6.4, 1.1
_OUTPUT = "output"  # row label of the transposed W

Streams = Mapping[str, slice]


@dataclass(frozen=True)
class GraphDistribution:
    """Attention on parents over the paper's random forests (figure 9).

    Attributes:
        mean: mean over graphs of a graph's mean attention.
        sd: standard deviation over graphs.
        lowest: smallest mean attention of a graph.
        highest: largest mean attention of a graph.
        n_above_half: edges with attention above 0.5.
        n_edges: number of edges of all graphs.
    """

    mean: float = 0.8366
    sd: float = 0.0540
    lowest: float = 0.675
    highest: float = 0.927
    n_above_half: int = 176
    n_edges: int = 182


PAPER = GraphDistribution()
"""The values of the paper's figure 9."""


def draw_blocks(model: DisentangledTransformer, graph: CausalGraph | None = None) -> "Figure":
    """The paper's block heatmaps: A of every head, with queries as rows, and W transposed.

    Gaps separate the blocks, which are labelled with their streams. A matrix's colours range from
    its 15th percentile to its largest entry (`PERCENTILES`). If a graph is given, the blocks of the
    paper's solution are framed.

    Raises:
        ValueError: a graph is given, but the model does not have two layers.
    """
    framed = () if graph is None else solution_blocks(model, graph)
    names = [f"A{layer + 1}.{h}" for layer, n in enumerate(model.heads) for h in range(n)]
    sides = [_FIRST_SIDE if name.startswith("A1.") else _SIDE for name in names]
    width = sum(sides) + _LABELS * len(sides) + 0.2
    height = 0.4 + _LABELS + max(sides) + _LABELS + _READOUT_HEIGHT + 0.2
    figure, (unused,) = new_figure(1, 1)
    unused.remove()  # `_draw_matrix` adds its own axes
    figure.set_size_inches(width, height)
    left, top = _LABELS, height - 0.4 - _LABELS
    for name, side in zip(names, sides, strict=True):
        layer, head = int(name[1:].split(".")[0]) - 1, int(name.split(".")[1])
        streams, values = model.streams(layer), _numbers(model.A(layer)[head])
        box = (left, top, side, side)
        _draw_matrix(figure, box, values, streams, streams, name=name, framed=framed)
        left += side + _LABELS
    box = (_LABELS, 0.2 + _READOUT_HEIGHT, width - 0.2 - _LABELS, _READOUT_HEIGHT)
    rows, columns = {_OUTPUT: slice(0, model.vocab_size)}, model.streams(len(model.heads))
    _draw_matrix(figure, box, _numbers(model.W).T, rows, columns, name="W", framed=framed)
    title = "weights by block: rows are queries, columns keys (T: token, P: position)"
    figure.suptitle(title, y=1 - 0.2 / height, fontsize=12)
    return figure


def draw_heads(
    attention: Float[Tensor, "head query key"], graph: CausalGraph, title: str
) -> "Figure":
    """Layer-1 attention, one panel per head, beside the true graph.

    Circles mark the parents that `match_heads` assigns to a head, in this head's colour. The true
    graph has the same colours, and grey for parents without a head. If the graph has query parents,
    the last row is framed, because it serves the query.

    Raises:
        ValueError: the patterns do not have the graph's sequence length.
    """
    from matplotlib.colors import to_rgb

    matching, last = match_heads(attention, graph), graph.sequence_length - 1
    rows = dict(matching.rows)
    parents = dict(enumerate(graph.parents))
    if matching.query is not None:
        rows[last], parents[last] = matching.query, graph.query_parents or ()
    assigned = [
        (parent, child, head)
        for child, heads in rows.items()
        for parent, head in zip(parents[child], heads, strict=True)
    ]
    palette = colours(len(attention))
    figure, axes = new_figure(1, len(attention) + 1)
    for head, (axis, pattern) in enumerate(zip(axes, attention, strict=False)):
        axis.imshow(_numbers(pattern), cmap="Greys", vmin=0, vmax=1)
        cells = [(parent, child) for parent, child, by in assigned if by == head]
        circle(axis, cells, graph.sequence_length, palette[head])
        name = f"head {head}" if len(attention) > 1 else "attention"
        axis.set_title(f"{name}: {len(cells)} parents circled", color=palette[head])
    truth = np.ones((last + 1, last + 1, 3))
    for parent, child, by in assigned:
        truth[child, parent] = to_rgb(OTHER_COLOUR if by is None else palette[by])
    axes[-1].imshow(truth)
    axes[-1].set_title("true graph, coloured by matched head")
    for axis in axes:
        label_positions(axis)
        if graph.query_parents is not None:
            _frame_query(axis, graph.sequence_length)
    figure.suptitle(title, fontsize=12)
    return figure


def draw_loss(
    histories: Mapping[str, History],
    levels: Mapping[str, float],
    plateaus: Sequence[Plateau] = (),
    *,
    loss: str = "loss/eval",
) -> "Figure":
    """Loss over training steps, one line per seed or graph, with the losses of strategies.

    Args:
        histories: rows with `train/step` and the loss, by label.
        levels: losses in nats by name ("Bayes", strategies), drawn as horizontal lines.
        plateaus: drawn shaded, labelled with their strategies.
        loss: key of the loss.
    """
    figure, (axis,) = new_figure(1, 1)
    width, height = 8.4, 4.8
    figure.set_size_inches(width, height)
    figure.subplots_adjust(0.75 / width, 0.6 / height, 1 - 1.7 / width, 1 - 0.6 / height)
    for plateau in plateaus:
        start, stop = 1 + plateau.start, 1 + plateau.stop
        axis.axvspan(start, stop, color=OTHER_COLOUR, alpha=0.18, lw=0)
        xy, name = (float(np.sqrt(start * stop)), 0.99), plateau.strategy or ""
        axis.annotate(name, xy, xycoords=("data", "axes fraction"), ha="center", va="top")
    for (label, history), colour in zip(histories.items(), colours(len(histories)), strict=True):
        steps, losses = curve(history, loss)
        axis.plot(1 + steps, losses, color=colour, lw=1.5, label=label)
    for name, level in levels.items():
        colour, style = ("black", "--") if name == "Bayes" else ("#5b6670", ":")
        axis.axhline(level, color=colour, ls=style, lw=1.2)
    axis.set(xscale="log", xlabel="1 + training step", ylabel="loss (nats)", title="loss")
    axis.grid(alpha=0.25)
    _name_levels(axis, levels)
    if 0 < len(axis.get_legend_handles_labels()[0]) <= 12:
        axis.legend(framealpha=0.9, edgecolor="none", fontsize=8, loc="lower left")
    return figure


def draw_graph_distribution(
    per_graph: Float[np.ndarray, " graph"],
    per_edge: Float[np.ndarray, " edge"],
    paper: GraphDistribution = PAPER,
) -> "Figure":
    """Attention on parents over many graphs beside the paper's (figure 9).

    Args:
        per_graph: each graph's mean attention on parents; NaN where a graph has no edges.
        per_edge: attention on the parent, for the edges of all graphs.
        paper: the paper's values.
    """
    figure, (graphs, edges) = new_figure(1, 2)
    values = np.sort(per_graph[np.isfinite(per_graph)])
    mean, sd = paper.mean, paper.sd
    for low, high, alpha, label in (
        (paper.lowest, paper.highest, 0.25, "paper: range"),
        (mean - sd, mean + sd, 0.5, f"paper: {mean:.3f} ± {sd:.3f}"),
    ):
        graphs.axhspan(low, high, color=OTHER_COLOUR, alpha=alpha, lw=0, label=label)
    graphs.axhline(mean, color="black", lw=1, ls="--")
    ours = "ours"
    if len(values) > 1:
        ours = f"ours: {values.mean():.3f} ± {values.std(ddof=1):.3f}"
        graphs.axhline(values.mean(), color=REFERENCE_COLOUR, lw=1, ls="--")
    ranks = np.arange(1, len(values) + 1)
    graphs.plot(ranks, values, "o", ms=5, color=REFERENCE_COLOUR, label=ours)
    graphs.set(
        xlabel="graph, by attention",
        ylabel="mean attention on parents",
        title=f"{len(values)} graphs",
        ylim=(-0.02, 1.02),
    )
    edges.hist(per_edge, bins=np.linspace(0, 1, 21).tolist(), color=REFERENCE_COLOUR)
    edges.axvline(0.5, color=EDGE_COLOUR, lw=1, ls="--")
    above = int((per_edge > 0.5).sum())
    theirs = f"{paper.n_above_half} of {paper.n_edges}"
    edges.set_title(f"above 0.5: {above} of {len(per_edge)} (paper: {theirs})")
    edges.set(xlabel="attention on the parent", ylabel="edges")
    graphs.legend(frameon=False, fontsize=8, loc="lower right")
    for axis in (graphs, edges):
        axis.grid(alpha=0.25)
    return figure


def _draw_matrix(
    figure: "Figure",
    box: tuple[float, float, float, float],
    values: np.ndarray,
    rows: Streams,
    columns: Streams,
    *,
    name: str,
    framed: Sequence[str],
) -> None:
    """Draw each block of a matrix in its own axes; box is (left, top, width, height) in inches."""
    left, top, width, height = box
    page = figure.get_size_inches()
    low, high = np.percentile(values, PERCENTILES)
    image_style = {"cmap": ATTENTION_COLOURS, "vmin": low, "vmax": high, "aspect": "auto"}
    across, down = _spans(columns, width), _spans(rows, height)
    for row, (y, tall) in down.items():
        for column, (x, wide) in across.items():
            label = f"{name}/{column}" if row == _OUTPUT else f"{name}/{row}:{column}"
            bounds = np.divide([left + x, top - y - tall, wide, tall], [*page, *page])
            axis = figure.add_axes(tuple(bounds.tolist()), label=label)
            axis.imshow(values[rows[row], columns[column]], **image_style)
            axis.set(xticks=[], yticks=[], frame_on=f"blocks/{label}" in framed)
            for spine in axis.spines.values():
                spine.set(edgecolor=EDGE_COLOUR, linewidth=2.5)

    def write(x: float, y: float, text: str, size: int = 8, angle: int = 0) -> None:
        xy = (left + x) / page[0], (top + y) / page[1]
        figure.text(*xy, text, fontsize=size, rotation=angle, ha="center", va="center")

    title = "W transposed" if name == "W" else f"{name[:2]}, head {name[3:]}"
    limits = f"colours from {low:.3g} (15th percentile) to {high:.3g} (largest)"
    write(width / 2, 0.58, f"{title}: {limits}", size=9)
    for stream, (start, size) in across.items():
        write(start + size / 2, 0.12, _stream_label(stream, size))
    for stream, (start, size) in down.items():
        write(-0.12, -start - size / 2, _stream_label(stream, size), angle=90)
    for group, middle in _groups(across).items():
        write(middle, 0.34, group)
    for group, middle in _groups(down).items():
        write(-0.34, -middle, group, angle=90)


def _spans(streams: Streams, length: float) -> dict[str, tuple[float, float]]:
    """Start and size in inches of every stream along a side of that length, with gaps."""
    gaps = [
        _STREAM_GAP if _group(before) == _group(after) else _GROUP_GAP
        for before, after in pairwise(streams)
    ]
    widths = [entries.stop - entries.start for entries in streams.values()]
    inch = (length - sum(gaps)) / sum(widths)
    spans, start = {}, 0.0
    for name, width, gap in zip(streams, widths, [*gaps, 0.0], strict=True):
        spans[name] = (start, width * inch)
        start += width * inch + gap
    return spans


def _groups(spans: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The middle in inches of each group of streams, by the heads that copied them."""
    ends: dict[str, list[float]] = {}
    for stream, (start, size) in spans.items():
        ends.setdefault(_group(stream), []).extend((start, start + size))
    return {group: (min(inches) + max(inches)) / 2 for group, inches in ends.items()}


def _group(stream: str) -> str:
    """The heads that copied a stream; layers count from 1 as in the paper, heads from 0."""
    heads = [head.split(".") for head in stream.split("/")[:-1]]
    names = [f"{int(layer) + 1}.{head}" for layer, head in heads]
    return f"attn {' of '.join(names)}" if names else "" if stream == _OUTPUT else "input"


def _stream_label(stream: str, size: float) -> str:
    label = stream.rpartition("/")[2].capitalize()
    return label if size > 0.07 * len(label) else label[0]


def _numbers(weight: Tensor) -> np.ndarray:
    numbers: np.ndarray = weight.detach().cpu().numpy()
    return numbers


def _frame_query(axis: "Axes", length: int) -> None:
    from matplotlib.patches import Rectangle

    corner = (-0.5, length - 1.5)
    axis.add_patch(Rectangle(corner, length, 1, fill=False, ec="black", lw=1, clip_on=False))
    axis.text(length - 0.3, length - 1, "query", fontsize=7, va="center", clip_on=False)


def _name_levels(axis: "Axes", levels: Mapping[str, float]) -> None:
    """Write names at the right end of the lines, with a minimum distance."""
    low, high = axis.get_ylim()
    y = -np.inf
    for name, level in sorted(levels.items(), key=lambda item: item[1]):
        y = max((level - low) / (high - low), y + 0.045)
        axis.annotate(
            f"{name} {level:.3f}", (1.01, y), xycoords="axes fraction", va="center", size=8
        )
