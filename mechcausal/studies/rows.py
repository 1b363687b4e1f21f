"""One row of the replication table: paper, ours, theory, verdict."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """A quantity from the paper, measured in our runs.

    Attributes:
        figure: the figure it belongs to.
        quantity: what is measured, with its unit and its condition.
        paper: the paper's value; None if it gives none.
        ours: the mean of our runs; None if it could not be measured.
        stderr: standard error of `ours` over seeds, graphs or sequences; None for a single value.
        theory: the theoretical value; None if there is none.
        holds: whether the condition holds; None without a condition.
    """

    figure: str
    quantity: str
    paper: float | None
    ours: float | None
    stderr: float | None
    theory: float | None
    holds: bool | None

    def as_json(self) -> dict[str, Any]:
        """The attributes as a dict; non-finite numbers become None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }
