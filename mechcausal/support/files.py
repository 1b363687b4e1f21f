"""Write files so that a crash leaves the old content or the new, never a part."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Write a file that always has either its old content or the new one.

    The content goes to a temporary file, which is synced to disk and renamed.

    Args:
        path: path of the file.
        content: content of the file.
        durable: wait for the disk, which takes milliseconds. If False, the file survives the end
            of this process, but a failure of the machine may damage it.

    Raises:
        OSError: the file cannot be written; the old one is unchanged. The error names the file,
            not the temporary one.
    """
    temporary = path.with_name(f".{path.name}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def write_folder_atomically(folder: Path) -> Iterator[Path]:
    """Fill a temporary folder that then replaces `folder`.

    Yields:
        An empty folder to write to.

    Raises:
        OSError: it cannot be written; the old folder is unchanged.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _sync_folder(temporary)
        if folder.exists():
            folder.replace(old)
        temporary.replace(folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder durable, if the file system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class JsonLines:
    """A file of JSON rows, one a line, for appending.

    Each row is one write to the file system and survives the end of this process. A row that does
    not fit onto the disk is removed again.
    """

    def __init__(self, path: Path) -> None:
        """Open for appending, and remove an incomplete last line that a crash left.

        Raises:
            OSError: not writable.
        """
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        content = path.read_bytes()
        self._size = content.rfind(b"\n") + 1
        if self._size < len(content):
            os.ftruncate(self._descriptor, self._size)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row.

        Raises:
            OSError: the row could not be written; no part of it stays in the file.
        """
        data = (json.dumps(row) + "\n").encode()
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._descriptor, data[written:], self._size + written)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(data)

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `JsonLines` wrote, without an incomplete last line.

    Raises:
        OSError: not readable.
        ValueError: a line before the last is no JSON object.
    """
    *lines, _incomplete = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a row of figures")
        rows.append(row)
    return rows
