"""`replicate`: train missing runs, measure, draw, record."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mechcausal.recipes import Recipe, WandbMode
from mechcausal.records.wandb_runs import resolve_mode
from mechcausal.studies.replication.figures import FIGURES, Figure
from mechcausal.studies.replication.page import write_page, write_table
from mechcausal.studies.replication.paper_settings import with_paper_settings
from mechcausal.studies.replication.result import Replication, Row
from mechcausal.studies.replication.runs import Member, Run, run_all
from mechcausal.studies.study_runs import log_table, start_run
from mechcausal.support.messages import first_line

TABLE_FILE = "replication.json"
PAGE_FILE = "replication.md"
TASKS = "tasks"
"""Stands for every figure that goes beyond the first paper."""


class ReplicationError(ValueError):
    """An unknown figure; the message is one line for the user."""


def replicate(
    figures: Sequence[str] = (),
    *,
    folder: str | Path,
    quick: bool = False,
    paper_settings: bool = False,
    recipes: Sequence[str] = (),
    workers: int | None = None,
    device: str = "cpu",
    wandb_mode: WandbMode | None = None,
    group: str | None = None,
    adjust: Callable[[Recipe], Recipe] = lambda recipe: recipe,
    on_done: Callable[[str, str], None] = lambda name, outcome: None,
) -> Replication:
    """Reproduce figures of the paper.

    Args:
        figures: names in `FIGURES`, or "tasks" for all that go beyond the first paper; all others
            when empty.
        folder: folder for runs, which are reused, and for table, page and pictures.
        quick: fewer seeds and graphs, shorter runs.
        paper_settings: train with the authors' optimisers, steps and batches, see `PAPER_SETTINGS`;
            without names, the figures that have them.
        recipes: names of bundled recipes, to measure only their runs; all when empty.
        workers: runs to train at a time, one thread each; one per core when absent.
        device: device of every run.
        wandb_mode: see `wandb_runs.resolve_mode`.
        group: W&B group of every run; the folder's name when absent.
        adjust: applied last to every recipe.
        on_done: called with the name of a run or figure and its outcome.

    Returns:
        Rows, pictures and failures. A figure whose runs failed has no rows.

    Raises:
        ReplicationError: an unknown figure, one without the paper's settings, a recipe that no
            figure uses, or both `quick` and `paper_settings`.
        TrackingError: WANDB_MODE is not a W&B mode.
        StopRequested: a signal stopped the training.
        OSError: the folder cannot be written.
    """
    chosen = _chosen(figures, quick=quick, paper_settings=paper_settings, recipes=recipes)
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

    needed = [member for _, members in chosen.values() for member in members]
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
    for name, (figure, members) in chosen.items():
        own = [runs[member.name] for member in members if member.name in runs]
        if len(own) < len(members):
            failed[name] = "not measured, because a run that it needs failed"
            continue
        rows += figure.measure(own, quick)
        try:
            pictures |= _draw(figure, own, folder / "figures", quick)
        except Exception as error:  # a failed picture must not lose the measurements
            warnings.append(f"{name}: not drawn: {type(error).__name__}: {first_line(error)}")
        on_done(name, "measured")
    options = _options(quick, paper_settings, recipes)
    replication = Replication(rows, pictures, failed, folder, warnings, tuple(figures), options)
    write_table(replication, folder / TABLE_FILE)
    write_page(replication, folder / PAGE_FILE)
    _log(replication, mode, group)
    return replication


def check_figures(
    figures: Sequence[str],
    *,
    quick: bool = False,
    paper_settings: bool = False,
    recipes: Sequence[str] = (),
) -> None:
    """Check that these figures can be made so; arguments and errors as of `replicate`."""
    _chosen(figures, quick=quick, paper_settings=paper_settings, recipes=recipes)


def _chosen(
    figures: Sequence[str], *, quick: bool, paper_settings: bool, recipes: Sequence[str]
) -> dict[str, tuple[Figure, list[Member]]]:
    """The figures to make, each with the runs to measure."""
    if quick and paper_settings:
        raise ReplicationError("--quick and --paper-settings exclude each other: leave out one")
    for name in figures:
        if name not in FIGURES and name != TASKS:
            allowed = ", ".join([*FIGURES, TASKS, "all"])
            raise ReplicationError(f"{name}: no such figure; allowed: {allowed}")
    chosen: dict[str, tuple[Figure, list[Member]]] = {}
    used: list[str] = []
    for name, figure in FIGURES.items():
        beyond = figure.group == TASKS
        if not (name in figures or (TASKS in figures if beyond else not figures)):
            continue
        members = figure.members(quick)
        if paper_settings:
            members = with_paper_settings(members) if figure.group == "paper" else []
        if figures and not members:
            raise ReplicationError(
                f"{name}: the paper has no settings for it; --paper-settings is for "
                f"{', '.join(f for f, figure in FIGURES.items() if figure.group == 'paper')}"
            )
        used += [member.recipe for member in members]
        members = [member for member in members if not recipes or member.recipe in recipes]
        if members:
            chosen[name] = figure, members
    if unknown := [name for name in recipes if name not in used]:
        raise ReplicationError(
            f"--recipes: {unknown[0]}: these figures train {', '.join(dict.fromkeys(used))}"
        )
    return chosen


def _options(quick: bool, paper_settings: bool, recipes: Sequence[str]) -> tuple[str, ...]:
    """The command's options, for the page."""
    options = ["--quick"] if quick else ["--paper-settings"] if paper_settings else []
    return tuple([*options, "--recipes", *recipes] if recipes else options)


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
