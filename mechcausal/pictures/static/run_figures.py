"""Heatmaps for W&B and PNG figures of a run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.measures.figures import (
    STEP,
    History,
    axis_limits,
    curves,
    figure_of,
    keys_in,
)
from mechcausal.pictures.static.style import (
    ATTENTION_COLOURS,
    EDGE_COLOUR,
    GRADIENT_COLOURS,
    HEAD_SCORES,
    OTHER_COLOUR,
    REFERENCE_COLOUR,
    REFERENCE_DASHES,
    REFERENCE_GREY,
    circle,
    colours,
    label_positions,
    new_figure,
    write_values,
)
from mechcausal.recipes import Recipe
from mechcausal.theory import Information, PairwiseTheory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = ("loss", "recovery", "theory", "information", "formation", "strategies")
"""The curves of a run's figures, by their names in the list of figures."""
_STYLES = {"dash": "--", "dashdot": "-.", "dot": ":"}
_PIXELS = 320  # minimum width and height of a W&B heatmap

Matrices = Mapping[int, Mapping[str, Float[Tensor, "*head query key"]]]


def heatmaps(
    matrices: Mapping[str, Float[Tensor, "*head query key"]], theory: Information
) -> dict[str, UInt8[np.ndarray, "height width rgb"]]:
    """Pictures of one probe step, each beside its reference.

    Returns:
        `attention/layer0` (one panel per head) beside the true graph; `gradient/scores` and
        `gradient/pattern` beside the predicted gradient, or beside the chi-squared information of
        earlier positions if there is no prediction. Gradients are scaled to their largest entry;
        rows of the pattern's gradient are first divided by their number of keys.
    """
    length = theory.graph.sequence_length
    expected = _expected_gradient(theory).numpy()
    pictures = {}
    for name, matrix in matrices.items():
        panels = list(matrix.double().numpy().reshape(-1, length, length))
        if name.startswith("attention"):
            panels.append(_truth(theory.graph))
            pictures[name] = side_by_side(panels, ATTENTION_COLOURS, signed=False)
        else:
            if name == "gradient/pattern":
                panels = [values / np.arange(1, length + 1)[:, None] for values in panels]
            panels.append(expected)
            pictures[name] = side_by_side(panels, GRADIENT_COLOURS, signed=True)
    return pictures


def _expected_gradient(theory: Information) -> Float[Tensor, "query key"]:
    if isinstance(theory, PairwiseTheory):
        return theory.predicted_gradient
    length = theory.graph.sequence_length
    return theory.chi2[:length, :length].tril(-1)


