"""Plateaus and drops of a loss curve, and the strategy that the model follows on each plateau.

Time is measured in doublings, `log2(1 + step)`, and the loss in cells of an eighth of a doubling. A
flat start or end of the curve is a plateau, too.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np
from jaxtyping import Float, Int
from scipy import ndimage

from mechcausal.measures.figures import STEP, History

Points = Float[np.ndarray, " point"]
Cells = Float[np.ndarray, " cell"]

_STRATEGY = "strategy/kl_"
_CELLS = 8  # cells of the time axis per doubling
_FALL = 0.05  # tolerance as a share of the total fall
_SPAN = 6  # cells over which the slope is measured
_NOISE = 8  # minimum total fall, in standard deviations of the noise


@dataclass(frozen=True)
class Plateau:
    """A stretch of steps in which the loss hardly falls.

    Attributes:
        start: first step logged on it.
        stop: last step logged on it.
        level: median loss, in nats.
        strategy: the strategy with the smallest mean KL on it; None if none was logged.
    """

    start: int
    stop: int
    level: float
    strategy: str | None


@dataclass(frozen=True)
class Drop:
    """The fall of the loss from one plateau to the next.

    Attributes:
        start: last step of the plateau before.
        middle: step at which the loss passes the mean of both levels.
        stop: first step of the plateau after.
        height: difference of the levels, in nats.
        from_strategy: strategy of the plateau before.
        to_strategy: strategy of the plateau after.
    """

    start: int
    middle: float
    stop: int
    height: float
    from_strategy: str | None
    to_strategy: str | None


def curve(history: History, loss: str = "loss/eval") -> tuple[Points, Points]:
    """Steps and losses of a history, sorted; rows without a finite loss are skipped.

    Example:
        >>> curve([{"train/step": 9, "loss/eval": 0.5}, {"train/step": 12}])
        (array([9.]), array([0.5]))
    """
    points = {}
    for row in history:
        step, value = row.get(STEP), row.get(loss)
        if step is not None and value is not None and math.isfinite(value):
            points[float(step)] = float(value)
    steps = np.array(sorted(points))
    return steps, np.array([points[step] for step in steps])


def find_plateaus(history: History, *, loss: str = "loss/eval") -> list[Plateau]:
    """The plateaus of a loss curve, in order.

    A plateau lasts at least one doubling of `1 + step`. The smoothed loss, and the line fitted to
    the plateau, change within each doubling by less than 5% of the curve's total fall, and by less
    than half the mean fall per doubling (so a steady fall is not a plateau). It extends as far as
    the curve stays within 5% of the total fall of its level. Suited to noise of up to 1% of the
    total fall.

    Args:
        history: rows with `train/step`, the loss and `strategy/kl_...`. A loss of None or NaN is
            skipped; a strategy's divergence of None or NaN counts as infinite.
        loss: name of the loss.

    Returns:
        The plateaus; empty if the total fall does not exceed the noise.

    Example:
        >>> steps = range(0, 3000, 10)
        >>> rows = [{"train/step": s, "loss/eval": 2.0 if s < 900 else 1.0} for s in steps]
        >>> [(p.start, p.stop, p.level) for p in find_plateaus(rows)]
        [(0, 890, 2.0), (900, 2990, 1.0)]
    """
    steps, losses = curve(history, loss)
    if len(steps) < 3:
        return []
    cell_of_row, binned = _by_cells(steps, losses)
    smooth: Cells = ndimage.gaussian_filter1d(binned, sigma=_CELLS / 4, mode="nearest")
    total = float(np.ptp(smooth))
    # The standard deviation of independent noise, from second differences.
    noise = 1.4826 * float(np.median(np.abs(np.diff(losses, 2)))) / math.sqrt(6)
    if len(binned) <= _SPAN or total <= max(_NOISE * noise, 1e-9 * float(np.abs(losses).max())):
        return []
    steepest = total * min(_FALL, 0.5 * _CELLS / len(binned))
    # The change per doubling at each cell, except near the ends of the curve.
    change = np.abs(smooth[_SPAN:] - smooth[:-_SPAN]) * _CELLS / _SPAN
    flat, n_flat = ndimage.label(np.pad(change < steepest, _SPAN // 2))
    plateaus, last = [], -1
    for number in range(1, n_flat + 1):
        core = np.flatnonzero(flat == number)
        core = core[core > last]
        if len(core) < _CELLS // 2:  # may be chance
            continue
        distance = np.abs(binned - np.median(binned[core]))
        near, _ = ndimage.label(distance < _FALL * total)
        cells = np.flatnonzero(near == near[core[distance[core].argmin()]])
        cells = cells[cells > last]
        inside = (cell_of_row >= cells[0]) & (cell_of_row <= cells[-1])
        if inside.sum() < 3:
            continue
        start, stop = (int(step) for step in steps[inside][[0, -1]])
        # Noise can make a steady fall look flat in between: the fitted line must be flat, too.
        slope = _CELLS * float(np.polyfit(cells, binned[cells], 1)[0])
        if 1 + stop >= 2 * (1 + start) and abs(slope) < steepest:
            level = float(np.median(losses[inside]))
            plateaus.append(Plateau(start, stop, level, _strategy(history, start, stop)))
            last = int(cells[-1])
    return plateaus


def find_drops(history: History, *, loss: str = "loss/eval") -> list[Drop]:
    """The falls of a loss curve between consecutive plateaus; arguments as in `find_plateaus`.

    The middle lies between the last row above half of the height and the first row below it.

    Example:
        >>> steps = range(0, 3000, 10)
        >>> rows = [{"train/step": s, "loss/eval": 2.0 if s < 900 else 1.0} for s in steps]
        >>> [(d.start, d.middle, d.stop, d.height) for d in find_drops(rows)]
        [(890, 895.0, 900, 1.0)]
    """
    steps, losses = curve(history, loss)
    drops = []
    for before, after in pairwise(find_plateaus(history, loss=loss)):
        height = before.level - after.level
        if height > 0:
            later = np.flatnonzero(steps > before.stop)
            below = losses[later] < after.level + height / 2
            middle = float(steps[later[below.argmax()] + np.array([-1, 0])].mean())
            strategies = before.strategy, after.strategy
            drops.append(Drop(before.stop, middle, after.start, height, *strategies))
    return drops


def steepest_drop(history: History, *, loss: str = "loss/eval") -> tuple[Plateau, Drop] | None:
    """The steepest fall per doubling of `1 + step`, and the shoulder before it.

    For fast training, in which the loss slows down between two falls without a plateau. The drop
    includes neighbouring rows while their slope exceeds half the steepest slope; the shoulder is
    the doubling of steps before it. The loss at step 0 is skipped.

    Returns:
        The shoulder and the drop; None if the shoulder has fewer than two rows or falls by more
        than half of the drop.

    Example:
        >>> rows = [(0, 1.6), (200, 1.3), (400, 1.25), (600, 1.21), (800, 1.2), (1000, 0.9)]
        >>> history = [{"train/step": step, "loss/eval": level} for step, level in rows]
        >>> shoulder, drop = steepest_drop(history)
        >>> (shoulder.start, shoulder.stop, shoulder.level), (drop.start, drop.stop)
        ((400, 800, 1.21), (800, 1000))
    """
    steps, losses = curve(history, loss)
    steps, losses = steps[steps > 0], losses[steps > 0]
    if len(steps) < 3:
        return None
    slopes = -np.diff(losses) / np.diff(np.log2(1 + steps))
    pieces, _ = ndimage.label(slopes > slopes.max() / 2)
    first, last = np.flatnonzero(pieces == pieces[slopes.argmax()])[[0, -1]]
    start, stop = int(steps[first]), int(steps[last + 1])
    height = float(losses[first] - losses[last + 1])
    is_before = (steps <= start) & (1 + 2 * steps >= start)
    before = losses[is_before]
    if height <= 0 or len(before) < 2 or before[0] - before[-1] > height / 2:
        return None
    begin = int(steps[is_before][0])
    shoulder = Plateau(begin, start, float(np.median(before)), _strategy(history, begin, start))
    later = _strategy(history, stop, int(min(2 * stop, steps[-1])))
    return shoulder, Drop(start, math.sqrt(start * stop), stop, height, shoulder.strategy, later)


def _by_cells(steps: Points, losses: Points) -> tuple[Int[np.ndarray, " point"], Cells]:
    """The cell of every row, and the loss without spikes in all cells from step 0 on."""
    cell_of_row = np.rint(_CELLS * np.log2(1 + steps)).astype(int)
    # Two median filters: over rows for cells with at most one row, over cells for cells with many.
    clean = ndimage.median_filter(losses, size=3, mode="nearest")
    n_rows = np.bincount(cell_of_row)
    filled = np.flatnonzero(n_rows)
    means = np.bincount(cell_of_row, weights=clean)[filled] / n_rows[filled]
    binned = np.interp(np.arange(len(n_rows)), filled, means)
    return cell_of_row, ndimage.median_filter(binned, size=5, mode="nearest")


def _strategy(history: History, start: int, stop: int) -> str | None:
    """The strategy with the smallest mean divergence; None if all are infinite."""
    divergences: defaultdict[str, list[float]] = defaultdict(list)
    for row in history:
        step = row.get(STEP)
        for name, value in row.items() if step is not None and start <= step <= stop else ():
            if name.startswith(_STRATEGY):
                finite = value if value is not None and math.isfinite(value) else math.inf
                divergences[name.removeprefix(_STRATEGY)].append(finite)
    means = {name: fmean(values) for name, values in divergences.items()}
    nearest = min(means, key=means.__getitem__, default=None)
    return nearest if nearest is not None and math.isfinite(means[nearest]) else None
