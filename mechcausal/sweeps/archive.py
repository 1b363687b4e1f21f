"""Pack a run folder into bytes, for workers that share no disk with the sweep."""

import io
import tarfile
import tempfile
from pathlib import Path

from mechcausal.records.run_folder import LOCK_FILE, RunFolderError

MAX_BYTES = 2**31
"""The largest size that an archive may unpack to."""


def pack(folder: Path) -> bytes:
    """Compress the regular files of a folder, without links and the lock file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink() and path.name != LOCK_FILE:
                archive.add(path, arcname=path.relative_to(folder).as_posix(), recursive=False)
    return buffer.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Unpack an archive made by `pack` into a folder, in place of one that is there.

    Archives come over the network and are not trusted: every entry must be a regular file below
    the folder, and together they must not exceed `MAX_BYTES`.

    Raises:
        RunFolderError: an archive that breaks these rules or cannot be read.
        OSError: the folder cannot be written.
    """
    try:
        with (
            tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive,
            tempfile.TemporaryDirectory(prefix=".unpacked-", dir=folder.parent) as scratch,
        ):
            if sum(entry.size for entry in archive.getmembers()) > MAX_BYTES:
                raise RunFolderError(
                    f"{folder}: archive not unpacked: more than {MAX_BYTES:,} bytes"
                )
            new = Path(scratch) / "new"
            new.mkdir()
            archive.extractall(str(new), filter=_regular_file)
            # Replaced as a whole, so that no member ever has files of two states.
            if folder.exists():
                folder.replace(Path(scratch) / "old")
            new.replace(folder)
    except tarfile.FilterError as error:
        raise RunFolderError(f"{folder}: archive not unpacked: {error}") from None
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(f"{folder}: archive cannot be read: {error}") from None


def _regular_file(entry: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """A filter of `extractall`: tarfile's own `data` filter, without links."""
    if not entry.isreg():
        raise tarfile.SpecialFileError(entry)
    return tarfile.data_filter(entry, folder)
