"""`mechcausal train`."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mechcausal.cli.display import Display, display
from mechcausal.cli.parsing import RefusedError, parse
from mechcausal.cli.tables import print_locations
from mechcausal.measures.figures import figure_of
from mechcausal.recipes import (
    Recipe,
    RecipeError,
    WandbMode,
    load_recipe,
    packaged_recipes,
    parse_recipe,
    recipe_fields,
    recipe_to_dict,
)
from mechcausal.support.messages import shell_command

if TYPE_CHECKING:
    from mechcausal.training.run import RunResult


@dataclass
class Train:
    """Train a recipe's model, observed through hooks; record to W&B and files."""

    recipe: tyro.conf.Positional[str] = ""
    """Path of a recipe (TOML), or the name of a bundled recipe."""
    text: str | None = None
    """A text to train on, short for --task.text: topics, stdlib, or a file in UTF-8."""
    out: Path | None = None
    """Folder of this run; runs/<recipe>/<run-id> when absent."""
    wandb_mode: WandbMode | None = None
    """Short for --wandb.mode."""
    quiet: bool = False
    """No progress bar."""
    watch: bool = False
    """Show attention beside the graph, and curves, live in the terminal instead of the bar."""
    values: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0, 1 when the run failed, or 128 + signal."""
    # Command-line values override the recipe's: parse once for its name, then with its defaults.
    arguments = _with_flags(arguments)
    target = parse(Train, arguments, command="train").recipe
    if not target:
        raise RefusedError(f"train needs a recipe: a file, or {', '.join(packaged_recipes())}")
    try:
        start = Train(values=load_recipe(target))
        options = parse(Train, arguments, command="train", default=start)
        recipe = recipe_of(options.values)
        if options.text is not None:
            recipe = recipe.with_overrides(task__text=options.text, task__text_sha256=None)
        if options.wandb_mode is not None:
            recipe = recipe.with_overrides(wandb__mode=options.wandb_mode)
    except RecipeError as error:
        raise RefusedError(str(error)) from None
    terminal = display(recipe, quiet=options.quiet, watch=options.watch)
    return _run_training(recipe, target, options.out, terminal)


def _with_flags(arguments: list[str]) -> list[str]:
    """Turn --probing.enabled=False, as W&B's agents write it, into --probing.no-enabled."""
    flags = {path for path, kind in recipe_fields().items() if kind is bool}
    changed = []
    for argument in arguments:
        name, _, value = argument.removeprefix("--").replace("-", "_").partition("=")
        if name in flags and value in ("True", "False"):
            section, _, last = name.rpartition(".")
            argument = f"--{section}.{last if value == 'True' else f'no-{last}'}".replace("_", "-")
        changed.append(argument)
    return changed


def recipe_of(parsed: Recipe) -> Recipe:
    """The recipe that tyro parsed, validated.

    Raises:
        RecipeError: the recipe is invalid.
    """
    values = recipe_to_dict(parsed)
    # tyro reads the words after --graph.parents as the parents of one single position.
    match values["graph"].get("parents"):
        case [[*parents]]:
            values["graph"]["parents"] = parents
    return parse_recipe(values, source="command line")


def _run_training(recipe: Recipe, source: str, out: Path | None, terminal: Display) -> int:
    print(f"mechcausal train {recipe.name} (seed {recipe.seed}, {recipe.device})", flush=True)
    from mechcausal.training.run import train

    def start() -> "RunResult":
        return train(recipe, out=out, on_progress=terminal.show, on_warning=terminal.warn)

    return run_displayed(start, source, terminal)


def run_displayed(start: "Callable[[], RunResult]", source: str, terminal: Display) -> int:
    """Run a training with its display, print the results, and return the exit code.

    Raises:
        RefusedError: bad input; nothing was trained.
    """
    from mechcausal.graphs import GraphError
    from mechcausal.records.run_folder import RunFolderError
    from mechcausal.records.wandb_runs import TrackingError
    from mechcausal.tasks.priors import PriorError
    from mechcausal.training.run import TrainingError

    try:
        result = start()
    except (GraphError, PriorError) as error:
        raise RefusedError(f"{source}: {error}") from None
    except (RecipeError, RunFolderError, TrackingError) as error:
        raise RefusedError(str(error)) from None
    except TrainingError as error:
        terminal.close()
        print(f"mechcausal: {error}", file=sys.stderr)
        return 1
    finally:
        terminal.close()
    _print_result(result)
    return 128 + result.signal if result.signal is not None else 0


# The figures of the final table, from the first row and from the last one.
_FIRST = (
    *("gradient/edge_hits", "graph/f1"),
    *("gradient/theory_correlation", "gradient/chi2_correlation"),
)
_LAST = (
    *("graph/recovered", "graph/rows_matched", "graph/parent_attention"),
    *("induction/score", "induction/attention", "induction/formation_step"),
    *("loss/eval", "loss/second_copy", "loss/bayes", "loss/construction"),
    *("loss/gap", "loss/construction_gap"),
    *("loss/unigram", "loss/bigram", "loss/trigram"),
    *("law/residual_correlation", "law/raw_correlation", "law/direct_path_correlation"),
    *("law/first_step", "law/last_step"),
)


def _print_result(result: "RunResult") -> None:
    from rich.console import Console
    from rich.table import Table

    resumed = f", resumed at {result.start:,}" if result.start else ""
    title = f"{result.state} after {result.summary['train/steps']:,} steps{resumed}"
    table = Table(title=title)
    for heading in ("figure", "value", "meaning"):
        table.add_column(heading, justify="right" if heading == "value" else "left")
    first = result.summary.get("first", {})
    for row, keys, prefix in ((first, _FIRST, "first step: "), (result.summary, _LAST, "")):
        for key in keys:
            value = row.get(key)
            if value is not None and not math.isnan(value):
                text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
                table.add_row(key, text, prefix + figure_of(key).title)
    console = Console()
    console.print(table)
    figures = result.folder / "figures"
    again = shell_command("mechcausal", "resume", result.folder)
    print_locations(
        {
            "run": result.folder,
            "figures": figures if figures.is_dir() else None,
            "W&B": result.url or result.wandb_folder,
            "resume": again if result.state != "finished" else None,
        }
    )
