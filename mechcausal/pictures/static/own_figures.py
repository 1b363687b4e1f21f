"""Heatmaps and curves of a run without a graph, which has no reference to draw beside."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from mechcausal.measures.figures import TASK_CURVES, History, curves, own_curves
from mechcausal.pictures.static.run_figures import PANELS, plot_curves, side_by_side
from mechcausal.pictures.static.style import (
    ATTENTION_COLOURS,
    GRADIENT_COLOURS,
    OTHER_COLOUR,
    new_figure,
)
from mechcausal.recipes import Recipe


def own_heatmaps(
    matrices: Mapping[str, Tensor],
) -> dict[str, UInt8[np.ndarray, "height width rgb"]]:
    """Pictures of matrices without a reference, the blocks of a leading axis side by side.

    Colours go from 0 to the largest entry, or are symmetric about 0 if there are negative ones;
    tensors with fewer than two or more than three axes are left out.
    """
    pictures = {}
    for name, matrix in matrices.items():
        values = matrix.double().numpy()
        if values.ndim not in (2, 3) or not values.size or not np.isfinite(values).all():
            continue
        signed = bool((values < 0).any())
        scale = GRADIENT_COLOURS if signed else ATTENTION_COLOURS
        unit = values if signed else values / (values.max() or 1.0)
        pictures[name] = side_by_side(
            list(unit if unit.ndim == 3 else unit[None]), scale, signed=signed
        )
    return pictures


def draw_own_figures(
    folder: Path, *, recipe: Recipe, history: History, stage_starts: Sequence[int]
) -> dict[str, Path]:
    """Draw curves.png of a run without a graph: losses, and every group of figures it has.

    Groups are those of the list, and the sections of figures that it does not have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    panels = [curves(history, name) for name in (*PANELS, "weights", *TASK_CURVES)]
    panels = [(title, keys) for title, keys in panels if keys] + list(own_curves(history).items())
    if not panels:
        return {}
    figure, axes = new_figure(-(-len(panels) // 3), min(len(panels), 3))
    for axis, (title, keys) in zip(axes, panels, strict=False):
        plot_curves(axis, history, title, keys)
        for start in stage_starts[1:]:
            axis.axvline(start, color=OTHER_COLOUR, lw=0.8, ls=":")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(f"{recipe.name}, seed {recipe.seed}: training", fontsize=12)
    figure.savefig(folder / "curves.png", dpi=110)
    return {"figures/curves": folder / "curves.png"}
