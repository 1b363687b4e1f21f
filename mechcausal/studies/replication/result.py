"""The result of a replication."""

from dataclasses import dataclass, field
from pathlib import Path

from mechcausal.studies.rows import Row


@dataclass(frozen=True)
class Replication:
    """The rows and pictures of a replication.

    Attributes:
        rows: paper, ours, theory and verdict, in the order of the figures.
        pictures: PNG files by name, `<figure>` or `<figure>_<part>`.
        failed: error messages by run or figure.
        folder: folder of the runs, the pictures, the table and the page.
        warnings: problems with recording and drawing.
        figures: the figures that were made; empty for all of them.
    """

    rows: list[Row]
    pictures: dict[str, Path]
    failed: dict[str, str]
    folder: Path
    warnings: list[str] = field(default_factory=list)
    figures: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every condition holds and nothing failed."""
        return not self.failed and all(row.holds is not False for row in self.rows)
