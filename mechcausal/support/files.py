"""Files that are there whole or not at all, also after a crash."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Write a file that is found with its old content or its new one, never in between.

    Written under another name, synced to disk, then renamed.

    Args:
        path: of the file.
        content: of the file.
        durable: wait for the disk, which takes milliseconds. Without, the file outlives this
            process, but may be damaged where the machine fails.

    Raises:
        OSError: it cannot be written; the old file is left as it was. It names the file, never
            the temporary one.
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
    """Fill a folder that then appears whole under its name, in place of one that was there.

    Yields:
        An empty folder to write to.

    Raises:
        OSError: it cannot be written; what was there stays.
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
    """Make a rename in a folder durable, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class JsonLines:
    """A file of JSON rows that grows by whole lines.

    A row is one write to the file system, so that what was appended outlives this process. A row
    that does not fit onto the disk is taken back.
    """

    def __init__(self, path: Path) -> None:
        """Open for appending; a torn last line, left by a crash, is removed.

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
            OSError: it could not be written whole; nothing of it is left.
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
        """Close the file; a second time does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `JsonLines` wrote; a torn last line is left out.

    Raises:
        OSError: not readable.
        ValueError: a line before the last is no JSON object.
    """
    *lines, _torn = path.read_bytes().split(b"\n")
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
