"""The result of a replication."""

import math
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """A quantity from the paper, measured in our runs.

    Attributes:
        figure: the figure it belongs to.
        quantity: what is measured, with its unit and its condition.
        ours: the mean of our runs; None if it could not be measured.
        stderr: standard error of `ours` over seeds, graphs or sequences; None for a single value.
        paper: the paper's value; None if it gives none.
        theory: the theoretical value; None if there is none.
        holds: whether the condition holds; None without a condition.
    """

    figure: str
    quantity: str
    ours: float | None
    stderr: float | None = None
    _: KW_ONLY
    paper: float | None = None
    theory: float | None = None
    holds: bool | None = None

    def as_json(self) -> dict[str, Any]:
        """The attributes as a dict; non-finite numbers become None."""
        names = ("figure", "quantity", "paper", "ours", "stderr", "theory", "holds")
        values = {name: getattr(self, name) for name in names}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }


@dataclass(frozen=True)
class Replication:
    """The rows and pictures of a replication.

    Attributes:
        rows: paper, ours, theory and verdict, in the order of the figures.
        pictures: PNG files by name, `<figure>` or `<figure>_<part>`.
        failed: error messages by run or figure.
        folder: folder of the runs, the pictures, the table and the page.
        warnings: problems with recording and drawing.
        figures: what was asked for; empty for all figures of the first paper.
        options: the command's options that decided what was trained.
    """

    rows: list[Row]
    pictures: dict[str, Path]
    failed: dict[str, str]
    folder: Path
    warnings: list[str] = field(default_factory=list)
    figures: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every condition holds and nothing failed."""
        return not self.failed and all(row.holds is not False for row in self.rows)
