"""`mechcausal formation`."""

import json
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mechcausal.cli.parsing import RefusedError, parse
from mechcausal.cli.tables import make_table, print_locations
from mechcausal.recipes import WandbMode
from mechcausal.support.messages import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mechcausal.studies.formation import FormationResult, Series
    from mechcausal.studies.formation.driver import Plan, Progress

MOST_ROWS = 20


@dataclass
class Formation:
    """When the heads of a model formed: their scores at every checkpoint, public or your own."""

    target: tyro.conf.Positional[str] = ""
    """A model on the Hugging Face Hub whose revisions are named by their step, such as
    EleutherAI/pythia-70m; a folder of checkpoints (checkpoint-500, step1000); or a run folder."""
    revisions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="R [R ...]")] = ()
    """Names, steps or patterns ('step*000') of the checkpoints to score; all when absent."""
    without: Annotated[tuple[str, ...], tyro.conf.arg(metavar="R [R ...]")] = ()
    """Names, steps or patterns of checkpoints to leave out."""
    every: int | None = None
    """Leave out checkpoints less than this many steps after the one before; the last stays."""
    keep: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep downloads, in the Hugging Face cache; otherwise each is deleted after use."""
    with_copies: tyro.conf.FlagCreatePairsOff[bool] = False
    """Count checkpoints that hold the weights of another step, too; they are left out otherwise."""
    threshold: float = 0.4
    """Score at which a head counts as formed."""
    axis: Literal["step", "log"] = "step"
    """Fit the rise over the step, or over log(1 + step), which suits checkpoints that double."""
    sequences: int = 32
    """Repeated sequences to score, plus as many control sequences without repetition."""
    repeat_lengths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="R [R ...]")] = ()
    """Lengths of the repeated block; about five that fit the context when absent."""
    out: Path | None = None
    """Folder for scores, table, picture and page; runs/formation_<model> when absent. The same
    command goes on in the same folder."""
    all: bool = False
    """Show every head that formed, not only the first."""
    json: bool = False
    """Print one JSON object."""
    csv: bool = False
    """Print comma-separated values, a row for every head that formed."""
    wandb: bool = False
    """Log the result to W&B."""
    wandb_mode: WandbMode | None = None
    """W&B mode, with --wandb."""
    seed: int = 0
    """Seed of the random tokens."""
    device: str = "cpu"
    """Where to compute: cpu, cuda or cuda:N."""


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0, or 2 by way of `RefusedError`."""
    options = parse(Formation, arguments, command="formation")
    _check(options)
    from mechcausal.recipes import RecipeError
    from mechcausal.records.run_folder import RunFolderError, hold
    from mechcausal.records.wandb_runs import TrackingError, resolve_mode
    from mechcausal.studies.formation import open_series
    from mechcausal.studies.formation.pictures import log_formation
    from mechcausal.studies.targets import TargetError

    out = options.out or Path("runs") / f"formation_{_slug(options.target)}"
    warnings: list[str] = []
    location = None
    try:
        mode = resolve_mode(options.wandb_mode) if options.wandb else "disabled"
        series = open_series(options.target, scratch=out / "download", keep=options.keep)
        plan = _plan(options, series, out)
        out.mkdir(parents=True, exist_ok=True)
        with hold(out):
            result = _follow(options, series, plan, out)
            _write(result, out)
        if mode != "disabled":
            location = log_formation(result, out, mode, warnings)
    except (RecipeError, RunFolderError, TargetError, TrackingError) as error:
        raise RefusedError(str(error)) from None
    except OSError as error:
        raise RefusedError(f"{error.filename or out}: {error.strerror or error}") from None
    for warning in warnings:
        print(f"mechcausal: warning: {warning}", file=sys.stderr)
    if options.json:
        print(json.dumps(result.to_dict(), indent=2, allow_nan=False))
    elif options.csv:
        print(result.heads_frame().to_csv(index=False), end="")
    else:
        _print_tables(result, everything=options.all)
        print_locations({"page": out / "formation.html", "W&B": location})
    return 0


def _check(options: Formation) -> None:
    if not options.target:
        raise RefusedError(
            "formation needs a model: a run, a folder of checkpoints, or a name such as "
            "EleutherAI/pythia-70m"
        )
    if options.json and options.csv:
        raise RefusedError("--json and --csv: only one of them can be printed")
    if options.wandb_mode is not None and not options.wandb:
        raise RefusedError("--wandb-mode goes with --wandb")
    if not 0 <= options.seed < 2**32:
        raise RefusedError(f"--seed is {options.seed}: it must be from 0 to {2**32 - 1}")
    if not 0 < options.threshold <= 1:
        raise RefusedError(f"--threshold is {options.threshold}: above 0 and at most 1")
    for flag, value in (("--every", options.every), ("--sequences", options.sequences)):
        if value is not None and value < 1:
            raise RefusedError(f"{flag} is {value}: at least 1")
    if any(length < 3 for length in options.repeat_lengths):
        raise RefusedError(f"--repeat-lengths: {min(options.repeat_lengths)} is below 3")


def _slug(target: str) -> str:
    name = Path(target).resolve().name if Path(target).is_dir() else target
    return re.sub(r"[^\w.-]+", "-", name)[:80].strip("-") or "model"


