"""Resume a run that was interrupted, killed or failed."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from mechcausal.measures.figures import STEP, Value
from mechcausal.recipes import (
    Recipe,
    RecipeError,
    WandbMode,
    load_recipe,
    parse_recipe,
    recipe_to_dict,
    recipe_to_toml,
)
from mechcausal.recipes.devices import computing_on, device_named
from mechcausal.recipes.stages import stages
from mechcausal.records.run_folder import (
    MATRICES_FILE,
    MATRICES_FOLDER,
    METRICS_FILE,
    RECIPE_FILE,
    SUMMARY_FILE,
    RunFolderError,
    has_finished,
    hold,
    read_metrics,
    read_process,
)
from mechcausal.records.tracking import writing
from mechcausal.records.wandb_runs import resolve_mode
from mechcausal.support.files import write_atomically
from mechcausal.support.messages import excerpt
from mechcausal.support.signals import StopSignal, stop_on_signals
from mechcausal.training.checkpoints import Checkpoint, differences, environment, newest_checkpoint
from mechcausal.training.experiments import OwnExperiment
from mechcausal.training.experiments.own import recorded
from mechcausal.training.recorded_run import Progress, RecordedRun
from mechcausal.training.run import RunResult, check, result_of, train_runs


def resume(
    folder: str | Path,
    *,
    experiment: OwnExperiment | None = None,
    recipe: Recipe | None = None,
    allow_change: bool = False,
    wandb_mode: WandbMode | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    stop: StopSignal | None = None,
) -> RunResult:
    """Resume a run that was interrupted, killed or failed, as if it had never stopped.

    On the same machine, on the CPU with one thread, metrics and weights equal those of an
    uninterrupted run bit by bit.

    Args:
        folder: the run folder.
        experiment: what the run was trained with, if that was the caller's own.
        recipe: the recipe to use; the folder's own when absent.
        allow_change: resume although the recipe, versions, threads or device differ from those of
            the checkpoint. Rows from its step on are computed again; the old rows are copied to a
            folder `before-step-N-1`.
        wandb_mode: overrides the recipe's W&B mode.
        on_progress: called before every step.
        on_warning: told what goes wrong, as it does.
        stop: see `mechcausal.train`.

    Returns:
        The run.

    Raises:
        RunFolderError: the folder holds no run, the run has finished, another process is writing
            it, or something differs and `allow_change` is False.
        RecipeError, GraphError, PriorError, TrackingError, TrainingError, StopRequested: see
            `mechcausal.train`.
    """
    folder = Path(folder)
    if not (folder / RECIPE_FILE).is_file():
        raise RunFolderError(f"{folder}: not a run folder: no {RECIPE_FILE} in it")
    recipe = recipe or load_recipe(folder / RECIPE_FILE)
    if experiment is not None:
        recipe = recorded(recipe, experiment)
    check(recipe, experiment)
    mode = resolve_mode(wandb_mode or recipe.wandb.mode)
    with stop_on_signals(stop) as stop, hold(folder):
        warnings: list[str] = []
        checkpoint = newest_checkpoint(folder, warnings)
        for warning in warnings:
            if on_warning is not None:
                on_warning(warning)
        rows = _rows(folder)
        changed = _changes(folder, recipe, checkpoint)
        if has_finished(folder) and not changed:
            raise RunFolderError(f"{folder}: has finished; there is nothing to resume")
        start = checkpoint.step if checkpoint else 0
        if changed and not allow_change:
            changes = "; ".join(
                f"{excerpt(name)} was {excerpt(old)}, is {excerpt(new)}"
                for name, (old, new) in changed.items()
            )
            raise RunFolderError(
                f"{folder}: differs from the run: {changes}; "
                f"--allow-change resumes from step {start} anyway"
            )
        if checkpoint is not None:
            _check_stage(checkpoint, recipe)
        if changed:
            rows = [row for row in rows if int(row[STEP] or 0) < start]
            _set_aside(folder, recipe, start, rows)
        with writing(folder / SUMMARY_FILE):
            (folder / SUMMARY_FILE).unlink(missing_ok=True)
        run = RecordedRun(
            recipe,
            nullcontext(folder),
            mode,
            experiment=experiment,
            checkpoint=checkpoint,
            rows=rows,
            on_progress=on_progress,
            on_warning=on_warning,
        )
        train_runs([run], stop)
    result = result_of(run, stop)
    result.warnings[:0] = warnings
    return result


def _rows(folder: Path) -> list[dict[str, Value]]:
    """The rows in metrics.jsonl.

    Raises:
        RunFolderError: a row other than the last is damaged, or steps do not increase.
    """
    path = folder / METRICS_FILE
    try:
        rows = read_metrics(folder) if path.exists() else []
    except (OSError, ValueError) as error:
        raise RunFolderError(str(error)) from None
    last = -1
    for number, row in enumerate(rows, start=1):
        step = row.get(STEP)
        if not isinstance(step, int) or step <= last:
            raise RunFolderError(f"{path}, line {number}: {STEP} is {excerpt(step)}, after {last}")
        last = step
    return rows


def _changes(
    folder: Path, recipe: Recipe, checkpoint: Checkpoint | None
) -> dict[str, tuple[Any, Any]]:
    """Differences in recipe and environment between the stored run and the resumed one."""
    process = read_process(folder)
    old_recipe, old_environment = process.get("recipe"), process.get("environment")
    if checkpoint is not None:
        old_recipe, old_environment = checkpoint.recipe, checkpoint.environment
    changed: dict[str, tuple[Any, Any]] = {}
    if isinstance(old_recipe, Mapping):
        with suppress(RecipeError):  # parsing fills in the defaults of fields added since
            old_recipe = recipe_to_dict(parse_recipe(dict(old_recipe), source=str(folder)))
        changed |= differences(old_recipe, recipe_to_dict(recipe))
    if isinstance(old_environment, Mapping):
        with computing_on(recipe.threads):
            now = environment(device_named(recipe.device))
        # Older folders lack what was added since.
        comparable = {name: value for name, value in now.items() if name in old_environment}
        changed |= differences(old_environment, comparable)
    return changed


def _check_stage(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Check that the checkpoint's step belongs to the same stage in this recipe.

    Raises:
        RunFolderError: it does not.
    """
    if checkpoint.step > recipe.n_steps:
        raise RunFolderError(
            f"{checkpoint.folder}: was taken at step {checkpoint.step:,}, "
            f"the recipe ends at {recipe.n_steps:,}"
        )
    stage = [s for s in stages(recipe) if s.start <= checkpoint.step][-1]
    if stage.name != checkpoint.stage and checkpoint.step != stage.end:
        raise RunFolderError(
            f"{checkpoint.folder}: step {checkpoint.step:,} was in {checkpoint.stage}, "
            f"in this recipe it is in {stage.name}"
        )


def _set_aside(
    folder: Path, recipe: Recipe, start: int, rows: Sequence[Mapping[str, Value]]
) -> None:
    """Copy old rows, recipe and matrices to `before-step-N-i`; keep `rows`, those before `start`.

    Raises:
        RecordError: the folder cannot be written.
    """
    with writing(folder):
        number = 1
        while (backup := folder / f"before-step-{start}-{number}").exists():
            number += 1
        backup.mkdir()
        for name in (METRICS_FILE, RECIPE_FILE, SUMMARY_FILE, MATRICES_FILE):
            if (folder / name).is_file():
                shutil.copy2(folder / name, backup / name)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(folder / METRICS_FILE, text)
        write_atomically(folder / RECIPE_FILE, recipe_to_toml(recipe))
        for path in (folder / MATRICES_FOLDER).glob("[0-9]*.safetensors"):
            if path.stem.isdecimal() and int(path.stem) >= start:
                path.unlink()
