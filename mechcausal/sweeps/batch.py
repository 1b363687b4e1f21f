"""A batch of runs in training: every tensor has one more axis, every member its own record.

Reads as `mechcausal.training.run` does, with every action on the members one by one and every
computation on all of them together.
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
from mechcausal.recipes.stages import Stage, probe_steps, stages
from mechcausal.records.run_folder import MODEL_FOLDER, State, new_run_folder
from mechcausal.records.tracking import RunRecord, writing
from mechcausal.support.devices import device_named
from mechcausal.support.files import write_folder_atomically
from mechcausal.sweeps.member import one_line
from mechcausal.sweeps.outcome import Outcome
from mechcausal.tasks import SingleParentTask
from mechcausal.tasks.batched import BatchedTask
from mechcausal.training.album import Album
from mechcausal.training.checkpointing import Checkpointer
from mechcausal.training.checkpoints import environment
from mechcausal.training.experiments import Generators
from mechcausal.training.experiments.causal_graph import CausalGraphExperiment
from mechcausal.training.run import Progress, check_finite, explained, schedule

P = ParamSpec("P")
Tell = Callable[[Progress | Outcome], None]


class _Experiment(CausalGraphExperiment):
    """A member's experiment: looked at in closed form, without pictures."""

    observer_type = ClosedFormObserver
    model: SimplifiedTransformer
    task: SingleParentTask

    def heatmaps(self, matrices: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return {}

    def draw_figures(self, folder: Path, **_: Any) -> dict[str, Path]:
        return {}


def _alone(action: Callable[Concatenate["BatchMember", P], None]) -> Callable[..., None]:
    """Let an error of a member end this member alone; nothing for one that has ended."""

    @wraps(action)
    def act(member: "BatchMember", *args: P.args, **options: P.kwargs) -> None:
        try:
            if not member.ended:
                action(member, *args, **options)
        except Exception as error:
            member.fail(error)

    return act


class BatchMember:
    """A run of a batch: what it has of its own.

    Attributes:
        recipe: checked.
        ended: whether it has finished, failed or been interrupted.
    """

    experiment: _Experiment
    generators: Generators
    step: int
    stage: Stage
    optimizer: torch.optim.Optimizer
    _record: RunRecord
    _album: Album
    _checkpointer: Checkpointer
    _schedule: Iterator[tuple[int, Stage, torch.optim.Optimizer]]

    def __init__(self, recipe: Recipe, folder: Path, mode: WandbMode, tell: Tell) -> None:
        """Nothing is begun before `open`.

        Args:
            recipe: of a simplified model, checked.
            folder: of the new run.
            mode: of W&B.
            tell: told the progress at every probe step, and at the end the outcome.
        """
        self.recipe = recipe
        self.ended = False
        self.step = 0
        self._folder = folder
        self._mode = mode
        self._tell = tell
        self._held = ExitStack()

    def open(self) -> None:
        """Make the folder and hold it, build the experiment, open the record."""
        recipe, plan = self.recipe, stages(self.recipe)
        try:
            self._held.enter_context(new_run_folder(recipe, self._folder))
            generators = Generators.from_seed(recipe.seed, device_named(recipe.device))
            self.experiment, self.generators = _Experiment(recipe, generators), generators
            around = environment(generators.data.device)
            self._record = RunRecord(
                self._folder, recipe, self._mode, environment=around, lean=True
            )
        except BaseException as error:
            self._held.close()
            self.ended = True
            said = explained(error, self._folder, recipe, "before the first step")
            self._tell(Outcome("failed", one_line(said)))
            if not isinstance(error, Exception):
                raise
            return
        for note in self.experiment.notes:
            self._record.warn(note)
        self._album = Album(
            self._record,
            self.experiment,
            steps=probe_steps(recipe.probing, plan),
            stage_starts=[stage.start for stage in plan],
            durable=False,
        )
        self._checkpointer = Checkpointer(
            self._record, self._album, self.experiment, generators, start=0
        )
        self._schedule = schedule(plan, self.experiment, 0)
        self._open_album()

    @_alone
    def _open_album(self) -> None:
        self._album.open()

    def advance(self) -> None:
        """Go on to the next step."""
        self.step, self.stage, self.optimizer = next(self._schedule)

    @_alone
    def take_checkpoint(self) -> None:
        """If the schedule wants one before this step."""
        if self._checkpointer.is_due(self.step):
            self._checkpointer.save(self.step, self.stage.name, self.optimizer)

    @_alone
    def look(self, loss: float) -> None:
        """With the loss and its gradient known: write the row, and end after the last step."""
        if self.step in self._album.steps:
            self._album.add(self.step, loss)
            self._tell(
                Progress(self.step, self.recipe.n_steps, self.stage.name, self._album.latest)
            )
        self._checkpointer.publish(self.step)
        if self.step == self.recipe.n_steps:
            self._album.close()
            self._end("finished")

    @_alone
    def check_finite(self, loss: float) -> None:
        """Fail if the loss or its gradient is NaN or infinite."""
        check_finite(loss, self.optimizer, self.step, self.stage, self._folder)

    @_alone
    def interrupt(self) -> None:
        """Stop before this step, with a checkpoint."""
        self._checkpointer.save(self.step, self.stage.name, self.optimizer)
        self._end("interrupted")

    def fail(self, error: BaseException) -> None:
        """End with an error."""
        if not self.ended:
            said = explained(error, self._folder, self.recipe, f"at step {self.step}")
            state: State = "failed" if isinstance(error, Exception) else "interrupted"
            self._finish(state, one_line(said))

    def _end(self, state: State) -> None:
        final = self._folder / MODEL_FOLDER
        with writing(final), write_folder_atomically(final) as place:
            self.experiment.save_model(place)
        self._finish(state)

    def _finish(self, state: State, error: str = "") -> None:
        self.ended = True
        self._schedule.close()  # type: ignore[attr-defined]
        summary = self._album.summary() | {"train/steps": self.step, "recipe": self.recipe.name}
        try:
            self._record.finish(summary, state)
        finally:
            self._held.close()
        self._tell(Outcome(state, error))


class _Together:
    """What is computed for all members at once."""

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
        """Change the weights of every member; plain gradient descent in one go."""
        if stage.section.optimizer != "sgd":
            for member in self.members:
                member.optimizer.step()
            return
        groups = [member.optimizer.param_groups[0] for member in self.members]
        rates, decay = (
            torch.tensor([group[name] for group in groups], device=self._epsilon.device)
            for name in ("lr", "weight_decay")
        )
        self._model.descend(_names(stage), rates=rates, weight_decay=decay)

    def losses(self, stage: Stage) -> list[float]:
        """Of each member's batch, part by part; gradients add up in the models."""
        training = self._training
        self._model.zero_gradients()
        losses = [0.0] * len(self.members)
        for _ in range(training.accumulation):
            batch = self._task.sample(training.batch_size // training.accumulation)
            share = 1 / training.accumulation
            found = self._model.closed_form(batch, epsilon=self._epsilon, share=share)
            self._model.add_gradients(found, batch, _names(stage))
            parts = found.loss.tolist()
            losses = [a + b / training.accumulation for a, b in zip(losses, parts, strict=True)]
        if not (all(map(math.isfinite, losses)) and self._model.gradients_are_finite()):
            for member, loss in zip(self.members, losses, strict=True):
                member.check_finite(loss)
        return losses


def _names(stage: Stage) -> tuple[str, ...]:
    return ("A1", "A2") if "all" in stage.parameters else stage.parameters


def train_batch(members: Sequence[BatchMember], stop: Callable[[], bool]) -> None:
    """Train members of equal shape to their end, or until asked to stop.

    Members that were not begun when it is time to stop stay as they are.
    """
    begun: list[BatchMember] = []
    try:
        for member in members:
            if stop():
                break
            member.open()
            if not member.ended:
                begun.append(member)
        _train(begun, stop)
    except BaseException as error:  # out of memory, or interrupted a second time
        for member in begun:
            member.fail(error)
        if not isinstance(error, Exception):
            raise


def _train(members: list[BatchMember], stop: Callable[[], bool]) -> None:
    together: _Together | None = None
    while members := [member for member in members if not member.ended]:
        if together is None or len(together.members) != len(members):
            together = _Together(members)
        for member in members:
            member.advance()
        first = members[0]
        if first.step < first.recipe.n_steps and stop():
            for member in members:
                member.interrupt()
            return
        for member in members:
            member.take_checkpoint()
        for member, loss in zip(members, together.losses(first.stage), strict=True):
            member.look(loss)
        if first.step < first.recipe.n_steps:
            together.descend(first.stage)
