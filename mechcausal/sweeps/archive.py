"""Pack a run folder into bytes, for workers that share no disk with the sweep."""

import io
import tarfile
from pathlib import Path

from mechcausal.records.run_folder import LOCK_FILE, SUMMARY_FILE, RunFolderError
from mechcausal.support.files import write_atomically

MAX_BYTES = 2**31
"""The largest size that an archive may unpack to."""


def pack(folder: Path) -> bytes:
    """Compress the regular files of a folder, without links and the lock file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        # The summary marks a run as finished, so it must be unpacked last.
        for path in sorted(folder.rglob("*"), key=lambda p: (p.name == SUMMARY_FILE, p)):
            if path.is_file() and not path.is_symlink() and path.name != LOCK_FILE:
                archive.add(path, arcname=path.relative_to(folder).as_posix(), recursive=False)
    return buffer.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Unpack an archive made by `pack` into a folder; its files replace existing ones.

    Archives come over the network and are not trusted: every entry must be a regular file below
    the folder, and together they must not exceed `MAX_BYTES`.

    Raises:
        RunFolderError: an archive that breaks these rules or cannot be read.
        OSError: the folder cannot be written.
    """
    root = folder.resolve()
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            entries = archive.getmembers()
            if sum(entry.size for entry in entries) > MAX_BYTES:
                raise RunFolderError(
                    f"{folder}: archive not unpacked: more than {MAX_BYTES:,} bytes"
                )
            for entry in entries:
                target = root / entry.name
                inside = not Path(entry.name).is_absolute() and ".." not in Path(entry.name).parts
                if not (entry.isreg() and inside and target.resolve().is_relative_to(root)):
                    raise RunFolderError(
                        f"{folder}: archive not unpacked: {entry.name!r} is not a file below it"
                    )
            folder.mkdir(parents=True, exist_ok=True)
            for entry in entries:
                source = archive.extractfile(entry)
                assert source is not None  # only None for irregular files
                target = root / entry.name
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(target, source.read(), durable=False)
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(f"{folder}: archive cannot be read: {error}") from None
