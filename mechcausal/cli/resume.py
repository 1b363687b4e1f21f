"""`mechcausal resume`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mechcausal.cli.display import display
from mechcausal.cli.parsing import RefusedError, parse
from mechcausal.cli.train import recipe_of, run_displayed
from mechcausal.recipes import Recipe, RecipeError, WandbMode, load_recipe
from mechcausal.records.run_folder import RECIPE_FILE

if TYPE_CHECKING:
    from mechcausal.training.run import RunResult


@dataclass
class Resume:
    """Resume a run that was interrupted, killed or failed, as if it had never stopped."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    allow_change: bool = False
    """Resume although recipe, versions, threads or device differ from those of the checkpoint."""
    wandb_mode: WandbMode | None = None
    """W&B mode; overrides the recipe's."""
    quiet: bool = False
    """No progress bar."""
    watch: bool = False
    """Show attention beside the graph, and curves, live in the terminal instead of the bar."""
    values: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0, 1 when the run failed, or 128 + signal."""
    folder = parse(Resume, arguments, command="resume").run
    if not (folder / RECIPE_FILE).is_file():
        raise RefusedError(f"{folder}: not a run folder: no {RECIPE_FILE} in it")
    try:
        default = Resume(run=folder, values=load_recipe(folder / RECIPE_FILE))
        options = parse(Resume, arguments, command="resume", default=default)
        recipe = recipe_of(options.values)
    except RecipeError as error:
        raise RefusedError(str(error)) from None
    terminal = display(recipe, quiet=options.quiet, watch=options.watch)
    print(f"mechcausal resume {folder} ({recipe.name}, seed {recipe.seed})", flush=True)
    from mechcausal.training.resuming import resume

    def start() -> "RunResult":
        return resume(
            folder,
            recipe=recipe,
            allow_change=options.allow_change,
            wandb_mode=options.wandb_mode,
            on_progress=terminal.show,
            on_warning=terminal.warn,
        )

    return run_displayed(start, str(folder), terminal)
