"""A training run as text in a terminal: attention beside the graph, sparklines, time left."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Shaped
from rich.console import Console, ConsoleOptions
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from mechcausal.measures.figures import STEP, History, figure_of, own_curves
from mechcausal.pictures.interactive.style import MOST_HEADS, by_head
from mechcausal.pictures.static.style import HEAD_SCORES
from mechcausal.pictures.terminal.text_matrix import half_blocks, pooled, shaded
from mechcausal.records.run_data import RunData

if TYPE_CHECKING:
    from mechcausal.training.run import Progress

Part = Text | Table | ProgressBar | Segment

SPARKS = "▁▂▃▄▅▆▇█"
_GAP = 3
_LINES = 8  # beside the matrices: heading, bar, titles, note, and four curves
_LARGEST = 44  # characters that a matrix is stretched to
_SMALLEST = 4
_MOST_LISTED = 8  # heads of a model on repeated tokens
_MOST_OWN = 4  # figures of an experiment of the user's own
_LABEL, _VALUES = 18, 38  # characters beside a sparkline

# Keys of figures, of which the first available one is drawn, and of constants to compare with.
_CURVES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("loss/eval",), ("loss/bayes", "loss/construction", "loss/bigram", "loss/trigram")),
    (("loss/second_copy",), ()),
    (("graph/recovered",), ()),
    (("gradient/pattern_theory_correlation", "gradient/pattern_chi2_correlation"), ()),
    (("gradient/residual_correlation",), ()),
    (("gradient/raw_correlation",), ()),
    (("induction/score",), ()),
)


@dataclass(frozen=True)
class Watched:
    """One frame of the live view, as a rich renderable.

    Attributes:
        run: the run, with its recipe.
        progress: the run's progress, with the rows of figures so far.
        seconds_left: estimated time to the end; None while unknown.
        colours: False draws matrices as shades.
    """

    run: RunData
    progress: "Progress"
    seconds_left: float | None = None
    colours: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Part]:
        """Render lines that fit into the terminal's current size."""
        width, height = options.max_width, console.height
        yield self._heading()
        yield ProgressBar(
            total=max(self.progress.n_steps, 1), completed=self.progress.step, width=width
        )
        yield Segment.line()
        if self.run.has_graph:
            panels = self._panels()
            if panels:
                yield from self._matrices(panels, width, height - _LINES)
        elif "residual/by_lag" in self.progress.matrices:
            yield from self._lags(height - _LINES)
        elif self.progress.matrices:
            yield from self._heads(height - _LINES)
        yield from self._curves(width)

    def _heading(self) -> Text:
        progress, recipe = self.progress, self.run.recipe
        left = "" if self.seconds_left is None else f" · {duration(self.seconds_left)} left"
        text = f"{progress.stage} · step {progress.step:,} of {progress.n_steps:,}{left}"
        text += f" · {recipe.name}, seed {recipe.seed}"
        return Text(text, no_wrap=True, overflow="ellipsis")

    def _panels(self) -> dict[str, Float[np.ndarray, "query key"]]:
        """The matrices to draw side by side, by title: every head of layer 1, and the graph."""
        attention = self.progress.matrices.get("attention/layer0")
        if attention is None:
            return {}
        heads = by_head(attention.float().numpy())
        names = ["attention"] if len(heads) == 1 else [f"head {i}" for i in range(len(heads))]
        panels = dict(zip(names, heads, strict=True))
        return {**panels, "true graph": self.run.ideal_attention}

    def _matrices(
        self, panels: Mapping[str, Float[np.ndarray, "query key"]], width: int, height: int
    ) -> Iterator[Part]:
        length = len(panels["true graph"])
        cell = 1 if self.colours else 2
        rows = 2 if self.colours else 1  # of cells in a line
        n_cells = _cells_per_side(len(panels), width, height, cell, rows)
        if len(panels) > 2 and (len(panels) > MOST_HEADS + 1 or n_cells < min(length, 16)):
            heads = [matrix for name, matrix in panels.items() if name != "true graph"]
            panels = {"largest of heads": np.max(heads, axis=0), "true graph": panels["true graph"]}
            n_cells = _cells_per_side(2, width, height, cell, rows)
        if n_cells < _SMALLEST:
            yield Text("(too small a terminal for the matrices)", no_wrap=True, overflow="ellipsis")
            return
        block = math.ceil(length / n_cells)
        scale = max(1, min(n_cells, _LARGEST) // length) if self.colours else 1
        lines, titles = [], []
        for name, matrix in panels.items():
            values = pooled(np.asarray(matrix, dtype=np.float64), block)
            lines.append(list(half_blocks(values, scale) if self.colours else shaded(values)))
            size = len(values) * cell * scale
            titles.append(name[:size].ljust(size + _GAP))
        yield Text("".join(titles).rstrip(), style="bold", no_wrap=True, overflow="ellipsis")
        for row in zip(*lines, strict=True):
            for segments in row:
                yield from segments
                yield Segment(" " * _GAP)
            yield Segment.line()
        if block > 1:
            yield Text(
                f"{length} positions: a cell is the largest of {block} × {block}",
                style="dim",
                no_wrap=True,
                overflow="ellipsis",
            )

    def _heads(self, height: int) -> Iterator[Part]:
        """The heads with the most prefix matching."""
        matrices = [self.progress.matrices.get(f"heads/{kind}") for kind in HEAD_SCORES]
        if matrices[0] is None:
            return
        scores = [None if m is None else m.float().numpy() for m in matrices]
        assert scores[0] is not None
        order = np.argsort(-np.nan_to_num(scores[0], nan=-1.0), axis=None, kind="stable")
        listed = order[: max(1, min(_MOST_LISTED, height - 2))]
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("head")
        for kind in HEAD_SCORES:
            table.add_column(kind.replace("_", " "), no_wrap=True)
        for index in listed.tolist():
            layer, head = divmod(index, scores[0].shape[1])
            cells = [_gauge(None if s is None else float(s[layer, head])) for s in scores]
            table.add_row(f"{layer}.{head}", *cells)
        yield table
        if len(listed) < order.size:
            yield Text(f"the best {len(listed)} of {order.size} heads", style="dim")

    def _lags(self, height: int) -> Iterator[Part]:
        """Residual information and the gradient, summed over heads, at the first lags."""
        names = ("residual/by_lag", "gradient/by_lag")
        residual, gradient = (self.progress.matrices[name].float().sum(0).numpy() for name in names)
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("lag", "residual information", "gradient"):
            table.add_column(heading, no_wrap=True)
        n_listed = max(1, min(len(residual), height - 2))
        for lag in range(n_listed):
            cells = [
                f"{bar(values[lag], np.nanmax(np.abs(values)))} {values[lag]:.3f}"
                for values in (residual, gradient)
            ]
            table.add_row(str(lag + 1), *cells)
        yield table
        if n_listed < len(residual):
            yield Text(f"the first {n_listed} of {len(residual)} lags", style="dim")

    def _curves(self, width: int) -> Iterator[Part]:
        own = [((key,), ()) for keys in own_curves(self.progress.history).values() for key in keys]
        for keys, references in (*_CURVES, *own[:_MOST_OWN]):
            key = next((key for key in keys if self._last(key) is not None), None)
            if key is None:
                continue
            levels = {name: level for name in references if (level := self._last(name)) is not None}
            value = f" {self._last(key):.3f}"
            value += "".join(f", {figure_of(name).short} {x:.3f}" for name, x in levels.items())
            columns = min(60, width - _LABEL - _VALUES)
            item = figure_of(key)
            line = Text(item.short.ljust(_LABEL), no_wrap=True, overflow="ellipsis")
            if columns >= _SMALLEST:
                values = along_steps(self.progress.history, key, self.progress.n_steps, columns)
                is_unit = item.high == 1
                low = 0.0 if is_unit else min(levels.values(), default=None)
                line.append(sparkline(values, low=low, high=1.0 if is_unit else None), style="cyan")
            line.append(value)
            yield line

    def _last(self, key: str) -> float | None:
        """The latest finite value of a figure."""
        for row in reversed(self.progress.history):
            value = row.get(key)
            if value is not None and math.isfinite(value):
                return float(value)
        return None


class Clock:
    """Estimates the remaining time from the mean time per step so far."""

    def __init__(self) -> None:
        """The first call of `seconds_left` starts the clock."""
        self._first: tuple[int, float] | None = None

    def seconds_left(self, step: int, n_steps: int, now: float | None = None) -> float | None:
        """Seconds until the last step; None at the first one."""
        now = time.monotonic() if now is None else now
        if self._first is None:
            self._first = (step, now)
        first_step, start = self._first
        if step <= first_step:
            return None
        return (now - start) / (step - first_step) * (n_steps - step)


def along_steps(
    history: History, key: str, n_steps: int, width: int
) -> Float[np.ndarray, "column"]:
    """The latest value of a figure at evenly spaced steps of the full run.

    NaN before the first value and at steps not yet reached.

    Example:
        >>> rows = [{"train/step": 0, "x": 1.0}, {"train/step": 5, "x": 3.0}]
        >>> along_steps(rows, "x", 10, 5)
        array([ 1.,  1.,  3., nan, nan])
    """
    points = [
        (int(row[STEP] or 0), float(value))
        for row in history
        if (value := row.get(key)) is not None and math.isfinite(value)
    ]
    columns = np.full(width, np.nan)
    if not points or width < 1:
        return columns
    steps, values = np.array([s for s, _ in points]), np.array([v for _, v in points])
    column_steps = np.linspace(0, max(n_steps, 1), width)
    latest = np.searchsorted(steps, column_steps, side="right") - 1
    n_reached = int(np.searchsorted(column_steps, steps[-1], side="left")) + 1
    known = (latest >= 0) & (np.arange(width) < n_reached)
    columns[known] = values[latest[known]]
    # If the last probe step lies between two columns, the right one shows it.
    columns[min(n_reached, width) - 1] = values[-1]
    return columns


def sparkline(
    values: Shaped[np.ndarray, "column"], *, low: float | None = None, high: float | None = None
) -> str:
    """Values as blocks of eight heights; NaN is a blank.

    Args:
        values: one value per character.
        low: value of the lowest block, lowered to the smallest value if that is smaller.
        high: value of the highest block, raised to the largest value if that is larger.

    Example:
        >>> sparkline(np.array([0.0, 0.5, np.nan, 1.0]))
        '▁▅ █'
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return " " * len(values)
    low = min([float(finite.min()), *([] if low is None else [low])])
    high = max([float(finite.max()), *([] if high is None else [high])])
    shares = (values - low) / ((high - low) or 1.0)
    return "".join(
        " " if math.isnan(share) else SPARKS[min(int(share * len(SPARKS)), len(SPARKS) - 1)]
        for share in shares.tolist()
    )


def duration(seconds: float) -> str:
    """Seconds as minutes:seconds, hours:minutes:seconds, or days.

    Example:
        >>> duration(75.0), duration(4000.0), duration(2e5)
        ('1:15', '1:06:40', '2 days')
    """
    total = round(min(seconds, 1e11))
    if total >= 2 * 86_400:
        return f"{total // 86_400} days"
    hours, rest = divmod(total, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _cells_per_side(n_panels: int, width: int, height: int, cell: int, rows: int) -> int:
    """How many cells per side of a matrix fit into the terminal."""
    return min((width - n_panels * _GAP) // n_panels // cell, height * rows)


def bar(value: float, largest: float) -> str:
    """A bar of ten characters, the share of the largest value; empty below 0."""
    share = value / largest if largest > 0 else 0.0
    filled = round(min(max(share, 0.0), 1.0) * 10) if math.isfinite(share) else 0
    return f"{'█' * filled}{'░' * (10 - filled)}"


def _gauge(score: float | None) -> str:
    if score is None or math.isnan(score):
        return ""
    return f"{bar(score, 1.0)} {score:.2f}"
