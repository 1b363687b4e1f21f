"""Parse command lines with tyro; its error boxes become one-line errors."""

import contextlib
import io
from collections.abc import Sequence
from typing import TypeVar, cast

import tyro

T = TypeVar("T")


class RefusedError(Exception):
    """Bad input to a command; the message is one line."""


def parse(kind: type[T], arguments: Sequence[str], *, command: str, default: T | None = None) -> T:
    """Parse arguments with tyro.

    Raises:
        RefusedError: tyro rejects the arguments.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            prog = f"mechcausal {command}"
            parsed = tyro.cli(kind, prog=prog, args=list(arguments), default=default)
            return cast(T, parsed)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise RefusedError(_first_lines(errors.getvalue())) from None


def _first_lines(box: str) -> str:
    """The message of a tyro error box: its text before the first rule, and its suggestions."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    lines = [line for line in lines if line and not line.startswith("╰")]
    is_rule = [set(line) <= {"─", "-"} for line in lines]
    if is_rule[1:2] == [True]:  # without box characters the title is underlined with a rule
        lines, is_rule = lines[2:], is_rule[2:]
    head = lines[: is_rule.index(True)] if True in is_rule else lines
    message = " ".join(line for line in head if not line.startswith("╭"))
    start = next((i for i, line in enumerate(lines) if line.startswith("Perhaps you meant")), None)
    if start is not None:
        close = [
            line.split()[0].rstrip(",")
            for line in lines[start + 1 :]
            if line.startswith("--") and line.strip("-")
        ]
        message += f"; did you mean {' or '.join(close[:3])}?"
    return message
