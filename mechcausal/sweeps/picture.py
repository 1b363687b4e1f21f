"""Pictures of a sweep: phase diagrams, lines with bands, and curves over training."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mechcausal.pictures.static.style import ATTENTION_COLOURS, colours, new_figure, write_values
from mechcausal.sweeps.sweep import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOG_RATIO = (
    20.0  # an axis becomes logarithmic if its largest value is this many times its smallest
)
_MOST_INSIDE = 6  # longer legends move beside the lines
_MOST_NAMES = 100  # longer legends are left out


def draw(
    picture: Picture,
    table: pd.DataFrame,
    curves: Mapping[str, pd.DataFrame] | None = None,
    *,
    title: str = "",
) -> "Figure | None":
    """Draw a picture; return None if the table lacks its figure or axes.

    Args:
        picture: the figure and its axes.
        table: see `results_table`; only finished members that have a value on every axis count.
        curves: by member name, the columns `train/step` and `value`, for a picture over training.
        title: the title above the picture.
    """
    figure = _draw(picture, table[table["state"] == "finished"], curves or {}, title)
    if figure is not None:
        _fit_labels(figure)
    return figure


def _draw(
    picture: Picture, done: pd.DataFrame, curves: Mapping[str, pd.DataFrame], title: str
) -> "Figure | None":
    over_training = picture.x == "train/step"
    axes = [None if over_training else picture.x, picture.y, picture.by]
    columns = [column for column in axes if column is not None]
    if any(column not in done for column in columns):
        return None
    # Only some members may have a field: graph.lag belongs to one preset.
    done = done.dropna(subset=columns)
    if over_training:
        return curves_with_bands(picture, done, curves, title=title)
    if picture.figure not in done:
        return None
    if not pd.to_numeric(done[picture.figure], errors="coerce").notna().any():
        return None
    if picture.y is not None:
        return phase_diagram(picture, done, title=title)
    return line(picture, done, title=title)


def phase_diagram(picture: Picture, table: pd.DataFrame, *, title: str = "") -> "Figure":
    """Mean of a figure over two axes, and its standard deviation over all other axes beside it."""
    assert picture.y is not None
    values = table.assign(value=_values(table, picture))
    groups = values.groupby([picture.y, picture.x], sort=True)["value"]
    mean = groups.mean().unstack()
    count = groups.count()
    spread = groups.std().unstack()
    several = int(count.max()) > 1
    figure, axes = new_figure(1, 1 + several)
    figure.set_size_inches(*_size(mean.shape, 1 + several))
    figure.subplots_adjust(wspace=0.45, left=0.09, right=0.96, bottom=0.16, top=0.84)
    name = _name(picture)
    _heatmap(axes[0], mean, f"{name}: mean", picture)
    if several:
        low, high = int(count.min()), int(count.max())
        n_runs = f"{low}" if low == high else f"{low}–{high}"
        _heatmap(axes[1], spread, f"spread (sd) over {n_runs} runs per cell", picture)
    figure.suptitle(title)
    return figure


def line(picture: Picture, table: pd.DataFrame, *, title: str = "") -> "Figure":
    """Mean of a figure over one axis, with a band of one standard deviation."""
    figure, (axis,) = new_figure(1, 1)
    _set_margins(figure)
    values = table.assign(value=_values(table, picture))
    parts = _parts(values, picture.by)
    for (label, part), colour in zip(parts, colours(len(parts)), strict=True):
        groups = part.groupby(picture.x, sort=True)["value"]
        mean, spread = groups.mean(), groups.std().fillna(0.0)
        x_values = mean.index.to_numpy()
        numeric = pd.api.types.is_numeric_dtype(mean.index)
        x = x_values.astype(float) if numeric else np.arange(len(x_values), dtype=float)
        axis.plot(x, mean, "o-", color=colour, label=label, markersize=4)
        low, high = mean - spread, mean + spread
        if picture.fit and (mean > 0).all():
            low = low.clip(lower=mean.min() / 10)
        axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        if not numeric:
            axis.set_xticks(x, [str(value) for value in x_values], rotation=30, ha="right")
        if picture.fit and numeric:
            _fit(axis, x, mean.to_numpy(), colour)
        if numeric and (picture.fit or _spans_decades(x)) and x.min() > 0:
            axis.set_xscale("log")
            axis.set_xticks(x, [_text(value) for value in x_values])
            axis.set_xticks([], minor=True)
    axis.set(xlabel=picture.x, ylabel=_name(picture))
    _legend(axis, picture.by)
    figure.suptitle(title)
    return figure


def curves_with_bands(
    picture: Picture,
    table: pd.DataFrame,
    curves: Mapping[str, pd.DataFrame],
    *,
    title: str = "",
) -> "Figure | None":
    """A figure against the training step: mean and a band from the 10th to the 90th percentile."""
    figure, (axis,) = new_figure(1, 1)
    _set_margins(figure)
    parts = _parts(table, picture.by)
    for (label, part), colour in zip(parts, colours(len(parts)), strict=True):
        rows = [curves[name] for name in part["member"] if name in curves]
        rows = [row for row in rows if len(row)]
        if not rows:
            continue
        joined = pd.concat(rows)
        value = 1 - joined["value"] if picture.complement else joined["value"]
        groups = value.groupby(joined["train/step"], sort=True)
        mean = groups.mean()
        axis.plot(mean.index, mean, color=colour, label=label, linewidth=1.5)
        if len(rows) > 1:
            low, high = groups.quantile(0.1), groups.quantile(0.9)
            axis.fill_between(mean.index, low, high, color=colour, alpha=0.15, linewidth=0)
    if not axis.lines:
        return None
    axis.set(xlabel="train/step", ylabel=_name(picture))
    if len(axis.lines) > 1:
        _legend(axis, picture.by)
    figure.suptitle(title)
    return figure


def power_law(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Least squares of `log y = log c + k log x`: k, its standard error, c.

    The error is NaN for fewer than three points.

    Example:
        >>> k, error, c = power_law(np.array([1.0, 2.0, 4.0]), np.array([3.0, 1.5, 0.75]))
        >>> round(k, 6), round(c, 6)
        (-1.0, 3.0)
    """
    log_x, log_y = np.log(x), np.log(y)
    centred = log_x - log_x.mean()
    k = float((centred * log_y).sum() / (centred**2).sum())
    residual = log_y - log_y.mean() - k * centred
    error = math.nan
    if len(x) > 2:
        error = float(np.sqrt((residual**2).sum() / (len(x) - 2) / (centred**2).sum()))
    return k, error, float(np.exp(log_y.mean() - k * log_x.mean()))


