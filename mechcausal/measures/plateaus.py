"""Plateaus and drops of a loss curve, and the strategy that the model follows on each plateau.

Time is measured in doublings, `log2(1 + step)`. The history is averaged within cells of an eighth
of a doubling, and a running median removes spikes but preserves edges. A plateau is a stretch where
this curve, smoothed by a Gaussian, falls within a doubling by a small share of its total fall. Its
ends come from the curve before the Gaussian, with a resolution of one cell. A flat start or end of
the curve is a plateau, too.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from mechcausal.measures.figures import History

Points = Float[np.ndarray, " point"]
Cells = Float[np.ndarray, " cell"]

STRATEGY = "strategy/kl_"
_CELLS = 8  # cells of the time axis per doubling
_MEDIAN = 5  # cells of the running median
_SPAN = 6  # cells over which the slope is measured
_CORE = 4  # minimum cells of a flat stretch: a shorter one may be chance
_ROWS = 3  # minimum rows of a plateau: two equal losses may be chance
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
        step, value = row.get("train/step"), row.get(loss)
        if step is not None and value is not None and math.isfinite(value):
            points[float(step)] = float(value)
    steps = np.array(sorted(points))
    return steps, np.array([points[step] for step in steps])


def find_plateaus(
    history: History, *, loss: str = "loss/eval", fall: float = 0.05, factor: float = 2.0
) -> list[Plateau]:
    """The plateaus of a loss curve, in order.

    A plateau is a stretch in which the smoothed loss, and the line fitted to the stretch, change
    within each doubling of `1 + step` by less than `fall` times the curve's total fall, and by less
    than half the mean fall per doubling (so a steady fall is not a plateau). It extends as far as
    the curve stays within `fall` times the total fall of its level. Suited to noise of up to 1% of
    the total fall.

    Args:
        history: rows with `train/step`, the loss and `strategy/kl_...`. A loss of None or NaN is
            skipped; a strategy's divergence of None or NaN counts as infinite.
        loss: name of the loss.
        fall: tolerance as a share of the total fall.
        factor: minimum ratio of `1 + step` between the end and the start of a plateau.

    Returns:
        The plateaus; empty if the total fall does not exceed the noise.

    Example:
        >>> steps = range(0, 3000, 10)
        >>> rows = [{"train/step": s, "loss/eval": 2.0 if s < 900 else 1.0} for s in steps]
        >>> [(p.start, p.stop, p.level) for p in find_plateaus(rows)]
        [(0, 890, 2.0), (900, 2990, 1.0)]
    """
    steps, losses = curve(history, loss)
    if len(steps) < _ROWS:
        return []
    binned = _by_cells(steps, losses)
    smooth: Cells = ndimage.gaussian_filter1d(binned, sigma=_CELLS / 4, mode="nearest")
    total = float(np.ptp(smooth))
    if total <= max(_NOISE * _noise(losses), 1e-9 * float(np.abs(losses).max())):
        return []
    steepest = total * min(fall, 0.5 * _CELLS / len(binned))
    flat = np.zeros(len(binned), dtype=bool)
    if len(binned) > _SPAN:
        # The change per doubling around each cell, except near the ends of the curve.
        change = np.abs(smooth[_SPAN:] - smooth[:-_SPAN]) * _CELLS / _SPAN
        middle = slice(_SPAN // 2, -(_SPAN // 2))
        flat[middle] = change < steepest
    plateaus = []
    for low, high in _stretches(binned, flat, fall * total):
        inside = (steps >= _step(low - 0.5)) & (steps < _step(high + 0.5))
        if inside.sum() < _ROWS:
            continue
        start, stop = int(steps[inside][0]), int(steps[inside][-1])
        # Noise can interrupt a steady fall locally: require a flat line through the stretch, too.
        cells = np.arange(low, high + 1)
        slope = _CELLS * np.polyfit(cells, binned[cells], 1)[0]
        if (1 + stop) >= factor * (1 + start) and abs(slope) < steepest:
            level = float(np.median(losses[inside]))
            plateaus.append(Plateau(start, stop, level, _strategy(history, start, stop)))
    return plateaus


def find_drops(
    history: History, *, loss: str = "loss/eval", fall: float = 0.05, factor: float = 2.0
) -> list[Drop]:
    """The falls of a loss curve between consecutive plateaus; arguments as in `find_plateaus`.

    The middle is the cut that misclassifies the fewest rows, where rows before it should lie above
    the mean of the two levels and rows after it below.

    Example:
        >>> steps = range(0, 3000, 10)
        >>> rows = [{"train/step": s, "loss/eval": 2.0 if s < 900 else 1.0} for s in steps]
        >>> [(d.start, d.middle, d.stop, d.height) for d in find_drops(rows)]
        [(890, 895.0, 900, 1.0)]
    """
    steps, losses = curve(history, loss)
    plateaus = find_plateaus(history, loss=loss, fall=fall, factor=factor)
    drops = []
    for before, after in pairwise(plateaus):
        height = before.level - after.level
        if height > 0:
            between = (steps >= before.start) & (steps <= after.stop)
            above = losses[between] > (before.level + after.level) / 2
            # A cut before row n misclassifies the low rows before n and the high rows from n on.
            errors = np.append(0, np.cumsum(~above)) + above.sum() - np.append(0, np.cumsum(above))
            cut = int(np.clip(errors.argmin(), 1, len(above) - 1))
            middle = float(steps[between][cut - 1 : cut + 1].mean())
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
    if len(steps) < _ROWS:
        return None
    slopes = -np.diff(losses) / np.diff(np.log2(1 + steps))
    first = last = int(slopes.argmax())
    while first > 0 and slopes[first - 1] > slopes.max() / 2:
        first -= 1
    while last < len(slopes) - 1 and slopes[last + 1] > slopes.max() / 2:
        last += 1
    start, stop = int(steps[first]), int(steps[last + 1])
    height = float(losses[first] - losses[last + 1])
    shoulder_losses = losses[: first + 1][1 + 2 * steps[: first + 1] >= start]
    if (
        height <= 0
        or len(shoulder_losses) < 2
        or shoulder_losses[0] - shoulder_losses[-1] > height / 2
    ):
        return None
    begin = int(steps[first + 1 - len(shoulder_losses)])
    later = _strategy(history, stop, int(min(2 * stop, steps[-1])))
    shoulder = Plateau(
        begin, start, float(np.median(shoulder_losses)), _strategy(history, begin, start)
    )
    middle = math.sqrt(start * stop)
    return shoulder, Drop(start, middle, stop, height, shoulder.strategy, later)


def _by_cells(steps: Points, losses: Points) -> Cells:
    """The loss, without spikes, in cells of an eighth of a doubling from step 0 on."""
    cell = np.rint(_CELLS * np.log2(1 + steps)).astype(int)
    n_rows = np.bincount(cell)
    filled = np.flatnonzero(n_rows)
    # Two median filters: over rows for cells with at most one row, over cells for cells with many.
    clean = ndimage.median_filter(losses, size=3, mode="nearest")
    means = np.bincount(cell, weights=clean)[filled] / n_rows[filled]
    binned = np.interp(np.arange(len(n_rows)), filled, means)
    steady: Cells = ndimage.median_filter(binned, size=_MEDIAN, mode="nearest")
    return steady


def _step(cell: float) -> float:
    return float(2 ** (cell / _CELLS) - 1)


def _noise(losses: Points) -> float:
    """Estimate the standard deviation of independent noise on a curve, from second differences."""
    if len(losses) < 3:
        return 0.0
    return float(1.4826 * np.median(np.abs(np.diff(losses, 2))) / math.sqrt(6))


def _stretches(
    binned: Cells, flat: Bool[np.ndarray, " cell"], band: float
) -> list[tuple[int, int]]:
    """First and last cells of the flat stretches, extended while the curve stays in the band."""
    labels, n_labels = ndimage.label(flat)
    stretches: list[tuple[int, int]] = []
    for number in range(n_labels):
        low, high = (int(end) for end in np.flatnonzero(labels == number + 1)[[0, -1]])
        if high - low + 1 < _CORE:
            continue
        level = float(np.median(binned[low : high + 1]))
        while low > 0 and abs(binned[low - 1] - level) < band:
            low -= 1
        while high < len(binned) - 1 and abs(binned[high + 1] - level) < band:
            high += 1
        # Merge stretches that overlap.
        if stretches and low <= stretches[-1][1]:
            low, _ = stretches.pop()
        stretches.append((low, high))
    return stretches


def _strategy(history: History, start: int, stop: int) -> str | None:
    divergences: dict[str, list[float]] = {}
    for row in history:
        step = row.get("train/step")
        if step is None or not start <= step <= stop:
            continue
        for name, value in row.items():
            if name.startswith(STRATEGY):
                finite = value if value is not None and math.isfinite(value) else math.inf
                divergences.setdefault(name.removeprefix(STRATEGY), []).append(finite)
    means = {name: float(np.mean(values)) for name, values in divergences.items()}
    nearest = min(means, key=lambda name: means[name], default=None)
    return nearest if nearest is not None and math.isfinite(means[nearest]) else None
