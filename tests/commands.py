"""Commands as a user sees them, run in this process."""

from collections.abc import Callable
from typing import TypeAlias

import pytest

from mechcausal.cli.main import main

Command: TypeAlias = Callable[..., tuple[int, str, str]]
"""Run a command with some arguments: exit code, output, error output."""


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and error output of a command."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    captured = capsys.readouterr()
    return code, captured.out, captured.err