def _values(table: pd.DataFrame, picture: Picture) -> pd.Series:
    values = pd.to_numeric(table[picture.figure], errors="coerce")
    return 1 - values if picture.complement else values


def _name(picture: Picture) -> str:
    return f"1 − {picture.figure}" if picture.complement else picture.figure


def _parts(table: pd.DataFrame, by: str | None) -> "list[tuple[str, pd.DataFrame]]":
    if by is None:
        return [("", table)]
    return [(_text(value), part) for value, part in table.groupby(by, sort=True)]


def _heatmap(axis: "Axes", grid: pd.DataFrame, title: str, picture: Picture) -> None:
    values = grid.to_numpy(dtype=float)
    image = axis.imshow(values, origin="lower", aspect="auto", cmap=ATTENTION_COLOURS)
    axis.figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03)
    axis.set_xticks(range(grid.shape[1]), [_text(v) for v in grid.columns], rotation=45, ha="right")
    axis.set_yticks(range(grid.shape[0]), [_text(v) for v in grid.index])
    axis.set(xlabel=picture.x, ylabel=picture.y, title=title)
    if values.size > 150:
        return
    finite = values[np.isfinite(values)]
    middle = (finite.min() + finite.max()) / 2 if finite.size else 0.0
    write_values(axis, values, _short, bright=middle, missing="–")


def _short(value: float) -> str:
    return f"{value:.0f}" if 100 <= abs(value) < 10_000 else f"{value:.2g}"


def _fit(axis: "Axes", x: np.ndarray, y: np.ndarray, colour: Any) -> None:
    good = (x > 0) & (y > 0)
    if good.sum() < 2:
        return
    k, error, c = power_law(x[good], y[good])
    law = f"∝ x^{k:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
    axis.plot(x[good], c * x[good] ** k, "--", color=colour, linewidth=1, label=law)
    axis.set_yscale("log")


def _spans_decades(x: np.ndarray) -> bool:
    return bool(x.min() > 0 and x.max() / x.min() >= _LOG_RATIO)


def _size(shape: tuple[int, int], n_panels: int) -> tuple[float, float]:
    rows, columns = shape
    width = n_panels * min(10.0, max(4.6, 0.5 * columns + 2.2))
    return width, min(10.0, max(4.0, 0.38 * rows + 2.0))


def _set_margins(figure: "Figure") -> None:
    figure.set_size_inches(6.4, 4.4)
    figure.subplots_adjust(left=0.13, right=0.97, bottom=0.16, top=0.9)


def _legend(axis: "Axes", title: str | None) -> None:
    """Name the lines: inside the axes if few, beside them if many, not at all if too many."""
    count = len(axis.get_legend_handles_labels()[1])
    placement: dict[str, Any] = {}
    if count > _MOST_INSIDE:
        placement = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "ncols": 1 + count // 20}
    if 0 < count <= _MOST_NAMES:
        axis.legend(title=title, fontsize="small", frameon=False, **placement)


def _fit_labels(figure: "Figure") -> None:
    """Enlarge the figure if its margins would cut off labels."""
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height:
        figure.set_size_inches(max(width, box.x1), height)  # a wide legend must not narrow the axes
        figure.tight_layout()


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