def heatmap(values: Float[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "height width rgb"]:
    """A picture of values in [0, 1], one square per entry."""
    return _coloured(values, ATTENTION_COLOURS)


def signed_heatmap(
    values: Float[np.ndarray, "rows columns"],
) -> UInt8[np.ndarray, "height width rgb"]:
    """A picture of values of either sign, scaled to the largest."""
    return side_by_side([values], GRADIENT_COLOURS, signed=True)


def draw_figures(
    folder: Path,
    *,
    recipe: Recipe,
    theory: Information,
    history: History,
    matrices: Matrices,
    stage_starts: Sequence[int],
) -> dict[str, Path]:
    """Draw a run's figures as PNG files.

    Args:
        folder: created if absent.
        recipe: its name and seed are in the titles.
        theory: reference for the gradient.
        history: one row of figures per probe step.
        matrices: attention and gradients by step.
        stage_starts: first steps of the training stages.

    Returns:
        The files, by their names in W&B.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[], Figure]] = {
        "attention": lambda: draw_attention(matrices, theory.graph),
        "gradient": lambda: draw_gradient(matrices, theory),
        "curves": lambda: draw_curves(history, stage_starts),
    }
    files = {}
    for name, draw in drawings.items():
        figure = draw()
        figure.suptitle(f"{recipe.name}, seed {recipe.seed}: {_CAPTIONS[name]}", fontsize=12)
        files[f"figures/{name}"] = folder / f"{name}.png"
        figure.savefig(folder / f"{name}.png", dpi=110)
    return files


_CAPTIONS = {
    "attention": "layer-1 attention becomes the causal graph",
    "gradient": "the first gradient against information theory",
    "curves": "training",
}


def draw_attention(matrices: Matrices, graph: CausalGraph) -> "Figure":
    """Layer-1 attention at the start, while the graph forms, and at the end; circles mark parents.

    Attention is the maximum over heads.
    """
    steps = sorted(matrices)
    chosen = sorted({steps[0], _forming_step(matrices, graph), steps[-1]})
    figure, axes = new_figure(1, len(chosen) + 1)
    for axis, step in zip(axes, chosen, strict=False):
        image = axis.imshow(_attention(matrices[step]), cmap=ATTENTION_COLOURS, vmin=0, vmax=1)
        _circle_parents(axis, graph, EDGE_COLOUR, graph.sequence_length)
        axis.set_title(f"attention, step {step:,}")
    figure.colorbar(image, ax=axes[: len(chosen)], shrink=0.75, label="attention")
    axes[-1].imshow(_truth(graph), cmap="Greys", vmin=0, vmax=1.4)
    axes[-1].set_title("true graph: parents of each position")
    for axis in axes:
        label_positions(axis)
    return figure


def _attention(matrices: Mapping[str, Tensor]) -> Float[np.ndarray, "query key"]:
    """Layer-1 attention, the maximum over heads."""
    matrix = matrices["attention/layer0"].numpy()
    return matrix if matrix.ndim == 2 else matrix.max(0)


def _forming_step(matrices: Matrices, graph: CausalGraph) -> int:
    """The recorded step whose mean attention on parents is closest to one half."""
    truth = _truth(graph).astype(bool)
    if not truth.any():
        return sorted(matrices)[len(matrices) // 2]

    def distance(step: int) -> float:
        return abs(float(_attention(matrices[step])[truth].mean()) - 0.5)

    return min(sorted(matrices), key=distance)


def draw_gradient(matrices: Matrices, theory: Information) -> "Figure":
    """The first nonzero gradient (summed over heads), its reference, and a scatter plot of both.

    The references are the predicted gradient and the chi-squared information; for several parents
    there is no prediction.
    """
    chosen = (s for s in sorted(matrices) if bool(matrices[s]["gradient/scores"].any()))
    step = next(chosen, min(matrices))
    n = theory.graph.n_graph_rows
    by_head = matrices[step]["gradient/scores"].double().reshape(-1, *_square(theory))
    measured = by_head.sum(0)[:n, :n].numpy()
    expected = _expected_gradient(theory)[:n, :n].numpy()
    predicts = isinstance(theory, PairwiseTheory)
    figure, axes = new_figure(1, 4 if predicts else 3)
    for axis, values, title in (
        (axes[0], measured, f"measured at step {step:,}: −∂L/∂scores"),
        (axes[1], expected, "predicted from information" if predicts else "χ²-information"),
    ):
        limit = np.abs(values).max() or 1.0
        image = axis.imshow(values / limit, cmap=GRADIENT_COLOURS, vmin=-1, vmax=1)
        _circle_parents(axis, theory.graph, "black", n)
        label_positions(axis)
        axis.set_title(f"{title}\n(largest {limit:.2g})", fontsize=10)
    figure.colorbar(image, ax=axes[:2], shrink=0.75, label="share of the largest entry")
    is_edge = _truth(theory.graph)[:n, :n].astype(bool)
    visible = np.tril(np.ones((n, n), dtype=bool))
    if predicts:
        _scatter(axes[2], expected, measured, is_edge, visible)
        low, high = axes[2].get_xlim()
        axes[2].plot([low, high], [low, high], color=REFERENCE_COLOUR, lw=1, label="equal")
        axes[2].set(xlabel="predicted gradient", ylabel="measured gradient", title="all keys j ≤ i")
        axes[2].legend(frameon=False, fontsize=8)
    scaled = measured * np.arange(1, n + 1)[:, None]
    _scatter(axes[-1], theory.chi2[:n, :n].numpy(), scaled, is_edge, np.tril(visible, -1))
    axes[-1].set(
        xlabel="χ²-information", ylabel="measured × number of keys", title="keys before the query"
    )
    return figure


def _square(theory: Information) -> tuple[int, int]:
    length = theory.graph.sequence_length
    return length, length


def draw_head_figures(folder: Path, *, recipe: Recipe, history: History) -> dict[str, Path]:
    """Draw heads.png: the loss by copy and every head's scores over training steps."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = new_figure(1, 4)
    plot_curves(axes[0], history, *curves(history, "loss"))
    for axis, kind in zip(axes[1:], HEAD_SCORES, strict=True):
        keys = keys_in(history, [f"heads/{{head}}/{kind}"])
        plot_curves(axis, history, kind.replace("_", " "), keys)
    figure.suptitle(f"{recipe.name}, seed {recipe.seed}: heads over training", fontsize=12)
    path = folder / "heads.png"
    figure.savefig(path, dpi=110)
    return {"figures/heads": path}


def head_heatmap(
    path: Path,
    panels: Mapping[str, Float[np.ndarray, "layer head"]],
    *,
    layers: Sequence[int],
    title: str,
) -> None:
    """Draw scores by layer (rows) and head (columns), one panel per score, as a PNG file."""
    figure, axes = new_figure(1, len(panels))
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        image = axis.imshow(values, cmap=ATTENTION_COLOURS, vmin=0, vmax=1, aspect="auto")
        axis.set(title=name, xlabel="head", ylabel="layer")
        axis.set_xticks(range(values.shape[1]))
        axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        if values.size <= 200:
            write_values(axis, values, "{:.2f}".format, bright=0.6)
    figure.colorbar(image, ax=axes, shrink=0.75, label="attention")
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110)


