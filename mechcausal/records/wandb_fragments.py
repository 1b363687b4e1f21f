"""What W&B leaves in a run folder: read back, and uploaded.

A run that is resumed keeps its id; every time it was begun or resumed left a fragment, a folder
`wandb/offline-run-<time>-<id>` or `wandb/run-<time>-<id>`.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

_ORPHAN_SECONDS = 2.0


def fragments(run: Path, run_id: str) -> list[Path]:
    """The fragments of a run in a run folder, oldest first."""
    if not re.fullmatch(r"[\w-]+", run_id):
        return []  # what mechcausal never wrote
    return sorted(
        (
            path
            for end in ("", "-[0-9]")  # the second of one second
            for path in (run / "wandb").glob(f"*run-*-{run_id}{end}")
            if path.is_dir()
        ),
        key=lambda path: path.name.removeprefix("offline-"),
    )


def wandb_steps(fragment: Path) -> list[int] | None:
    """The steps of the history rows in a fragment's log, in order; None if it cannot be read.

    Uses the log reader that ships with wandb (what `wandb leet inspect --json` runs).
    """
    from wandb.util import get_core_path

    logs = list(fragment.glob("*.wandb"))
    if len(logs) != 1:
        return None
    command = [get_core_path(), "leet", "inspect", "--json", "--run-file", str(logs[0].resolve())]
    try:
        result = subprocess.run(
            [*command, str(fragment.resolve().parent)], capture_output=True, timeout=60, check=True
        )
        lines = (line for line in result.stdout.splitlines() if b'"type":"history"' in line)
        return [int(json.loads(line)["history"]["step"].get("num", 0)) for line in lines]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return None


def settle(fragment: Path) -> None:
    """Wait until a fragment's log is complete.

    W&B's service outlives a process that was killed by a second, in which it may still write.
    """
    for log in fragment.glob("*.wandb"):
        while 0 <= time.time() - log.stat().st_mtime < _ORPHAN_SECONDS:
            time.sleep(0.1)


def count_wandb_rows(fragment: Path) -> int | None:
    """History rows in a fragment's log; None if it cannot be read."""
    steps = wandb_steps(fragment)
    return None if steps is None else len(steps)


def sync_command(fragment: Path) -> list[str]:
    """The command that uploads one fragment."""
    return ["wandb", "sync", str(fragment)]


def is_uploaded(fragment: Path) -> bool:
    """Whether W&B marked the fragment as uploaded."""
    return any(fragment.glob("*.wandb.synced"))


def sync(fragment: Path) -> str:
    """Upload a fragment; what went wrong, empty when all of it arrived.

    W&B's exit code is 0 in either case, and it may mark as uploaded what the server refused: what
    counts is its mark and that it named no error.
    """
    command = [sys.executable, "-m", *sync_command(fragment)]
    retries = {
        f"WANDB_X_{part}_{name}": value
        for part in ("GRAPHQL", "FILE_STREAM")
        for name, value in (
            ("RETRY_MAX", "3"),
            ("RETRY_WAIT_MAX_SECONDS", "3"),
            ("TIMEOUT_SECONDS", "10"),
        )
    }
    around = {**os.environ, **retries, "WANDB_X_FILE_TRANSFER_RETRY_MAX": "3"}
    around.pop("WANDB_SILENT", None)  # it would hide the errors
    around.pop("WANDB_MODE", None)
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, env=around, timeout=600
        )
    except subprocess.TimeoutExpired:
        _unmark(fragment)
        return "gave up after 10 minutes"
    said = [line.strip() for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    errors = [line for line in said if "ERROR" in line or "rror while" in line]
    if is_uploaded(fragment) and not errors:
        return ""
    _unmark(fragment)
    return (errors or said or [f"exit code {result.returncode}"])[0]


def _unmark(fragment: Path) -> None:
    for mark in fragment.glob("*.wandb.synced"):
        mark.unlink(missing_ok=True)
