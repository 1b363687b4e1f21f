"""Train one batch of runs: shared tensors with a leading member axis, one record per member.

The steps follow `mechcausal.training.run`: the batch computes for all members at once, and each
member writes its own rows and checkpoints.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np
import torch
from torch import Tensor

from mechcausal.measures.closed_form_observer import ClosedFormObserver
from mechcausal.models.batched_simplified import BatchedSimplified
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.recipes import Recipe, WandbMode
from mechcausal.recipes.devices import device_named
from mechcausal.recipes.stages import Stage, probe_steps, stages
from mechcausal.records.run_folder import MODEL_FOLDER, State, new_run_folder
from mechcausal.records.tracking import RunRecord, writing
from mechcausal.support.files import write_folder_atomically
from mechcausal.sweeps.outcome import Outcome, one_line
from mechcausal.tasks import SingleParentTask
from mechcausal.tasks.batched import BatchedTask
from mechcausal.training.checkpointing import Checkpointer
from mechcausal.training.checkpoints import environment
from mechcausal.training.experiments import Generators
from mechcausal.training.experiments.causal_graph import CausalGraphExperiment
from mechcausal.training.probe_log import ProbeLog
from mechcausal.training.run import Progress, check_finite, explained, schedule

P = ParamSpec("P")
Report = Callable[[Progress | Outcome], None]


class _Experiment(CausalGraphExperiment):
    """A member's experiment: probed in closed form, without pictures."""

    observer_type = ClosedFormObserver
    model: SimplifiedTransformer
    task: SingleParentTask

    def heatmaps(self, matrices: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return {}

    def draw_figures(self, folder: Path, **_: Any) -> dict[str, Path]:
        return {}


def _contain_errors(method: Callable[Concatenate["BatchMember", P], None]) -> Callable[..., None]:
    """Wrap a method: its errors end this member only, and it does nothing once the member ended."""

    @wraps(method)
    def contained(member: "BatchMember", *args: P.args, **options: P.kwargs) -> None:
        try:
            if not member.ended:
                method(member, *args, **options)
        except Exception as error:
            member.fail(error)

    return contained


class BatchMember:
    """One run of a batch, with its own experiment, generators, optimizer and record.

    Attributes:
        recipe: the checked recipe.
        ended: whether the run has finished, failed or been interrupted.
    """

    experiment: _Experiment
    generators: Generators
    step: int
    stage: Stage
    optimizer: torch.optim.Optimizer
    _record: RunRecord
    _probe_log: ProbeLog
    _checkpointer: Checkpointer
    _schedule: Iterator[tuple[int, Stage, torch.optim.Optimizer]]

    def __init__(self, recipe: Recipe, folder: Path, mode: WandbMode, report: Report) -> None:
        """Store the arguments; `open` starts the run.

        Args:
            recipe: a checked recipe of a simplified model.
            folder: the new run's folder.
            mode: the W&B mode.
            report: called with the progress at every probe step, and with the outcome at the end.
        """
        self.recipe = recipe
        self.ended = False
        self.step = 0
        self._folder = folder
        self._mode = mode
        self._report = report
        self._open_resources = ExitStack()

    def open(self) -> None:
        """Make and lock the folder, build the experiment, open the record."""
        recipe, plan = self.recipe, stages(self.recipe)
        try:
            self._open_resources.enter_context(new_run_folder(recipe, self._folder))
            generators = Generators.from_seed(recipe.seed, device_named(recipe.device))
            self.experiment, self.generators = _Experiment(recipe, generators), generators
            self._record = RunRecord(
                self._folder,
                recipe,
                self._mode,
                environment=environment(generators.data.device),
                lean=True,
            )
        except BaseException as error:
            self._open_resources.close()
            self.ended = True
            explanation = explained(error, self._folder, recipe, "before the first step")
            self._report(Outcome("failed", one_line(explanation)))
            if not isinstance(error, Exception):
                raise
            return
        for note in self.experiment.notes:
            self._record.warn(note)
        self._probe_log = ProbeLog(
            self._record,
            self.experiment,
            steps=probe_steps(recipe.probing, plan),
            stage_starts=[stage.start for stage in plan],
            durable=False,
        )
        self._checkpointer = Checkpointer(
            self._record, self._probe_log, self.experiment, generators, start=0
        )
        self._schedule = schedule(plan, self.experiment, 0)
        self._open_probe_log()

    @_contain_errors
    def _open_probe_log(self) -> None:
        self._probe_log.open()

    def advance(self) -> None:
        """Move to the next step."""
        self.step, self.stage, self.optimizer = next(self._schedule)

    @_contain_errors
    def take_checkpoint(self) -> None:
        """Write a checkpoint if the schedule asks for one before this step."""
        if self._checkpointer.is_due(self.step):
            self._checkpointer.save(self.step, self.stage.name, self.optimizer)

    @_contain_errors
    def record_step(self, loss: float) -> None:
        """Write the row if this is a probe step; end the run after the last step.

        The models must hold this step's gradients.
        """
        if self.step in self._probe_log.steps:
            self._probe_log.add(self.step, loss)
            self._report(
                Progress(self.step, self.recipe.n_steps, self.stage.name, self._probe_log.latest)
            )
        self._checkpointer.publish(self.step)
        if self.step == self.recipe.n_steps:
            self._probe_log.close()
            self._end("finished")

    @_contain_errors
    def check_finite(self, loss: float) -> None:
        """Fail if the loss or its gradient is NaN or infinite."""
        check_finite(loss, self.optimizer, self.step, self.stage, self._folder)

    @_contain_errors
    def interrupt(self) -> None:
        """Write a checkpoint and stop before this step."""
        self._checkpointer.save(self.step, self.stage.name, self.optimizer)
        self._end("interrupted")

    def fail(self, error: BaseException) -> None:
        """End the run with an error."""
        if not self.ended:
            explanation = explained(error, self._folder, self.recipe, f"at step {self.step}")
            state: State = "failed" if isinstance(error, Exception) else "interrupted"
            self._finish(state, one_line(explanation))

    def _end(self, state: State) -> None:
        model_folder = self._folder / MODEL_FOLDER
        with writing(model_folder), write_folder_atomically(model_folder) as scratch:
            self.experiment.save_model(scratch)
        self._finish(state)

    def _finish(self, state: State, error: str = "") -> None:
        self.ended = True
        self._schedule.close()  # type: ignore[attr-defined]
        summary = self._probe_log.summary() | {"train/steps": self.step, "recipe": self.recipe.name}
        try:
            self._record.finish(summary, state)
        finally:
            self._open_resources.close()
        self._report(Outcome(state, error))


class _Batch:
    """The computations on all members at once: sampling, gradients, descent."""

    def __init__(self, members: Sequence[BatchMember]) -> None:
        self.members = list(members)
        experiments = [member.experiment for member in members]
        device = members[0].generators.data.device
        self._model = BatchedSimplified([experiment.model for experiment in experiments])
        self._task = BatchedTask(
            [experiment.task for experiment in experiments],
            [member.generators.data for member in members],
        )
        self._epsilon = torch.tensor(
            [member.recipe.training.epsilon for member in members], device=device
        )
        self._training = members[0].recipe.training

    def descend(self, stage: Stage) -> None:
        """Take an optimizer step for every member; plain SGD runs as one batched update."""
        if stage.section.optimizer != "sgd":
            for member in self.members:
                member.optimizer.step()
            return
        groups = [member.optimizer.param_groups[0] for member in self.members]
        rates, decay = (
            torch.tensor([group[name] for group in groups], device=self._epsilon.device)
            for name in ("lr", "weight_decay")
        )
        self._model.descend(_parameter_names(stage), rates=rates, weight_decay=decay)

    def losses(self, stage: Stage) -> list[float]:
        """Sample a batch per member; return the losses, and add the gradients to the models'."""
        training = self._training
        self._model.zero_gradients()
        losses = [0.0] * len(self.members)
        for _ in range(training.accumulation):
            batch = self._task.sample(training.batch_size // training.accumulation)
            share = 1 / training.accumulation
            result = self._model.closed_form(batch, epsilon=self._epsilon, share=share)
            self._model.add_gradients(result, batch, _parameter_names(stage))
            parts = result.loss.tolist()
            losses = [a + b / training.accumulation for a, b in zip(losses, parts, strict=True)]
        if not (all(map(math.isfinite, losses)) and self._model.gradients_are_finite()):
            for member, loss in zip(self.members, losses, strict=True):
                member.check_finite(loss)
        return losses


def _parameter_names(stage: Stage) -> tuple[str, ...]:
    return ("A1", "A2") if "all" in stage.parameters else stage.parameters


def train_batch(members: Sequence[BatchMember], stop: Callable[[], bool]) -> None:
    """Train members of equal shape to their end, or until `stop` returns True.

    Members that have not started by then stay untouched.
    """
    started: list[BatchMember] = []
    try:
        for member in members:
            if stop():
                break
            member.open()
            if not member.ended:
                started.append(member)
        _train(started, stop)
    except BaseException as error:  # out of memory, or a second interrupt
        for member in started:
            member.fail(error)
        if not isinstance(error, Exception):
            raise


def _train(members: list[BatchMember], stop: Callable[[], bool]) -> None:
    batch: _Batch | None = None
    while members := [member for member in members if not member.ended]:
        if batch is None or len(batch.members) != len(members):
            batch = _Batch(members)
        for member in members:
            member.advance()
        first = members[0]
        if first.step < first.recipe.n_steps and stop():
            for member in members:
                member.interrupt()
            return
        for member in members:
            member.take_checkpoint()
        for member, loss in zip(members, batch.losses(first.stage), strict=True):
            member.record_step(loss)
        if first.step < first.recipe.n_steps:
            batch.descend(first.stage)
