"""What a file or an error says, made fit for a message: short, and without control characters.

A file's content may hold anything, escape sequences that steer a terminal among it.
"""


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