def _plan(options: Formation, series: "Series", out: Path) -> "Plan":
    from mechcausal.studies.formation.driver import gigabytes, plan_formation
    from mechcausal.studies.formation.series import choose
    from mechcausal.studies.hub import free_bytes

    revisions = choose(
        series.revisions(),
        patterns=options.revisions,
        without=options.without,
        every=options.every,
        model=series.model,
    )
    with _bar() as show:
        show(0, len(revisions), "comparing revisions", "")
        plan = plan_formation(
            series, revisions, out, keep=options.keep, with_copies=options.with_copies
        )
    _name_left_out(plan.left_out)
    if plan.download:
        until = "and is kept" if options.keep else "then deleted"
        print(
            f"mechcausal: {len(plan.readable)} revisions, {plan.finished} of them scored already; "
            f"{gigabytes(plan.download)} to download, one revision at a time, {until}: at most "
            f"{gigabytes(plan.at_once)} on the disk, {gigabytes(free_bytes(out))} are free",
            file=sys.stderr,
        )
    return plan


def _follow(options: Formation, series: "Series", plan: "Plan", out: Path) -> "FormationResult":
    from mechcausal.studies.formation.driver import Scoring, follow_formation, gigabytes

    cache = None
    if options.keep:
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE)
    best = ""
    with _bar() as show:

        def report(progress: "Progress") -> None:
            nonlocal best
            text = progress.activity
            if progress.revision is not None:
                size = progress.revision.size
                reads = progress.activity == "reading" and size
                activity = f"fetching {gigabytes(size)}" if reads else progress.activity
                text = f"{progress.revision.name}: {activity}"
            if progress.record is not None:
                highest = float(progress.record.scores.prefix_matching.max())
                best = f"best prefix matching {highest:.2f}"
            show(progress.done, progress.total, text, best)

        result = follow_formation(
            series,
            plan,
            out,
            scoring=Scoring(
                n_sequences=options.sequences,
                repeat_lengths=options.repeat_lengths,
                threshold=options.threshold,
                seed=options.seed,
            ),
            axis=options.axis,
            with_copies=options.with_copies,
            device=options.device,
            cache=cache,
            on_progress=report,
        )
    before = {revision.name for revision in plan.left_out}
    _name_left_out([revision for revision in result.left_out if revision.name not in before])
    return result


@contextmanager
def _bar() -> "Iterator[Callable[[int, int, str, str], None]]":
    from mechcausal.cli.display import bar_on_terminal

    with bar_on_terminal() as bar:
        task = bar.add_task("", total=None, figures="")

        def show(done: int, total: int, text: str, figures: str) -> None:
            description = printable(text)
            bar.update(task, completed=done, total=total, description=description, figures=figures)

        yield show


def _name_left_out(revisions: Any) -> None:
    for revision in revisions:
        line = printable(f"{revision.name} is left out: {revision.problem}")
        print(f"mechcausal: warning: {line}", file=sys.stderr)


def _write(result: "FormationResult", out: Path) -> None:
    from mechcausal.studies.formation.pictures import draw_formation, write_formation_page
    from mechcausal.support.files import write_atomically

    content = json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n"
    write_atomically(out / "formation.json", content)
    write_atomically(out / "formation.csv", result.heads_frame().to_csv(index=False))
    write_atomically(out / "scores.csv", result.scores_frame().to_csv(index=False))
    draw_formation(result, out / "formation.png")
    write_formation_page(result, out / "formation.html")


def _print_tables(result: "FormationResult", *, everything: bool) -> None:
    from rich.console import Console

    console = Console()
    heads = result.heads()
    listed = heads if everything else heads[:MOST_ROWS]
    title = (
        f"{printable(result.model)}: {len(result.records)} checkpoints, steps "
        f"{result.steps[0]:,} to {result.steps[-1]:,}, threshold {result.threshold:g}"
    )
    headings = ("head", "score", "first at", "not yet at", "midpoint", "interval", "at the end")
    table = make_table(headings, title=title, n_left=2)
    for head in listed:
        interval = "–"
        if head.midpoint is not None:
            interval = f"{head.midpoint_low:,.0f} to {head.midpoint_high:,.0f}"
        table.add_row(
            f"{head.layer}.{head.head}",
            head.score.replace("_", " "),
            f"{head.first_crossing:,}",
            "–" if head.not_before is None else f"{head.not_before:,}",
            "–" if head.midpoint is None else f"{head.midpoint:,.0f}",
            interval,
            f"{head.last:.3f}",
        )
    if heads:
        console.print(table)
    else:
        console.print(f"{title}: no head formed", markup=False)
    if len(listed) < len(heads):
        console.print(f"{len(heads) - len(listed)} more heads formed: --all shows them")
    console.print(_losses(result))


def _losses(result: "FormationResult") -> Any:
    """A table of losses and best scores at a dozen checkpoints."""
    from mechcausal.measures.figures import HEAD_SCORES

    rows = result.revision_rows()
    spacing = max(1, -(-len(rows) // 12))
    shown = [row for at, row in enumerate(rows) if at % spacing == 0 or at == len(rows) - 1]
    headings = ("step", "loss, 1st copy", "2nd copy", "gain", "prefix", "previous", "dupl.")
    table = make_table(headings, title="best score of any head, loss on repeated tokens (nats)")
    for row in shown:
        gain = _text(row["in_context_gain"])
        if row["in_context_gain_stderr"] is not None:
            gain += f" ± {row['in_context_gain_stderr']:.3f}"
        table.add_row(
            f"{row['step']:,}",
            _text(row["loss_first_copy"]),
            _text(row["loss_second_copy"]),
            gain,
            *(_text(row[f"best_{name}"]) for name in HEAD_SCORES),
        )
    return table


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
