"""PNG figures and heatmaps of a run on text: the gradient by lag and residual information."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from mechcausal.measures.figures import STEP, History, curves, keys_in
from mechcausal.pictures.static.run_figures import heatmap, plot_curves, signed_heatmap
from mechcausal.pictures.static.style import ATTENTION_COLOURS, colours, new_figure
from mechcausal.recipes import Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FLOOR = 1e-2  # of residual information in pictures on a logarithmic scale


def heatmaps(
    matrices: Mapping[str, Tensor],
) -> dict[str, UInt8[np.ndarray, "height width rgb"]]:
    """The gradient by head (rows) and lag (columns), and head scores by layer and head."""
    pictures = {
        name: heatmap(matrix.numpy())
        for name, matrix in matrices.items()
        if name.startswith("heads/")
    }
    return pictures | {"gradient/by_lag": signed_heatmap(matrices["gradient/by_lag"].numpy())}


def draw_figures(
    folder: Path,
    *,
    recipe: Recipe,
    history: History,
    matrices: Mapping[int, Mapping[str, Tensor]],
) -> dict[str, Path]:
    """Draw law.png: losses, residual information, correlations, and one step's gradient by lag."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = new_figure(2, 2)
    figure.set_size_inches(11.0, 8.2)
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.07, top=0.91, wspace=0.22, hspace=0.3)
    plot_curves(axes[0], history, *curves(history, "loss"))
    _draw_residual(axes[1], history)
    plot_curves(axes[2], history, *curves(history, "law"))
    _draw_scatter(axes[3], history, matrices)
    figure.suptitle(f"{recipe.name}, seed {recipe.seed}: the law at every step", fontsize=12)
    path = folder / "law.png"
    figure.savefig(path, dpi=110)
    return {"figures/law": path}


def _residual_by_lag(history: History) -> tuple[list[int], np.ndarray]:
    """The steps whose rows have residual information, and it as [lag, step]; NaN for None."""
    keys = keys_in(history, ["residual/lag{lag}"])
    rows = [row for row in history if keys and row.get(keys[0]) is not None]
    values = [[np.nan if row.get(key) is None else row[key] for row in rows] for key in keys]
    return [int(row[STEP] or 0) for row in rows], np.array(values, dtype=float)


def _draw_residual(axis: "Axes", history: History) -> None:
    """Residual information by lag (rows) and step (columns), on a logarithmic colour scale."""
    from matplotlib.colors import LogNorm

    steps, values = _residual_by_lag(history)
    axis.set(title="residual information by lag", xlabel="training step", ylabel="lag")
    if not values.size:
        return
    edges = np.array([*steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[0] + 1])
    high = max(float(np.nanmax(values)), 10 * _FLOOR)
    image = axis.pcolormesh(
        edges,
        np.arange(len(values) + 1) + 0.5,
        np.clip(values, _FLOOR, None),
        norm=LogNorm(_FLOOR, high),
        cmap=ATTENTION_COLOURS,
    )
    axis.set_ylim(len(values) + 0.5, 0.5)
    axis.set_yticks(range(1, len(values) + 1, max(1, len(values) // 8)))
    assert axis.figure is not None
    axis.figure.colorbar(image, ax=axis, label=f"χ² (below {_FLOOR:g}: darkest)")


def _draw_scatter(
    axis: "Axes", history: History, matrices: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """Each head's gradient at every lag against residual information, where they agree best."""
    key = "gradient/residual_correlation"
    by_step = {int(row[STEP] or 0): row.get(key) for row in history}
    known = {step: by_step[step] for step in matrices if by_step.get(step) is not None}
    step = max(known, key=lambda step: known[step] or 0.0, default=max(matrices))
    information = matrices[step]["residual/by_lag"][0].numpy()
    gradient = matrices[step]["gradient/by_lag"].numpy()
    for head, (values, colour) in enumerate(zip(gradient, colours(len(gradient)), strict=True)):
        label = f"head {head}" if len(gradient) <= 8 else None
        axis.plot(information, values, "o", ms=4, color=colour, alpha=0.8, label=label)
    correlation = known.get(step)
    title = f"step {step:,}, a point for every lag"
    axis.set(
        title=title if correlation is None else f"{title}; best r, {correlation:.2f}",
        xlabel="residual information, χ²",
        ylabel="−∂L/∂pattern of a head of layer 1",
    )
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.25)
