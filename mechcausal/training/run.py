"""The training loop: Algorithm 1 or joint training, on the closed form, observed through hooks."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mechcausal.measures.figures import History, Value
from mechcausal.recipes import Recipe, RecipeError, StageSection, WandbMode, load_recipe
from mechcausal.recipes.devices import computing_on, device_named
from mechcausal.recipes.stages import Stage, learning_rate, probe_steps, stages
from mechcausal.records.run_folder import MODEL_FOLDER, State, new_run_folder
from mechcausal.records.tracking import RecordError, RunRecord, writing
from mechcausal.records.wandb_runs import load_wandb, resolve_mode
from mechcausal.support.files import write_folder_atomically
from mechcausal.support.messages import shell_command
from mechcausal.support.signals import StopRequested, StopSignal, stop_on_signals
from mechcausal.training.checkpointing import Checkpointer
from mechcausal.training.checkpoints import Checkpoint, CheckpointError, environment
from mechcausal.training.closing_pictures import ClosingPictures
from mechcausal.training.experiments import (
    Experiment,
    Generators,
    build_experiment,
    check_experiment,
)
from mechcausal.training.probe_log import ProbeLog

SILENT_SECONDS = 1.0
"""What is prepared before the first step is told of when it takes longer."""


class TrainingError(RuntimeError):
    """A run that failed; the message is one line with the cause and how to resume."""


class NonFiniteLossError(TrainingError):
    """The loss or its gradient became NaN or infinite; the message says at which step."""


@dataclass(frozen=True)
class Progress:
    """What a progress display may show: sent before every step, and while the first is prepared.

    Attributes:
        step: steps done.
        n_steps: steps of the whole run.
        stage: what is being trained, or prepared.
        figures: of the last probe step.
        matrices: of the last probe step, by name, on the CPU.
        history: a row of figures for every probe step so far; grows while the run goes on.
        is_preparing: whether the first step is still to come, after something that takes long.
    """

    step: int
    n_steps: int
    stage: str
    figures: dict[str, Value]
    matrices: Mapping[str, torch.Tensor] = field(default_factory=dict)
    history: History = ()
    is_preparing: bool = False


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


def train(
    recipe: Recipe | str | Path,
    *,
    out: str | Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    stop: StopSignal | None = None,
) -> RunResult:
    """Train a recipe's model and record figures, matrices and checkpoints.

    Args:
        recipe: a recipe, its path, or the name of a bundled recipe.
        out: the run's folder; `runs/<recipe>/<run-id>` when absent.
        on_progress: called before every step.
        on_warning: told what goes wrong with recording, as it does.
        stop: a request to stop, beside signals; for who sets its `received` while this runs.

    Returns:
        The run; its folder is described in `mechcausal.records.run_folder`.

    Raises:
        RecipeError, GraphError, PriorError, TrackingError, RunFolderError: bad input; nothing was
            trained.
        TrainingError: the loss became NaN or infinite, or memory or disk ran out; all rows logged
            so far are kept.
        StopRequested: a signal arrived before the first step.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    check(recipe)
    recipe = recipe.self_contained()
    mode = resolve_mode(recipe.wandb.mode)
    with stop_on_signals(stop) as stop, new_run_folder(recipe, out) as folder:
        return run(recipe, folder, mode, stop, on_progress=on_progress, on_warning=on_warning)


def check(recipe: Recipe) -> None:
    """Check that this machine can train the recipe.

    Raises:
        RecipeError: nothing to train, no such device, or parts that do not fit together.
    """
    if not stages(recipe):
        raise RecipeError("training: no steps in any stage: nothing to train")
    device_named(recipe.device)
    check_experiment(recipe)


