"""`mechcausal runs`."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from mechcausal.cli.parsing import RefusedError, parse
from mechcausal.measures.figures import figure_of
from mechcausal.records.run_folder import RunInfo, find_runs, run_info

_FIGURES = ("loss/eval", "loss/gap", "graph/recovered", "induction/score")
_COLOURS = {"finished": "green", "running": "cyan", "interrupted": "yellow", "failed": "red"}


@dataclass
class Runs:
    """List runs: recipe, state, step, figures. A killed run counts as interrupted."""

    folder: tyro.conf.Positional[Path] = Path("runs")
    """Folder to search, at any depth."""
    state: Literal["finished", "interrupted", "failed", "running"] | None = None
    """List only runs in this state."""
    json: bool = False
    """Print JSON."""


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0."""
    options = parse(Runs, arguments, command="runs")
    if not options.folder.is_dir():
        raise RefusedError(f"{options.folder}: no such folder")
    runs = [run_info(folder) for folder in find_runs(options.folder)]
    runs = [info for info in runs if options.state in (None, info.state)]
    if options.json:
        print(json.dumps([_to_dict(info) for info in runs], indent=2))
    else:
        _print_table(runs, options.folder)
    return 0


def _to_dict(info: RunInfo) -> dict[str, Any]:
    return {
        "folder": str(info.folder),
        "recipe": info.recipe.name if info.recipe else None,
        "seed": info.recipe.seed if info.recipe else None,
        "state": info.state,
        "step": info.step,
        "n_steps": info.n_steps,
        "updated": info.updated,
        "problem": info.problem or None,
        "figures": dict(info.figures),
    }


def _print_table(runs: list[RunInfo], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not runs:
        console.out(f"no runs in {folder}", highlight=False)
        return
    table = Table(title=Text(f"{len(runs)} run{'s' * (len(runs) != 1)} in {folder}"))
    table.add_column("run", overflow="fold")
    table.add_column("recipe", overflow="fold")
    table.add_column("state", no_wrap=True)
    for heading in ("seed", "step", *(figure_of(key).short for key in _FIGURES)):
        table.add_column(heading, justify="right", no_wrap=True)
    for info in runs:
        name = os.path.relpath(info.folder, folder)
        figures = [info.figures.get(key) for key in _FIGURES]
        table.add_row(
            Text(str(info.folder) if name == "." else name),
            Text(info.recipe.name if info.recipe else "?"),
            Text(info.state, style=_COLOURS[info.state]),
            str(info.recipe.seed) if info.recipe else "?",
            f"{info.step:,}/{info.n_steps:,}",
            *(f"{value:.3f}" if isinstance(value, float | int) else "" for value in figures),
        )
    console.print(table)
    for info in runs:
        if info.problem:
            console.print(Text(f"{info.folder}: {info.problem}", style="red"), soft_wrap=True)
