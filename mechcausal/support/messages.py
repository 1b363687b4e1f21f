"""Make text from files and errors safe for a message: short and without control characters.

A file may contain escape sequences that control the terminal.
"""

import difflib
import shlex
from collections.abc import Iterable


def printable(text: str) -> str:
    r"""The text with unprintable characters replaced by their escapes.

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
    r"""The first line of an error's message, or the name of its type if it has none.

    Example:
        >>> first_line(ValueError("odd\nand more")), first_line(MemoryError())
        ('odd', 'MemoryError')
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def excerpt(value: object, limit: int = 60) -> str:
    """The beginning of a value as text, printable and on one line.

    Example:
        >>> excerpt("a" * 100, limit=10)
        'aaaaaaa...'
    """
    text = str(value)
    # Cut first: the text may be large.
    line = printable(" ".join(text[: 4 * limit].split()))
    return line if len(line) <= limit and len(text) <= 4 * limit else line[: limit - 3] + "..."


def shell_command(*words: object) -> str:
    """A command for the user to copy, with its words quoted for the shell.

    Example:
        >>> shell_command("mechcausal", "resume", "runs/my run")
        "mechcausal resume 'runs/my run'"
    """
    return shlex.join(map(str, words))


def suggestion(word: str, allowed: Iterable[str], *, closeness: float = 0.6) -> str:
    """Suggest the allowed word that is closest to a wrong one; empty if none is close.

    Args:
        word: the wrong word.
        allowed: the allowed words.
        closeness: minimum similarity, from 0 to 1.

    Example:
        >>> suggestion("batchsize", ["batch_size", "beta0"])
        ', did you mean batch_size?'
    """
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=closeness)
    return f", did you mean {close[0]}?" if close else ""
