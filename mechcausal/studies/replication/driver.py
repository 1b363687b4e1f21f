"""`replicate`: train missing runs, measure, draw, record."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mechcausal.recipes import Recipe, WandbMode
from mechcausal.records.wandb_runs import resolve_mode
from mechcausal.studies.replication.figures import FIGURES, Figure
from mechcausal.studies.replication.page import write_page, write_table
from mechcausal.studies.replication.result import Replication, Row
from mechcausal.studies.replication.runs import Run, run_all
from mechcausal.studies.study_runs import log_table, start_run
from mechcausal.support.messages import first_line

TABLE_FILE = "replication.json"
PAGE_FILE = "replication.md"


class ReplicationError(ValueError):
    """An unknown figure; the message is one line for the user."""


def replicate(
    figures: Sequence[str] = (),
    *,
    folder: str | Path,
    quick: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    wandb_mode: WandbMode | None = None,
    group: str | None = None,
    adjust: Callable[[Recipe], Recipe] = lambda recipe: recipe,
    on_done: Callable[[str, str], None] = lambda name, outcome: None,
) -> Replication:
    """Reproduce figures of the paper.

    Args:
        figures: names in `FIGURES`; all of them when empty.
        folder: folder for runs, which are reused, and for table, page and pictures.
        quick: fewer seeds and graphs, shorter runs.
        workers: runs to train at a time, one thread each; one per core when absent.
        device: device of every run.
        wandb_mode: see `wandb_runs.resolve_mode`.
        group: W&B group of every run; the folder's name when absent.
        adjust: applied last to every recipe.
        on_done: called with the name of a run or figure and its outcome.

    Returns:
        Rows, pictures and failures. A figure whose runs failed has no rows.

    Raises:
        ReplicationError: an unknown figure.
        TrackingError: WANDB_MODE is not a W&B mode.
        StopRequested: a signal stopped the training.
        OSError: the folder cannot be written.
    """
    chosen = _chosen(figures)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mode = resolve_mode(wandb_mode)
    group = group or folder.resolve().name

    def prepared(recipe: Recipe) -> Recipe:
        changes = {
            "device": device,
            "wandb__mode": mode,
            "wandb__group": group,
            "wandb__page": False,
        }
        return adjust(recipe.with_overrides(**changes))

    needed = [member for figure in chosen.values() for member in figure.members(quick)]
    runs, failed = run_all(
        needed,
        folder,
        workers=workers,
        adjust=prepared,
        on_done=on_done,
    )
    rows: list[Row] = []
    pictures: dict[str, Path] = {}
    warnings: list[str] = []
    for name, figure in chosen.items():
        own = [runs[member.name] for member in figure.members(quick) if member.name in runs]
        if len(own) < len(figure.members(quick)):
            failed[name] = "not measured, because a run that it needs failed"
            continue
        rows += figure.measure(own, quick)
        try:
            pictures |= _draw(figure, own, folder / "figures", quick)
        except Exception as error:  # a failed picture must not lose the measurements
            warnings.append(f"{name}: not drawn: {type(error).__name__}: {first_line(error)}")
        on_done(name, "measured")
    made = () if len(chosen) == len(FIGURES) else tuple(chosen)
    replication = Replication(rows, pictures, failed, folder, warnings, made)
    write_table(replication, folder / TABLE_FILE)
    write_page(replication, folder / PAGE_FILE, quick=quick)
    _log(replication, mode, group)
    return replication


def check_figures(figures: Sequence[str]) -> None:
    """Check the names of figures.

    Raises:
        ReplicationError: a name is unknown.
    """
    for name in figures:
        if name not in FIGURES:
            raise ReplicationError(f"{name}: no such figure; allowed: {', '.join(FIGURES)}, all")


def _chosen(figures: Sequence[str]) -> dict[str, Figure]:
    check_figures(figures)
    return {name: figure for name, figure in FIGURES.items() if not figures or name in figures}


def _draw(figure: Figure, runs: list[Run], folder: Path, quick: bool) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, drawing in figure.draw(runs, quick).items():
        pictures[name] = folder / f"{name}.png"
        drawing.savefig(pictures[name], dpi=110)
    return pictures


def _log(replication: Replication, mode: WandbMode, group: str) -> None:
    """Log the table and the pictures as another W&B run of the group."""
    run = start_run(
        mode,
        replication.folder,
        replication.warnings,
        kept=f"the table is in {TABLE_FILE}",
        kind="replication",
        group=group,
        name=f"{group}-table",
        tags=["replication"],
    )
    rows = [row.as_json() for row in replication.rows]
    log_table(run, 0, "replication", rows, replication.pictures)
    holds = [row.holds for row in replication.rows]
    run.finish({"holds": holds.count(True), "does_not_hold": holds.count(False)}, exit_code=0)
