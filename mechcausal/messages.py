"""What a file says, made fit for an error message: short, and without control characters.

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
