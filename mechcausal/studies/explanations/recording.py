"""The folder of a comparison's result, and its W&B run."""

import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechcausal.recipes import WandbMode
from mechcausal.records.run_folder import RunFolderError
from mechcausal.records.wandb_runs import WandbRun

if TYPE_CHECKING:
    import wandb


def new_folder(name: str) -> Path:
    """Default folder of a result: `runs/explain_<name>/<time>-<random>`."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"explain_{name}" / f"{stamp}-{secrets.token_hex(2)}"


def make_folder(folder: Path, result: str) -> None:
    """Make the folder of a result and check that it holds none.

    Raises:
        RunFolderError: the folder is not writable, or already holds a result.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = (folder / result).exists()
    except OSError as error:
        raise RunFolderError(f"{folder}: not writable: {error.strerror or error}") from None
    if taken:
        raise RunFolderError(f"{folder}: already holds {result}; choose another folder with --out")


def start_run(
    mode: WandbMode,
    result: Path,
    warnings: list[str],
    *,
    kind: str,
    subject: str,
    name: str,
    settings: dict[str, Any],
) -> WandbRun | None:
    """Start the W&B run of a comparison; its failures become warnings.

    Args:
        mode: W&B mode; "disabled" returns None.
        result: result file; W&B's files go to its folder.
        warnings: problems are appended here.
        kind: kind of comparison, the job type.
        subject: what is compared; runs of one kind and subject form a group.
        name: distinguishes runs in a group.
        settings: the W&B config.
    """
    if mode == "disabled":
        return None
    return WandbRun(
        mode,
        result.parent,
        warnings.append,
        kept=f"the result is in {result.name}",
        project="mechcausal",
        group=f"{kind}-{subject}",
        job_type=kind,
        name=f"{kind}-{subject}-{name}",
        tags=[kind, subject],
        config=settings,
    )


def location_of(run: WandbRun | None) -> str | None:
    """The page of an online run, else its folder; None without a run."""
    return None if run is None or run.folder is None else run.url or str(run.folder)


def table_of(rows: Sequence[Mapping[str, Any]]) -> "wandb.Table":
    """A W&B table from rows with the same keys."""
    import wandb

    columns: list[str | int] = list(rows[0])
    return wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
