"""`mechcausal sync`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mechcausal.cli.parsing import RefusedError, parse
from mechcausal.recipes import load_recipe
from mechcausal.records.run_folder import (
    RECIPE_FILE,
    find_runs,
    hold,
    is_held,
    read_metrics,
    read_process,
    read_summary,
)
from mechcausal.support.messages import shell_command


@dataclass
class Sync:
    """Upload the offline W&B fragments of runs, oldest first."""

    run: tyro.conf.Positional[Path]
    """A run folder, or a folder of runs."""
    dry_run: bool = False
    """Print the `wandb sync` commands instead of running them."""


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0, or 1 when a fragment was not uploaded."""
    options = parse(Sync, arguments, command="sync")
    runs = find_runs(options.run)
    if not runs:
        raise RefusedError(f"{options.run}: no run folder there")
    failed = False
    for run in runs:
        failed |= not _sync_run(run, dry_run=options.dry_run)
    return 1 if failed else 0


def _sync_run(run: Path, *, dry_run: bool) -> bool:
    """Upload one run's fragments, stopping at the first failure; return whether all arrived."""
    from mechcausal.records.wandb_fragments import (
        fragments,
        is_uploaded,
        sync,
        sync_command,
        wandb_steps,
    )

    if is_held(run):
        print(f"{run}: still running; left for later")
        return True
    run_id = read_process(run).get("wandb_id")
    run_fragments = fragments(run, run_id) if isinstance(run_id, str) else []
    if not run_fragments:
        print(f"{run}: no W&B run in it")
    if not all(fragment.name.startswith("offline-") for fragment in run_fragments):
        # An online fragment has sent all earlier rows too: log only the missing rows again.
        if dry_run:
            print(f"{run}: went online: the rows that have not arrived are sent again")
            return True
        try:
            return _report(run, _send_again(run))
        except (OSError, ValueError) as error:
            return _report(run, str(error))
    for fragment in run_fragments:
        if is_uploaded(fragment):
            print(f"{fragment}: uploaded already")
        elif not wandb_steps(fragment):
            print(f"{fragment}: holds no rows; skipped")
        elif dry_run:
            print(shell_command(*sync_command(fragment)))
        elif not _report(fragment, sync(fragment)):
            return False  # uploading a later fragment first would put its rows in the wrong order
    return True


def _send_again(folder: Path) -> str:
    """Send the server of an online run the rows that it lacks; return the warnings, or "".

    `wandb sync` would upload the rows that have arrived a second time.

    Raises:
        RunFolderError, RecipeError, OSError, ValueError: the run cannot be read or written.
    """
    from mechcausal.records.tracking import RunRecord

    with hold(folder):
        summary, rows = read_summary(folder), read_metrics(folder)
        recipe = load_recipe(folder / RECIPE_FILE)
        environment = read_process(folder).get("environment")
        record = RunRecord(folder, recipe, "online", rows=rows, environment=environment)
        sent = record.mode == "online"
        record.finish(summary, summary.get("state", "interrupted"))
        return "" if sent and not record.warnings else "; ".join(record.warnings)


def _report(path: Path, problem: str) -> bool:
    """Print the outcome of an upload; return whether it succeeded."""
    if problem:
        print(f"mechcausal: {path}: not uploaded: {problem}", file=sys.stderr)
    else:
        print(f"{path}: uploaded")
    return not problem
