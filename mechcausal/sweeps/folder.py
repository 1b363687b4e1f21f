"""The folder of a sweep: only one process runs it, and it holds one sweep only."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mechcausal.records.run_folder import LOCK_FILE
from mechcausal.support.files import write_atomically
from mechcausal.sweeps.definition import sweep_to_dict
from mechcausal.sweeps.sweep import COPY_FILE, Sweep, SweepError

# Keys of a sweep file that may change without changing its members.
_CHANGEABLE = {"pictures", "search"}


@contextmanager
def locked_sweep_folder(folder: Path, sweep: Sweep) -> Iterator[None]:
    """Make the sweep's folder, or accept one that holds the same sweep, and lock it.

    Raises:
        SweepError: the folder holds something else, cannot be written, or another process has
            locked it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_copy(folder, sweep)
        lock = FileLock(folder / LOCK_FILE)
        lock.acquire(timeout=0.5)
    except Timeout:
        raise SweepError(f"{folder}: another process is running this sweep") from None
    except OSError as error:
        raise SweepError(f"{folder}: not writable: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def write_copy(folder: Path, sweep: Sweep) -> None:
    """Write the folder's copy of the sweep."""
    write_atomically(folder / COPY_FILE, json.dumps(sweep_to_dict(sweep), indent=2))


def _check_copy(folder: Path, sweep: Sweep) -> None:
    copy = folder / COPY_FILE
    if not copy.is_file():
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if others:
            raise SweepError(
                f"{folder}: is not empty and holds no sweep (found {sorted(others)[0]}); "
                "choose another folder with --out"
            )
        return
    try:
        before = json.loads(copy.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise SweepError(f"{copy}: cannot be read; choose another folder with --out")
    now: dict[str, Any] = json.loads(json.dumps(sweep_to_dict(sweep)))
    keys = {*before, *now} - _CHANGEABLE
    different = [key for key in sorted(keys) if before.get(key) != now.get(key)]
    if different:
        raise SweepError(
            f"{folder}: holds another sweep ({', '.join(different)} differ); "
            "choose another folder with --out"
        )