def run(
    recipe: Recipe,
    folder: Path,
    mode: WandbMode,
    stop: StopSignal,
    *,
    checkpoint: Checkpoint | None = None,
    rows: Sequence[dict[str, Value]] = (),
    on_progress: Callable[[Progress], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> RunResult:
    """Train from the start or from a checkpoint, until the end or a request to stop.

    Args:
        recipe: a recipe that `check` accepted.
        folder: a run folder that this process has locked with `hold`.
        mode: W&B mode.
        stop: says when to stop.
        checkpoint: where to resume; None trains from the start.
        rows: rows already in metrics.jsonl.
        on_progress: see `train`.
        on_warning: see `train`.

    Raises:
        See `train`.
    """
    plan = stages(recipe)
    start = checkpoint.step if checkpoint else 0
    with computing_on(recipe.threads), ThreadPoolExecutor(1) as pool:
        generators = Generators.from_seed(recipe.seed, device_named(recipe.device))
        if mode != "disabled":
            load_wandb()
        # W&B takes a second to start, mostly waiting: build the experiment meanwhile.
        opening = pool.submit(
            RunRecord,
            folder,
            recipe,
            mode,
            rows=rows,
            environment=environment(generators.data.device),
            on_warning=on_warning,
        )
        try:
            experiment = build_experiment(recipe, generators, _telling(on_progress, recipe, start))
        except BaseException as error:
            with suppress(RecordError):  # report the first error, not what follows from it
                opening.result().finish({}, "interrupted" if stop.received else "failed")
            raise explained(error, folder, recipe, "before the first step") from None
        # From here on a signal takes effect only at the end of a step.
        stop.waits = True
        try:
            record = opening.result()
        except RecordError as error:
            raise explained(error, folder, recipe, "before the first step") from None
        for note in experiment.notes:
            record.warn(note)
        probe_log = ProbeLog(
            record,
            experiment,
            steps=probe_steps(recipe.probing, plan),
            stage_starts=[stage.start for stage in plan],
            start=start,
            rows=rows,
        )
        checkpointer = Checkpointer(record, probe_log, experiment, generators, start=start)
        state: State = "failed"
        step = start
        try:
            probe_log.open()
            for step, stage, optimizer in schedule(plan, experiment, start):
                if step == start and checkpoint is not None:
                    checkpoint.restore(experiment, optimizer, generators)
                is_last = step == recipe.n_steps
                if stop.received is not None and not is_last:
                    checkpointer.save(step, stage.name, optimizer)
                    break
                if checkpointer.is_due(step):
                    checkpointer.save(step, stage.name, optimizer)
                optimizer.zero_grad()
                loss = _accumulate(experiment)
                check_finite(loss, optimizer, step, stage, folder)
                if step in probe_log.steps:
                    probe_log.add(step, loss)
                checkpointer.publish(step)
                if on_progress is not None:
                    on_progress(
                        Progress(
                            step=step,
                            n_steps=recipe.n_steps,
                            stage=stage.name,
                            figures=probe_log.latest,
                            matrices=probe_log.latest_matrices,
                            history=probe_log.history,
                        )
                    )
                if is_last:
                    probe_log.close()
                    state = "finished"
                else:
                    optimizer.step()
            if state != "finished":
                state = "interrupted"
            final = folder / MODEL_FOLDER
            with writing(final), write_folder_atomically(final) as new_folder:
                experiment.save_model(new_folder)
        except BaseException as error:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            raise explained(error, folder, recipe, f"at step {step}") from None
        finally:
            summary = probe_log.summary() | {"train/steps": step, "recipe": recipe.name}
            if state == "finished":
                pictures = ClosingPictures(record, recipe)
                pictures.draw_page(summary)
                panels = pictures.draw_panels(summary, stop)
                n_warnings = len(record.warnings)
                record.finish(summary, state, panels)
                if len(record.warnings) > n_warnings:  # the page lists them
                    pictures.draw_page(summary)
            else:
                record.finish(summary, state)
    return RunResult(
        folder=folder,
        state=state,
        signal=None if state == "finished" or stop.received is None else int(stop.received),
        start=start,
        summary=summary,
        history=probe_log.history,
        experiment=experiment,
        warnings=record.warnings,
        wandb_folder=record.wandb_folder,
        url=record.url,
    )


def _telling(
    on_progress: Callable[[Progress], None] | None, recipe: Recipe, start: int
) -> Callable[[str], None]:
    """Pass on what is being prepared before the first step, a few times a second."""
    due = time.monotonic() + SILENT_SECONDS

    def tell(text: str) -> None:
        nonlocal due
        if on_progress is not None and time.monotonic() > due:
            on_progress(Progress(start, recipe.n_steps, text, {}, is_preparing=True))
            due = time.monotonic() + 0.25

    return tell


def schedule(
    plan: list[Stage], experiment: Experiment, start: int
) -> Iterator[tuple[int, Stage, torch.optim.Optimizer]]:
    """Number, stage and optimizer of every step from `start` on.

    One more number follows the last training step, for the final probe step.
    """
    end = plan[-1].start + plan[-1].section.steps
    for stage in plan:
        section = stage.section
        stop = stage.start + section.steps
        steps = range(max(start, stage.start), stop + (stop == end))
        if not steps:
            continue
        optimizer = _optimizer(section, experiment.parameters(stage.parameters))
        with experiment.training_only(stage.parameters):
            for step in steps:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(section, step - stage.start)
                yield step, stage, optimizer


def _accumulate(experiment: Experiment) -> float:
    """Accumulate the gradients of a batch part by part; return the mean loss."""
    training = experiment.recipe.training
    total = 0.0
    for _ in range(training.accumulation):
        loss = experiment.training_loss(training.batch_size // training.accumulation)
        (loss / training.accumulation).backward()
        total += loss.item() / training.accumulation
    return total


def _optimizer(
    section: StageSection, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    kind: Any = kinds[section.optimizer]
    optimizer: torch.optim.Optimizer = kind(
        parameters, lr=section.lr, weight_decay=section.weight_decay
    )
    return optimizer


def check_finite(
    loss: float, optimizer: torch.optim.Optimizer, step: int, stage: Stage, folder: Path
) -> None:
    """Raise before the optimizer writes NaN into the weights.

    Raises:
        NonFiniteLossError: the loss or an entry of its gradient is NaN or infinite.
    """
    problem = f"the loss became {loss}"
    if math.isfinite(loss):
        gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
        if all(g is None or bool(g.isfinite().all()) for g in gradients):
            return
        problem = f"the gradient became NaN or infinite (the loss is {loss:g})"
    section = stage.section
    change = (f"--training.{stage.name}.lr", f"{section.lr / 10:g}", "--allow-change")
    again = shell_command("mechcausal", "resume", folder, *change)
    raise NonFiniteLossError(
        f"{problem} at step {step} ({stage.name}, {section.optimizer} with lr {section.lr:g}): "
        "try a smaller learning rate or a larger epsilon; every row before it is kept; "
        f"{again} resumes from the last checkpoint"
    )


def explained(error: BaseException, folder: Path, recipe: Recipe, when: str) -> BaseException:
    """The error as the user should read it: what happened, and how to resume."""
    again = shell_command("mechcausal", "resume", folder)
    if isinstance(error, StopRequested):
        return StopRequested(f"stopped {when}; resume with: {again}", error.number)
    if isinstance(error, RecordError):
        return TrainingError(
            f"{error}; the run stopped {when}, what was written before is kept; "
            f"when the folder can be written again: {again}"
        )
    if isinstance(error, CheckpointError):
        return TrainingError(str(error))
    text = str(error).lower()
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)
    ):
        return TrainingError(
            f"out of memory {when}: reduce training.batch_size "
            f"({recipe.training.batch_size:,}, or raise training.accumulation), "
            f"evaluation.n_sequences ({recipe.evaluation.n_sequences:,}), "
            f"evaluation.theory_priors ({recipe.evaluation.theory_priors:,}), "
            "or the sizes of graph, task and model; what was written before is kept"
        )
    return error
