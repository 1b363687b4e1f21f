"""Commands as a user sees them, run in this process."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
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


def command_in(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str,
    columns: int = 120,
) -> Command:
    """A command with its first arguments, run in a folder on a terminal of that width."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", str(columns))
    return partial(outcome, capsys, *arguments)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command refuses its arguments, with exit code 2."""
    code, output, errors = outcome(capsys, *map(str, arguments))
    assert code == 2
    if arguments[0] in ("train", "resume", "sweep"):  # which may have printed their title
        assert "Traceback" not in output
    else:
        assert output == ""
    assert errors.startswith("mechcausal: ")
    assert errors.endswith("\n")
    assert errors.count("\n") == 1
    return errors


def check_refused(
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[object],
    parts: Sequence[str],
    folder: Path,
) -> None:
    """A command is refused in one line that holds these parts, and leaves the folder as it was."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    line = refused(capsys, *arguments)
    for part in parts:
        assert part in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
