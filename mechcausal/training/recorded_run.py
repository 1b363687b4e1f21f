"""A run as the training loop sees it: its experiment and optimizer, its record and checkpoints."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch

from mechcausal.measures.figures import History, Value
from mechcausal.recipes import Recipe, WandbMode
from mechcausal.recipes.devices import device_named
from mechcausal.recipes.stages import probe_steps, stages
from mechcausal.records.run_folder import MODEL_FOLDER, State
from mechcausal.records.tracking import RecordError, RunRecord, writing
from mechcausal.records.wandb_runs import load_wandb
from mechcausal.support.files import write_folder_atomically
from mechcausal.support.signals import StopSignal
from mechcausal.training.checkpointing import Checkpointer
from mechcausal.training.checkpoints import Checkpoint, environment
from mechcausal.training.closing_pictures import ClosingPictures
from mechcausal.training.errors import check_finite, explained
from mechcausal.training.experiments import (
    Experiment,
    Generators,
    OwnExperiment,
    RunClamp,
    build_experiment,
)
from mechcausal.training.loop import Learner, Trained
from mechcausal.training.probe_log import ProbeLog

P = ParamSpec("P")

SILENT_SECONDS = 1.0
"""Preparing the first step is reported only if it takes longer than this."""


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


def _contained(
    method: Callable[Concatenate["RecordedRun", P], None],
) -> Callable[Concatenate["RecordedRun", P], None]:
    """Wrap a method: its errors end this run alone, and once the run has ended it does nothing."""

    @wraps(method)
    def contained(run: "RecordedRun", /, *args: P.args, **options: P.kwargs) -> None:
        if run.is_training:
            try:
                method(run, *args, **options)
            except Exception as error:
                run.fail(error)

    return contained


class RecordedRun(Trained):
    """A run that writes its record while the loop trains it.

    Errors do not leave its methods: they end the run, and `error` holds what the user should read.

    Attributes:
        recipe: the recipe.
        folder: the run folder, once the run is open.
        start: first step to train; above 0 when the run is resumed.
        is_training: whether it is open and has not ended.
        state: how it ended; None before.
        error: why it failed.
        summary: figures and conclusions, once it has ended.
        experiment: model, data and probes, once the run is open.
        record: the files and the W&B run, once the run is open.
    """

    folder: Path
    experiment: Experiment
    record: RunRecord
    probe_log: ProbeLog
    summary: dict[str, Any]
    _generators: Generators
    _checkpointer: Checkpointer
    _clamp: RunClamp
    _learner: Learner
    _stop: StopSignal

    def __init__(
        self,
        recipe: Recipe,
        folder: AbstractContextManager[Path],
        mode: WandbMode,
        *,
        experiment: OwnExperiment | None = None,
        checkpoint: Checkpoint | None = None,
        rows: Sequence[dict[str, Value]] = (),
        lean: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        """Store the arguments; `open` starts the run.

        Args:
            recipe: a recipe that `check` accepted.
            folder: gives the run folder, locked until the run has ended.
            mode: W&B mode.
            experiment: the caller's own, which `check` accepted, too.
            checkpoint: where to resume; None trains from the start.
            rows: rows already in metrics.jsonl.
            lean: for one of very many runs: no pictures, no W&B before the end, probes in closed
                form.
            on_progress: see `train`.
            on_warning: see `train`.
        """
        self.recipe = recipe
        self.start = self._step = checkpoint.step if checkpoint else 0
        self.is_training = False
        self.state: State | None = None
        self.error: BaseException | None = None
        self._folder = folder
        self._mode = mode
        self._own = experiment
        self._checkpoint = checkpoint
        self._rows = rows
        self._lean = lean
        self._on_progress = on_progress
        self._on_warning = on_warning
        self._resources = ExitStack()

    def open(self, stop: StopSignal) -> None:
        """Lock the folder, build the experiment and open the record.

        Raises:
            KeyboardInterrupt: Ctrl-C; the run has ended as interrupted.
        """
        self._stop = stop
        try:
            self.folder = self._resources.enter_context(self._folder)
        except Exception as error:  # there is no folder to record it in
            self.state, self.error = "failed", error
            return
        try:
            self._build()
        except BaseException as error:
            self._resources.close()
            self.state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.error = explained(error, self.folder, self.recipe, "before the first step")
            if not isinstance(error, Exception):
                raise self.error from None
            return
        self.is_training = True
        self._open_probe_log()

    def _build(self) -> None:
        recipe, plan = self.recipe, stages(self.recipe)
        generators = Generators.from_seed(recipe.seed, device_named(recipe.device))
        if self._mode != "disabled":
            load_wandb()
        # W&B takes a second to start, mostly waiting: build the experiment meanwhile.
        with ThreadPoolExecutor(1) as pool:
            opening = pool.submit(
                RunRecord,
                self.folder,
                recipe,
                self._mode,
                rows=self._rows,
                environment=environment(generators.data.device),
                on_warning=self._on_warning,
                lean=self._lean,
            )
            try:
                self.experiment = build_experiment(
                    recipe,
                    generators,
                    self._tell_preparing(),
                    experiment=self._own,
                    closed_form=self._lean,
                )
            except BaseException:
                with suppress(RecordError):  # report the first error, not what follows from it
                    opening.result().finish({}, "interrupted" if self._stop.received else "failed")
                raise
            # From here on a signal takes effect only at the end of a step.
            self._stop.waits = True
            self.record = opening.result()
        for note in self.experiment.notes:
            self.record.warn(note)
        self.probe_log = ProbeLog(
            self.record,
            self.experiment,
            steps=probe_steps(recipe.probing, plan),
            stage_starts=[stage.start for stage in plan],
            start=self.start,
            rows=self._rows,
            lean=self._lean,
        )
        self._clamp = RunClamp(self.experiment)
        self._checkpointer = Checkpointer(
            self.record, self.probe_log, self.experiment, generators, self._clamp, start=self.start
        )
        self._generators = generators
        self._learner = Learner(self.experiment, plan, start=self.start)

    @_contained
    def _open_probe_log(self) -> None:
        self.probe_log.open()

    def begin_step(self) -> bool:
        """Move to the next step and write a checkpoint if one is due; False after a stop signal."""
        self._begin_step()
        return self.is_training

    @_contained
    def _begin_step(self) -> None:
        self._learner.begin_step()
        self._step = self._learner.number
        if self._checkpoint is not None:
            self._checkpoint.restore(self.experiment, self._learner.optimizer, self._generators)
            self._clamp.restore(self._checkpoint.clamp)
            self._checkpoint = None
        self._clamp.at(self._step)
        if self._stop.received is not None and self._step < self.recipe.n_steps:
            self._save_checkpoint()
            self._end("interrupted")
            return
        if self._checkpointer.is_due(self._step):
            self._save_checkpoint()

    @_contained
    def record_step(self) -> None:
        """Write a row if this is a probe step; end after the last step.

        The model must hold this step's gradients.
        """
        step, stage, probe_log = self._step, self._learner.stage, self.probe_log
        optimizer = self._learner.optimizer
        check_finite(self.loss, optimizer, step, stage, self.folder, self.recipe)
        if step in probe_log.steps:
            probe_log.add(step, self.loss)
        self._checkpointer.publish(step)
        if self._on_progress is not None:
            self._on_progress(
                Progress(
                    step=step,
                    n_steps=self.recipe.n_steps,
                    stage=stage.name,
                    figures=probe_log.latest,
                    matrices=probe_log.latest_matrices,
                    history=probe_log.history,
                )
            )
        if step == self.recipe.n_steps:
            probe_log.close()
            self._end("finished")

    @_contained
    def descend(self) -> None:
        """Take the optimizer's step."""
        self._learner.descend()

    def fail(self, error: BaseException) -> None:
        """End the run with an error."""
        self.error = explained(error, self.folder, self.recipe, f"at step {self._step}")
        if self.is_training:
            self._finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")

    def _save_checkpoint(self) -> None:
        self._checkpointer.save(self._step, self._learner.stage.name, self._learner.optimizer)

    def _end(self, state: State) -> None:
        final = self.folder / MODEL_FOLDER
        with writing(final), write_folder_atomically(final) as new_folder:
            self.experiment.save_model(new_folder)
        self._finish(state)

    def _finish(self, state: State) -> None:
        self.is_training, self.state = False, state
        self._clamp.close()
        self._learner.close()
        summary = self.probe_log.summary() | {"train/steps": self._step, "recipe": self.recipe.name}
        self.summary = summary
        record = self.record
        try:
            if state != "finished" or self._lean:
                record.finish(summary, state)
                return
            pictures = ClosingPictures(record, self.recipe)
            pictures.draw_page(summary)
            panels = pictures.draw_panels(summary, self._stop)
            n_warnings = len(record.warnings)
            record.finish(summary, state, panels)
            if len(record.warnings) > n_warnings:  # the page lists them
                pictures.draw_page(summary)
        finally:
            self._resources.close()

    def _tell_preparing(self) -> Callable[[str], None]:
        """Pass on what is being prepared before the first step, a few times a second."""
        due = time.monotonic() + SILENT_SECONDS

        def tell(text: str) -> None:
            nonlocal due
            if self._on_progress is not None and time.monotonic() > due:
                n_steps = self.recipe.n_steps
                self._on_progress(Progress(self.start, n_steps, text, {}, is_preparing=True))
                due = time.monotonic() + 0.25

        return tell
