"""One line of the comparison: paper, ours, theory, verdict."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True)
class Row:
    """A quantity of the paper, measured again.

    Attributes:
        figure: the figure it belongs to.
        quantity: what is measured, with its unit and what must hold.
        paper: the paper's value; None where it gives none.
        ours: the mean of our runs; None where nothing was found.
        stderr: its standard error over seeds, graphs or sequences; None for a single value.
        theory: what theory says; None where it says nothing.
        holds: whether what must hold does; None where nothing must.
    """

    figure: str
    quantity: str
    paper: float | None
    ours: float | None
    stderr: float | None
    theory: float | None
    holds: bool | None

    def as_json(self) -> dict[str, Any]:
        """The attributes, numbers that are not finite as None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error where there are two values or more.

    Example:
        >>> mean_and_stderr([1.0, 3.0]), mean_and_stderr([2.0])
        ((2.0, 1.0), (2.0, None))
    """
    if len(values) < 2:
        return values[0], None
    return fmean(values), stdev(values) / math.sqrt(len(values))
