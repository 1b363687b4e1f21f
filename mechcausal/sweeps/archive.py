"""A run folder as bytes, for workers that share no disk with the sweep."""

import io
import tarfile
from pathlib import Path

from mechcausal.records.run_folder import LOCK_FILE, SUMMARY_FILE, RunFolderError
from mechcausal.support.files import write_atomically

MAX_BYTES = 2**31
"""The most that an archive may unpack to."""


def pack(folder: Path) -> bytes:
    """The regular files of a folder, compressed; links and the lock stay behind."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        # The summary says that a run has finished: it comes last.
        for path in sorted(folder.rglob("*"), key=lambda p: (p.name == SUMMARY_FILE, p)):
            if path.is_file() and not path.is_symlink() and path.name != LOCK_FILE:
                archive.add(path, arcname=path.relative_to(folder).as_posix(), recursive=False)
    return buffer.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Put what `pack` packed into a folder, file by file in the place of those that are there.

    A worker's archive comes over the network: every entry has to be a regular file below the
    folder, and all of them together no larger than memory would bear.

    Raises:
        RunFolderError: an entry that is anything else, or too much of them.
        OSError: the folder cannot be written.
    """
    root = folder.resolve()
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            entries = archive.getmembers()
            if sum(entry.size for entry in entries) > MAX_BYTES:
                raise RunFolderError(f"{folder}: an archive of more than {MAX_BYTES:,} bytes")
            for entry in entries:
                place = root / entry.name
                inside = not Path(entry.name).is_absolute() and ".." not in Path(entry.name).parts
                if not (entry.isreg() and inside and place.resolve().is_relative_to(root)):
                    raise RunFolderError(f"{folder}: an archive with {entry.name!r}: not unpacked")
            folder.mkdir(parents=True, exist_ok=True)
            for entry in entries:
                source = archive.extractfile(entry)
                assert source is not None  # a regular file
                place = root / entry.name
                place.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(place, source.read(), durable=False)
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(f"{folder}: an archive that cannot be read: {error}") from None
