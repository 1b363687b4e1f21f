"""Train a recipe: one run, or several of equal shape as one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mechcausal.measures.figures import Value
from mechcausal.recipes import Recipe, RecipeError, load_recipe
from mechcausal.recipes.devices import computing_on, device_named
from mechcausal.recipes.stages import stages
from mechcausal.records.run_folder import State, new_run_folder
from mechcausal.records.wandb_runs import resolve_mode
from mechcausal.support.signals import StopRequested, StopSignal, stop_on_signals
from mechcausal.training.errors import NonFiniteLossError, TrainingError
from mechcausal.training.experiments import Experiment, OwnExperiment, check_experiment
from mechcausal.training.experiments.own import recorded
from mechcausal.training.loop import loop
from mechcausal.training.recorded_run import Progress, RecordedRun

__all__ = [
    "NonFiniteLossError",
    "Progress",
    "RunResult",
    "TrainingError",
    "check",
    "train",
    "train_runs",
]


@dataclass
class RunResult:
    """A run that ended.

    Attributes:
        folder: the run folder.
        state: finished, or interrupted by a signal.
        signal: number of that signal.
        start: first step trained; above 0 when the run was resumed from a checkpoint.
        summary: figures of the last probe step, those of the first under "first", conclusions.
        history: a dict of figures for every probe step.
        experiment: the trained model with its data, probes and theory.
        warnings: problems with recording.
        wandb_folder: W&B's folder; None when disabled.
        url: the W&B page, when online.
    """

    folder: Path
    state: State
    signal: int | None
    start: int
    summary: dict[str, Any]
    history: list[dict[str, Value]]
    experiment: Experiment
    warnings: list[str] = field(default_factory=list)
    wandb_folder: Path | None = None
    url: str | None = None

    def to_frame(self) -> Any:
        """A pandas frame of `history`: a row for every probe step, a column for every figure."""
        import pandas as pd  # type: ignore[import-untyped, unused-ignore]

        return pd.DataFrame(self.history)


def train(
    recipe: Recipe | str | Path,
    *,
    experiment: OwnExperiment | None = None,
    out: str | Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    stop: StopSignal | None = None,
) -> RunResult:
    """Train a recipe's model and record figures, matrices and checkpoints.

    Args:
        recipe: a recipe, its path, or the name of a bundled recipe.
        experiment: your own: a subclass of `Experiment`, or `functools.partial` of one with its
            further arguments, such as `partial(TaskExperiment, task=Coins())`. The recipe that is
            recorded names it.
        out: the run's folder; `runs/<recipe>/<run-id>` when absent.
        on_progress: called before every step.
        on_warning: told what goes wrong with recording, as it does.
        stop: a request to stop, beside signals; for who sets its `received` while this runs.

    Returns:
        The run; its folder is described in `mechcausal.records.run_folder`.

    Raises:
        RecipeError, GraphError, PriorError, TaskError, ModelError, TrackingError, RunFolderError:
            bad input; nothing was trained.
        TrainingError: the loss became NaN or infinite, or memory or disk ran out; all rows logged
            so far are kept.
        StopRequested: a signal arrived before the first step.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if experiment is not None:
        recipe = recorded(recipe, experiment)
    check(recipe, experiment)
    recipe = recipe.self_contained()
    mode = resolve_mode(recipe.wandb.mode)
    folder = new_run_folder(recipe, out)
    run = RecordedRun(
        recipe,
        folder,
        mode,
        experiment=experiment,
        on_progress=on_progress,
        on_warning=on_warning,
    )
    with stop_on_signals(stop) as stop:
        train_runs([run], stop)
    return result_of(run, stop)


def check(
    recipe: Recipe, experiment: OwnExperiment | None = None, *, on_this_machine: bool = True
) -> None:
    """Check that the recipe can be trained.

    Args:
        recipe: a parsed recipe.
        experiment: the caller's own.
        on_this_machine: whether this machine will train it, and must have the device and the
            memory.

    Raises:
        GraphError, PriorError: the graph or the prior is invalid.
        RecipeError: nothing to train, no such device, or parts that do not fit together.
    """
    if not stages(recipe):
        raise RecipeError("training: no steps in any stage: nothing to train")
    if on_this_machine:
        device_named(recipe.device)
    check_experiment(recipe, experiment, on_this_machine=on_this_machine)


def train_runs(runs: Sequence[RecordedRun], stop: StopSignal) -> None:
    """Open runs of equal shape and train them together, until the end or a request to stop.

    Errors are left in the runs: one that fails leaves the others alone. A run that is not open when
    the request arrives stays untouched.

    Args:
        runs: of recipes that `check` accepted.
        stop: says when to stop.

    Raises:
        KeyboardInterrupt: Ctrl-C; every run has ended.
    """
    with computing_on(runs[0].recipe.threads):
        try:
            for run in runs:
                if stop.received is None:
                    run.open(stop)
            training = runs[0].recipe.training
            for going in loop(runs, training.batch_size, accumulation=training.accumulation):
                for run in going:
                    run.record_step()
        except BaseException as error:  # of all runs at once: out of memory, or Ctrl-C
            for run in runs:
                if run.is_training:
                    run.fail(error)
            if not isinstance(error, Exception):
                raise


def result_of(run: RecordedRun, stop: StopSignal) -> RunResult:
    """The result of a run that ended.

    Raises:
        Exception: the run's error.
        StopRequested: the request to stop arrived before the run was open.
    """
    if run.error is not None:
        raise run.error from None
    if run.state is None:
        raise StopRequested("stopped before the first step", int(stop.received or 0))
    return RunResult(
        folder=run.folder,
        state=run.state,
        signal=None if run.state == "finished" or stop.received is None else int(stop.received),
        start=run.start,
        summary=run.summary,
        history=run.probe_log.history,
        experiment=run.experiment,
        warnings=run.record.warnings,
        wandb_folder=run.record.wandb_folder,
        url=run.record.url,
    )
