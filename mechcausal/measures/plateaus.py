"""Plateaus and drops of a loss curve, and the strategy that the model follows on each plateau.

Time is counted in doublings, `log2(1 + step)`: training is fast at first and slow later, and the
eye sees plateaus on that axis. The rows of a history are averaged within eighths of a doubling, and
a running median takes out spikes and leaves edges. Where that curve, smoothed by a Gaussian of a
quarter of a doubling, falls by little of its total fall within a doubling, there is a plateau; its
ends are those of the curve before the Gaussian, and good to an eighth of a doubling. The flat end
of a curve is a plateau too, and so is a flat start.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from mechcausal.records.run_folder import History

Points = Float[np.ndarray, " point"]
Cells = Float[np.ndarray, " cell"]

STRATEGY = "strategy/kl_"
_CELLS = 8  # of the time axis, for each doubling
_MEDIAN = 5  # cells of the running median
_SPAN = 6  # cells over which the slope is taken
_CORE = 4  # cells: a shorter flat stretch may be chance
_ROWS = 3  # fewer rows show no plateau: two equal losses may be chance
_NOISE = 8  # a total fall below so many standard deviations of the noise is none


@dataclass(frozen=True)
class Plateau:
    """A stretch of steps in which the loss hardly falls.

    Attributes:
        start: first step logged on it.
        stop: last step logged on it.
        level: median loss, in nats.
        strategy: the one with the smallest mean KL on it; None where none was logged.
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
        middle: step at which the loss passes the middle between the levels.
        stop: first step of the plateau after.
        height: difference of the levels, in nats.
        from_strategy: that of the plateau before.
        to_strategy: that of the plateau after.
    """

    start: int
    middle: float
    stop: int
    height: float
    from_strategy: str | None
    to_strategy: str | None


def curve(history: History, loss: str = "loss/eval") -> tuple[Points, Points]:
    """Steps and losses of a history, in order; rows in which one is absent or NaN are left out.

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

    A plateau is a stretch in which the smoothed loss changes, within each doubling of `1 + step`,
    by less than `fall` of the curve's total fall and less than half the mean fall of a doubling,
    so that a steady fall is none; so does the line fitted to all of it. It reaches as far as the
    curve stays within `fall` of its level. Made for noise of up to 1% of the total fall: with 2%,
    one steady fall in twenty (of 150 rows) shows a plateau.

    Args:
        history: rows with `train/step`, the loss and `strategy/kl_...`; a loss of None or NaN is
            left out, a strategy's stands for an infinite divergence.
        loss: name of the loss.
        fall: share of the total fall.
        factor: a plateau is as long as this factor of `1 + step`, at least.

    Returns:
        An empty list where the curve falls by no more than its noise, or nowhere stands still.

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
        # The change around each cell, where the curve holds all of the span.
        change = np.abs(smooth[_SPAN:] - smooth[:-_SPAN]) * _CELLS / _SPAN
        middle = slice(_SPAN // 2, -(_SPAN // 2))
        flat[middle] = change < steepest
    plateaus = []
    for low, high in _stretches(binned, flat, fall * total):
        inside = (steps >= _step(low - 0.5)) & (steps < _step(high + 0.5))
        if inside.sum() < _ROWS:
            continue
        start, stop = int(steps[inside][0]), int(steps[inside][-1])
        # Noise can hold a steady fall up for a while; a line through the whole stretch tells.
        cells = np.arange(low, high + 1)
        slope = _CELLS * np.polyfit(cells, binned[cells], 1)[0]
        if (1 + stop) >= factor * (1 + start) and abs(slope) < steepest:
            level = float(np.median(losses[inside]))
            plateaus.append(Plateau(start, stop, level, _strategy(history, start, stop)))
    return plateaus


def find_drops(
    history: History, *, loss: str = "loss/eval", fall: float = 0.05, factor: float = 2.0
) -> list[Drop]:
    """The falls of a loss curve between its plateaus, in order; arguments as `find_plateaus`.

    The middle is where one cut leaves the fewest rows on the wrong side: above the mean of the two
    levels after it, below it before. A fall that no plateau precedes or follows is left out.

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
            # Cutting before row n errs on the low rows before it and the high rows after it.
            errors = np.append(0, np.cumsum(~above)) + above.sum() - np.append(0, np.cumsum(above))
            cut = int(np.clip(errors.argmin(), 1, len(above) - 1))
            middle = float(steps[between][cut - 1 : cut + 1].mean())
            strategies = before.strategy, after.strategy
            drops.append(Drop(before.stop, middle, after.start, height, *strategies))
    return drops


def steepest_drop(history: History, *, loss: str = "loss/eval") -> tuple[Plateau, Drop] | None:
    """The fall that is steepest per doubling of `1 + step`, and the shoulder before it.

    For training too fast to stand still: between two falls the loss slows down without a plateau.
    The drop reaches over neighbouring rows as long as they fall half as steeply as its steepest
    part; the shoulder is the doubling of steps before it.

    Returns:
        None where the shoulder has fewer than two rows, or falls by more than half of the drop:
        then nothing was held up. Loss at step 0 is left out, where a doubling has no length.

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
    held = losses[: first + 1][1 + 2 * steps[: first + 1] >= start]
    if height <= 0 or len(held) < 2 or held[0] - held[-1] > height / 2:
        return None
    begin = int(steps[first + 1 - len(held)])
    later = _strategy(history, stop, int(min(2 * stop, steps[-1])))
    shoulder = Plateau(begin, start, float(np.median(held)), _strategy(history, begin, start))
    middle = math.sqrt(start * stop)
    return shoulder, Drop(start, middle, stop, height, shoulder.strategy, later)


def _by_cells(steps: Points, losses: Points) -> Cells:
    """The loss without spikes in cells of an eighth of a doubling, from step 0 to the last."""
    cell = np.rint(_CELLS * np.log2(1 + steps)).astype(int)
    n_rows = np.bincount(cell)
    filled = np.flatnonzero(n_rows)
    # Twice against spikes: where cells hold no or one row each, and where they hold many.
    clean = ndimage.median_filter(losses, size=3, mode="nearest")
    means = np.bincount(cell, weights=clean)[filled] / n_rows[filled]
    binned = np.interp(np.arange(len(n_rows)), filled, means)
    steady: Cells = ndimage.median_filter(binned, size=_MEDIAN, mode="nearest")
    return steady


def _step(cell: float) -> float:
    return float(2 ** (cell / _CELLS) - 1)


def _noise(losses: Points) -> float:
    """Standard deviation of independent noise on a smooth curve, from second differences."""
    if len(losses) < 3:
        return 0.0
    return float(1.4826 * np.median(np.abs(np.diff(losses, 2))) / math.sqrt(6))


def _stretches(
    binned: Cells, flat: Bool[np.ndarray, " cell"], band: float
) -> list[tuple[int, int]]:
    """First and last cells of the flat stretches, each grown as far as the curve is in its band."""
    labels, n_labels = ndimage.label(flat)
    found: list[tuple[int, int]] = []
    for number in range(n_labels):
        low, high = (int(end) for end in np.flatnonzero(labels == number + 1)[[0, -1]])
        if high - low + 1 < _CORE:
            continue
        level = _level(binned, low, high)
        while low > 0 and abs(binned[low - 1] - level) < band:
            low -= 1
        while high < len(binned) - 1 and abs(binned[high + 1] - level) < band:
            high += 1
        # Stretches that overlap are one, with a ripple on it.
        if found and low <= found[-1][1]:
            low, _ = found.pop()
        found.append((low, high))
    return found


def _level(binned: Cells, low: int, high: int) -> float:
    return float(np.median(binned[low : high + 1]))


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
