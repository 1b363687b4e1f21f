"""Texts to train on: those that every Python brings, and files of the user's."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG

CORPORA = ("topics", "stdlib")
"""Texts that every Python brings: `pydoc_data.topics`, and the standard library's source."""
MAX_BYTES = 64 * 2**20
"""The largest text file read."""


class TextError(ValueError):
    """A text that cannot be read or is too short; the message is one line for the user."""


@dataclass(frozen=True)
class Corpus:
    """A text and what identifies it.

    Attributes:
        name: one of `CORPORA`, or the path of a file.
        text: its characters.
        sha256: SHA-256 of its bytes, in hexadecimal.
        n_bytes: length in bytes, as UTF-8.
    """

    name: str
    text: str
    sha256: str
    n_bytes: int

    @property
    def is_bundled(self) -> bool:
        """Whether it comes with Python."""
        return self.name in CORPORA

    @property
    def facts(self) -> dict[str, str | int]:
        """Name, hash and lengths, for a run's summary."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "characters": len(self.text),
            "bytes": self.n_bytes,
        }


def read_corpus(name: str, *, sha256: str | None = None) -> Corpus:
    """Read a corpus of Python's, or a text file in UTF-8.

    Args:
        name: one of `CORPORA`, or the path of a file.
        sha256: what the SHA-256 of its bytes must be; None for anything.

    Raises:
        TextError: it cannot be read, is empty, too large or not UTF-8, or its hash differs.

    Example:
        >>> corpus = read_corpus("topics")
        >>> len(corpus.text) > 100_000 and corpus == read_corpus("topics", sha256=corpus.sha256)
        True
    """
    content = _bundled(name) if name in CORPORA else _file(Path(name))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{name}: not UTF-8: byte {error.start:,} is no text") from None
    if not text.strip():
        raise TextError(f"{name}: holds no text")
    found_hash = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found_hash):
        raise TextError(
            f"{name}: has the SHA-256 {found_hash}, the recipe's text_sha256 is {sha256}: it is "
            "another text, or another version of Python's"
        )
    return Corpus(name, text, found_hash, len(content))


def _bundled(name: str) -> bytes:
    if name == "topics":
        try:
            from pydoc_data import topics
        except ImportError:
            raise TextError(f"{name}: this Python comes without pydoc_data.topics") from None
        return "".join(topics.topics.values()).encode()
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    if not files:
        raise TextError(f"{name}: no source files in {folder}")
    return b"\n".join(path.read_bytes() for path in files)


def _file(path: Path) -> bytes:
    known = f"a file, or {' or '.join(CORPORA)}"
    try:
        status = path.stat()
        if S_ISDIR(status.st_mode):
            raise TextError(f"{path}: is a folder; allowed: {known}")
        if not S_ISREG(status.st_mode):
            raise TextError(f"{path}: is no regular file; allowed: {known}")
        if status.st_size > MAX_BYTES:
            raise TextError(f"{path}: {status.st_size:,} bytes; at most {MAX_BYTES:,} are read")
        return path.read_bytes()
    except FileNotFoundError:
        raise TextError(f"{path}: no such file; allowed: {known}") from None
    except OSError as error:
        raise TextError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, TextError):
            raise
        raise TextError(f"{path!s:.100}: {error}") from None  # a null character in the name
