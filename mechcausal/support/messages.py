"""What a file or an error says, made fit for a message: short, and without control characters.

A file's content may hold anything, escape sequences that steer a terminal among it.
"""

import difflib
import shlex
from collections.abc import Iterable


def printable(text: str) -> str:
    r"""The text with every character that does not print, a blank aside, as its escape.

    Example:
        >>> print(printable("red \x1b[31m"))
        red \x1b[31m
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def first_line(error: BaseException) -> str:
    r"""The first line of what an error says; the name of its type where it says nothing.

    Example:
        >>> first_line(ValueError("odd\nand more")), first_line(MemoryError())
        ('odd', 'MemoryError')
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def excerpt(value: object, limit: int = 60) -> str:
    """The beginning of a file's content, printable and on one line.

    Example:
        >>> excerpt("a" * 100, limit=10)
        'aaaaaaa...'
    """
    text = str(value)
    # Cut first: what is escaped or split may be large.
    line = printable(" ".join(text[: 4 * limit].split()))
    return line if len(line) <= limit and len(text) <= 4 * limit else line[: limit - 3] + "..."


def shell_command(*words: object) -> str:
    """A command for the user to copy, its words quoted for the shell.

    Example:
        >>> shell_command("mechcausal", "resume", "runs/my run")
        "mechcausal resume 'runs/my run'"
    """
    return shlex.join(map(str, words))


def suggestion(word: str, allowed: Iterable[str], *, closeness: float = 0.6) -> str:
    """What may have been meant by a word that is not allowed; empty where nothing is close.

    Args:
        word: as it was found.
        allowed: words that it may stand for.
        closeness: how like it the word must be, from 0 to 1.

    Example:
        >>> suggestion("batchsize", ["batch_size", "beta0"])
        ', did you mean batch_size?'
    """
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=closeness)
    return f", did you mean {close[0]}?" if close else ""
