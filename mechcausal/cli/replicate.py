"""`mechcausal replicate`."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mechcausal.cli.parsing import RefusedError, parse
from mechcausal.recipes import WandbMode

if TYPE_CHECKING:
    from mechcausal.studies.replication import Replication


@dataclass
class Replicate:
    """Reproduce the paper's figures: its values, our measurements and the theory's predictions."""

    figures: tyro.conf.Positional[tuple[str, ...]] = ()
    """figure2, figure5, figure6, figure7, figure8, figure9, theory, ood, interventions, clamps;
    "all", or no name, for all of these. Beyond the paper: mixtures, in_context_graphs, lags,
    trees; "tasks" for all of them."""
    quick: bool = False
    """Fewer seeds and graphs and shorter runs: a quarter of an hour on two cores."""
    paper_settings: bool = False
    """Train with the authors' optimisers, steps and batches, one seed of each graph: an hour or
    more for each run and core. An interrupted command goes on where it stopped."""
    recipes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    """Measure only the runs of these recipes, such as figure2_chain."""
    json: bool = False
    """Print one JSON list: figure, quantity, paper, ours, stderr, theory, holds."""
    out: Path | None = None
    """Folder for table, page, pictures and runs; finished runs in it are reused.
    runs/replication, runs/replication-quick or runs/replication-paper when absent."""
    page: Path | None = None
    """Also write the page to this file, with copies of the pictures in a folder beside it."""
    workers: int | None = None
    """Runs to train at a time, one thread each; one per core when absent."""
    device: str = "cpu"
    """Where to compute: cpu, cuda or cuda:N."""
    wandb_mode: WandbMode | None = None
    """W&B mode of every run; see `mechcausal train --help`."""
    group: str | None = None
    """W&B group of every run; the folder's name when absent."""


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0, or 1 when a run failed, whatever the verdicts."""
    options = parse(Replicate, arguments, command="replicate")
    if options.workers is not None and options.workers < 1:
        raise RefusedError(f"--workers is {options.workers}: at least 1 is needed")
    figures = tuple(name for name in options.figures if name != "all")
    if figures and "all" in options.figures:
        raise RefusedError(f"all stands for every figure: leave out {figures[0]}")
    suffix = "-quick" if options.quick else "-paper" if options.paper_settings else ""
    folder = options.out or Path("runs") / f"replication{suffix}"
    from mechcausal.recipes import RecipeError
    from mechcausal.recipes.devices import device_named
    from mechcausal.records.run_folder import RunFolderError
    from mechcausal.records.wandb_runs import TrackingError, resolve_mode
    from mechcausal.studies.replication.driver import ReplicationError, check_figures, replicate
    from mechcausal.studies.replication.page import publish

    chosen: dict[str, Any] = {
        "quick": options.quick,
        "paper_settings": options.paper_settings,
        "recipes": options.recipes,
    }
    try:
        check_figures(figures, **chosen)
        device_named(options.device)
        resolve_mode(options.wandb_mode)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"mechcausal replicate: runs and results in {folder}", file=sys.stderr, flush=True)
        replication = replicate(
            figures,
            folder=folder,
            **chosen,
            workers=options.workers,
            device=options.device,
            wandb_mode=options.wandb_mode,
            group=options.group,
            on_done=_report,
        )
    except (ReplicationError, RecipeError, RunFolderError, TrackingError) as error:
        raise RefusedError(str(error)) from None
    except KeyboardInterrupt as stop:
        print("mechcausal: interrupted; finished runs are kept and reused", file=sys.stderr)
        return 128 + getattr(stop, "number", 2)
    except OSError as error:
        raise RefusedError(f"{folder}: {error.strerror or error}") from None
    if options.page is not None:
        try:
            publish(replication, options.page)
        except OSError as error:
            raise RefusedError(f"{options.page}: {error.strerror or error}") from None
    if options.json:
        print(json.dumps([row.as_json() for row in replication.rows], indent=2))
    else:
        _print(replication)
    for name, reason in replication.failed.items():
        print(f"mechcausal: {name}: {reason}", file=sys.stderr)
    for warning in replication.warnings:
        print(f"mechcausal: warning: {warning}", file=sys.stderr)
    return 1 if replication.failed else 0


def _report(name: str, outcome: str) -> None:
    print(f"  {name}: {outcome}", file=sys.stderr, flush=True)


def _print(replication: "Replication") -> None:
    from rich.console import Console
    from rich.table import Table

    from mechcausal.studies.replication.driver import PAGE_FILE
    from mechcausal.studies.replication.page import VERDICTS, measured, number

    table = Table(title="How Transformers Learn Causal Structure: the paper, ours, the theory")
    for heading in ("figure", "quantity", "paper", "ours", "theory", "verdict"):
        right = heading in ("paper", "ours", "theory")
        table.add_column(heading, justify="right" if right else "left", no_wrap=right)
    previous = ""
    for row in replication.rows:
        if previous not in ("", row.figure):
            table.add_section()
        colour = {True: "green", False: "red", None: ""}[row.holds]
        verdict = VERDICTS[row.holds]
        table.add_row(
            row.figure if row.figure != previous else "",
            row.quantity,
            number(row.paper),
            measured(row),
            number(row.theory),
            f"[{colour}]{verdict}[/{colour}]" if colour else verdict,
        )
        previous = row.figure
    console = Console()
    console.print(table)
    holds = sum(row.holds is True for row in replication.rows)
    judged = sum(row.holds is not None for row in replication.rows)
    console.print(f"{holds} of {judged} hold", highlight=False)
    console.out(f"page: {replication.folder / PAGE_FILE}", highlight=False)
