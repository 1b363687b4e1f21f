"""Read and upload the fragments of a W&B run in a run folder.

Starting a run and every resume write one fragment each, all with the same run id: a folder
`wandb/offline-run-<time>-<id>` or `wandb/run-<time>-<id>`.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

_ORPHAN_SECONDS = 2.0


def fragments(run: Path, run_id: str) -> list[Path]:
    """The fragments of a run in a run folder, oldest first."""
    if not re.fullmatch(r"[\w-]+", run_id):
        return []  # no id of ours
    return sorted(
        (
            path
            for suffix in ("", "-[0-9]")  # W&B numbers fragments that start in the same second
            for path in (run / "wandb").glob(f"*run-*-{run_id}{suffix}")
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


def steps_when_written(
    fragments: Collection[Path], n_steps: int, *, seconds: int
) -> dict[Path, list[int] | None]:
    """`wandb_steps` of each fragment, once they hold so many different steps or time is up.

    W&B's service may write the last rows a moment after it has finished.
    """
    deadline = time.monotonic() + seconds
    while True:
        steps = {fragment: wandb_steps(fragment) for fragment in fragments}
        n_written = len({step for written in steps.values() for step in written or ()})
        if n_written >= n_steps or time.monotonic() > deadline:
            return steps
        time.sleep(0.1)


def settle(fragment: Path) -> None:
    """Wait until nothing writes to a fragment's log any more.

    After a kill, W&B's service may go on writing for about a second.
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
    """Upload a fragment; return the error message, or "" if everything arrived.

    `wandb sync` exits with 0 even on failure, and may mark refused rows as uploaded. Success
    therefore needs both the mark and an output without errors.
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
    environment = {**os.environ, **retries, "WANDB_X_FILE_TRANSFER_RETRY_MAX": "3"}
    environment.pop("WANDB_SILENT", None)  # it would hide the errors
    environment.pop("WANDB_MODE", None)
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=600
        )
    except subprocess.TimeoutExpired:
        _unmark(fragment)
        return "gave up after 10 minutes"
    output = (result.stdout + result.stderr).splitlines()
    lines = [line.strip() for line in output if line.strip()]
    errors = [line for line in lines if "ERROR" in line or "rror while" in line]
    if is_uploaded(fragment) and not errors:
        return ""
    _unmark(fragment)
    return (errors or lines or [f"exit code {result.returncode}"])[0]


def _unmark(fragment: Path) -> None:
    for mark in fragment.glob("*.wandb.synced"):
        mark.unlink(missing_ok=True)
