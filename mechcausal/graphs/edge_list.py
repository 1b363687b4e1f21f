r"""Edge-list files: UTF-8 text with one edge, `parent child`, per line.

Blanks, a comma or `->` separate the two fields; the child may be the word `query`. A line with one
number names a position without an edge, such as an isolated root. `#` starts a comment. The graph
has all positions up to the largest number named; positions without parents are roots.

Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "graph.txt")
    ...     _ = path.write_text("0 1  # an edge\n0 -> 2\n3\n")
    ...     read_edge_list(path)
    ([[], [0], [0], []], None)
"""

import re
import reprlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mechcausal.graphs.faults import MAX_POSITIONS, QUERY, GraphError, order_fault

MAX_FILE_BYTES = 4 * 2**20
"""The largest file read: bounds the memory that a file can use."""


def read_edge_list(path: str | Path) -> tuple[list[list[int]], list[int] | None]:
    """Read the parents of each position and of the query (None if the file names none).

    Raises:
        GraphError: The file cannot be read, is larger than `MAX_FILE_BYTES` or not text, or a line
            is invalid; the message names the file, the line and what is allowed.
    """
    size = 0
    line_of: dict[tuple[int, int | str], int] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        parent, child = _parse_line(content, f"{path}:{number}")
        size = max(size, parent + 1, child + 1 if isinstance(child, int) else 0)
        if child is None:
            continue
        first = line_of.setdefault((parent, child), number)
        if first != number:
            edge = f"edge {parent} → {child}"
            raise GraphError(f"{path}:{number}: {edge} is given twice, first on line {first}")
    if size == 0:
        raise GraphError(f"{path}: found no edge: write one 'parent child' pair per line")
    edges = [(parent, child) for parent, child in line_of if isinstance(child, int)]
    parents: list[list[int]] = [[] for _ in range(size)]
    for parent, child in edges:
        if parent >= child:
            fault = order_fault((parent, child), edges)
            raise GraphError(f"{path}:{line_of[parent, child]}: {fault}")
        parents[child].append(parent)
    return parents, [parent for parent, child in line_of if child == QUERY] or None


def write_edge_list(
    path: str | Path, parents: Sequence[Sequence[int]], query_parents: Sequence[int] | None
) -> None:
    """Write a file that `read_edge_list` reads back as the same parents.

    Raises:
        GraphError: The file cannot be written.
    """
    edges = [(parent, child) for child, row in enumerate(parents) for parent in row]
    connected = {end for edge in edges for end in edge} | set(query_parents or ())
    lines = [
        f"# {len(parents)} positions, one 'parent child' or isolated position per line",
        *(f"{position}" for position in range(len(parents)) if position not in connected),
        *(f"{parent} {child}" for parent, child in edges),
        *(f"{parent} {QUERY}" for parent in query_parents or ()),
    ]
    try:
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise GraphError(f"{path}: cannot be written: {error.strerror}") from error


def _read_text(path: str | Path) -> str:
    source = Path(path)
    try:
        # A device or a pipe could block or never end.
        if source.exists() and not source.is_file():
            raise ValueError("not a plain file")
        with source.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # a null character in a path is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise GraphError(f"{path}: cannot be read: {reason}") from error
    if len(data) > MAX_FILE_BYTES:
        raise GraphError(
            f"{path}: more than {MAX_FILE_BYTES} bytes, the most an edge list may have"
        )
    if b"\0" not in data:
        with suppress(UnicodeDecodeError):
            return data.decode("utf-8-sig")
    raise GraphError(f"{path}: not a text file: an edge list is UTF-8 text")


def _parse_line(content: str, where: str) -> tuple[int, int | str | None]:
    """The parent and child on a line without its comment; None for a missing child."""
    separated = content.replace("->", ",")
    fields = separated.split(",") if "," in separated else separated.split()
    if len(fields) > 2:
        raise GraphError(
            f"{where}: found {len(fields)} fields, {reprlib.repr(content)}:"
            " allowed are 'parent child' or a lone position"
        )
    parent = _parse_position(fields[0].strip(), where)
    if len(fields) == 1:
        return parent, None
    child = fields[1].strip()
    return parent, child if child == QUERY else _parse_position(child, where, f" or {QUERY!r}")


def _parse_position(field: str, where: str, alternative: str = "") -> int:
    # int() would raise its own error for thousands of digits; nine digits suffice.
    number = re.fullmatch("0*([0-9]{1,9})", field)
    if number is None or int(number[1]) >= MAX_POSITIONS:
        raise GraphError(
            f"{where}: found {reprlib.repr(field)}:"
            f" allowed are positions from 0 to {MAX_POSITIONS - 1}{alternative}"
        )
    return int(number[1])
