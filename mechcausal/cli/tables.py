"""Tables and locations in the terminal, as several commands print them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def make_table(headings: Sequence[str], *, title: str | None = None, n_left: int = 1) -> "Table":
    """An empty table with a line below its headings.

    Args:
        headings: one per column.
        title: title above the table.
        n_left: number of columns, from the left, whose cells are aligned left.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    # As Text: rich would read brackets in the title as markup.
    table = Table(title=title and Text(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="left" if column < n_left else "right")
    return table


def print_locations(locations: Mapping[str, object]) -> None:
    """Print where the parts of a result are, a line each; `None` is left out."""
    given = {f"{label}:": location for label, location in locations.items() if location is not None}
    width = max(map(len, given), default=0)
    for label, location in given.items():
        print(f"{label:{width}} {location}")