def plot_curves(axis: "Axes", history: History, title: str, keys: Sequence[str]) -> None:
    """Draw figures over training steps; constants to compare with are grey."""
    points = {
        key: [(row[STEP], value) for row in history if (value := row.get(key)) is not None]
        for key in keys
    }
    keys = [key for key, pairs in points.items() if pairs]
    palette = iter(colours(sum(not figure_of(key).reference for key in keys)))
    for key in keys:
        item = figure_of(key)
        style = _STYLES[REFERENCE_DASHES[key]] if item.reference else "-"
        colour = REFERENCE_GREY if item.reference else next(palette)
        axis.plot(*zip(*points[key], strict=True), style, color=colour, lw=1.5, label=item.label)
    unit = figure_of(keys[0]).unit if keys else ""
    axis.set(title=f"{title} (nats)" if unit == "nats" else title, xlabel="training step")
    limits = axis_limits(keys, (value for pairs in points.values() for _, value in pairs))
    if limits is not None:
        axis.set_ylim(*limits)
    if 0 < len(keys) <= 12:
        axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.25)


def draw_curves(history: History, stage_starts: Sequence[int]) -> "Figure":
    """Loss, graph, gradient, induction and strategies over training steps."""
    figure, axes = new_figure(2, 3)
    for axis, name in zip(axes, PANELS, strict=True):
        plot_curves(axis, history, *curves(history, name))
        if name == "strategies":
            axis.set_yscale("log")
        for start in stage_starts[1:]:
            axis.axvline(start, color=OTHER_COLOUR, lw=0.8, ls=":")
    return figure


def _truth(graph: CausalGraph) -> Float[np.ndarray, "pos pos"]:
    """1 where the key is a parent of the query position, over all T positions."""
    truth = np.zeros((graph.sequence_length, graph.sequence_length))
    for parent, child in graph.edges:
        truth[child, parent] = 1.0
    return truth


def _scatter(axis: "Axes", x: Any, y: Any, is_edge: Any, mask: Any) -> None:
    for chosen, colour, label in (
        (mask & ~is_edge, OTHER_COLOUR, "other pairs"),
        (mask & is_edge, EDGE_COLOUR, "edges of the graph"),
    ):
        axis.scatter(x[chosen], y[chosen], s=14, color=colour, alpha=0.8, lw=0, label=label)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)


def _circle_parents(axis: "Axes", graph: CausalGraph, colour: str, n_rows: int) -> None:
    cells = [(parent, child) for parent, child in graph.edges if child < n_rows]
    circle(axis, cells, graph.sequence_length, colour)


def side_by_side(panels: Sequence[np.ndarray], scale: str, *, signed: bool) -> np.ndarray:
    """One picture of several matrices; signed values each by their own largest entry."""
    parts: list[np.ndarray] = []
    for values in panels:
        limit = np.abs(values).max() or 1.0
        picture = _coloured((values / limit + 1) / 2 if signed else values, scale)
        gap = np.full((picture.shape[0], 8, 3), 255, dtype=np.uint8)
        parts += [gap, picture] if parts else [picture]
    return np.concatenate(parts, axis=1)


def _coloured(unit: np.ndarray, scale: str) -> np.ndarray:
    from matplotlib import colormaps

    size = max(1, -(-_PIXELS // unit.shape[0]))
    pixels: np.ndarray = (colormaps[scale](unit)[..., :3] * 255).astype(np.uint8)
    return pixels.repeat(size, 0).repeat(size, 1)
