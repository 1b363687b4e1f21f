"""Edge-list files: one edge, `parent child`, per line of a UTF-8 text.

The two fields are separated by blanks, a comma or `->`; the child may be the word `query`. A line
with one number says that this position exists, which isolated roots need. `#` starts a comment. The
graph reaches up to the largest number named; positions without parents are roots.
"""

import re
import reprlib
from contextlib import suppress
from pathlib import Path

from mechcausal.graphs.causal_graph import MAX_POSITIONS, QUERY, CausalGraph, GraphError, order_fault

MAX_FILE_BYTES = 4 * 2**20
"""The largest file read, which bounds what we allocate for it."""


def read_edge_list(path: str | Path) -> tuple[list[list[int]], list[int] | None]:
    """Read the parents of each position and of the query, None if the file does not name it.

    Raises:
        GraphError: The file cannot be read, is larger than `MAX_FILE_BYTES`, is not text, or a line
            is not as described; the message names the file, the line and what is allowed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "graph.txt")
        ...     _ = path.write_text("0 1  # an edge\\n0 -> 2\\n3\\n")
        ...     read_edge_list(path)
        ([[], [0], [0], []], None)
    """
    positions: set[int] = set()
    edge_lines: dict[tuple[int, int], int] = {}
    query_lines: dict[int, int] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        parent, *children = _parse_line(content, f"{path}:{number}")
"""
