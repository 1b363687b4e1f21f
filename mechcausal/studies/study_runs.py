"""The W&B run of a study: a table and its pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechcausal.recipes import WandbMode
from mechcausal.records.wandb_runs import WandbRun


def start_run(
    mode: WandbMode, folder: Path, warnings: list[str], *, kept: str, kind: str, **options: Any
) -> WandbRun:
    """Start the W&B run of a study; its failures become warnings.

    Args:
        mode: W&B mode; with "disabled" the run does nothing.
        folder: W&B's files go to this folder.
        warnings: problems are appended here.
        kept: where the result can be found if W&B fails.
        kind: kind of study, the job type.
        **options: further arguments of `wandb.init`.
    """
    return WandbRun(
        mode,
        folder,
        warnings.append,
        kept=kept,
        project="mechcausal",
        job_type=kind,
        **options,
    )


def log_table(
    run: WandbRun,
    step: int,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Path],
) -> None:
    """Log rows with the same keys as a W&B table, beside pictures."""
    if run.folder is None:
        return
    import wandb

    columns: list[str | int] = list(rows[0]) if rows else []
    table = wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
    run.log(step, {name: table}, pictures)
