"""The loop of all training: draw a batch, take its gradients, let others look, take the step.

`fit` is the loop for a model and a task, without a folder, W&B or a recipe. Recorded runs wrap
their records and checkpoints around the same loop, alone or several as one batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import torch

from mechcausal.models.adapter import HookedTransformer
from mechcausal.models.base import GraphModel
from mechcausal.models.predicting import graph_model
from mechcausal.recipes import RecipeError, StageSection
from mechcausal.recipes.errors import validated
from mechcausal.recipes.stages import Stage, in_sequence
from mechcausal.tasks import Task
from mechcausal.training.objective import Objective, Trainable
from mechcausal.training.schedule import schedule


@dataclass(frozen=True)
class Step:
    """A step of training whose gradients are there, and whose optimizer has not moved yet.

    Attributes:
        number: steps done so far.
        stage: name of the stage.
        loss: on the step's batch, nats.
        lr: learning rate of the step.
        is_last: whether this is the look after the last step: the optimizer moves no more.
    """

    number: int
    stage: str
    loss: float
    lr: float
    is_last: bool


def fit(
    model: GraphModel | HookedTransformer,
    task: Task,
    stages: Sequence[Stage | StageSection],
    *,
    batch_size: int,
    generator: torch.Generator,
    accumulation: int = 1,
    epsilon: float = 1e-3,
) -> Iterator[Step]:
    """Train a model on a task, one step for each turn of the caller's loop.

    The caller's block sees each step with its gradients, before the optimizer moves. After the last
    step comes one more turn, with gradients of a fresh batch and no move, for a look at the result.
    Leaving the loop early leaves the model as trained so far.

    Args:
        model: trained in place.
        task: draws the batches; any object with `vocab_size`, `sequence_length` and `sample`.
        stages: what is trained, and how, one after another. A bare `StageSection` trains all
            parameters.
        batch_size: fresh sequences for every step.
        generator: source of the sequences, on the model's device; nothing else is random.
        accumulation: parts into which a batch is divided to save memory.
        epsilon: added to predicted probabilities inside the logarithm of the loss, as in recipes:
            a model of the paper's gives probability 0 to what a sequence does not hold.

    Raises:
        RecipeError: no steps, settings of a stage out of range, parts that do not divide the batch.
        ModelError, TaskError: they do not fit together, or batches make no sense.

    Example:
        >>> from mechcausal.graphs import chain
        >>> from mechcausal.models.simplified import SimplifiedTransformer
        >>> from mechcausal.tasks import SingleParentTask
        >>> from mechcausal.tasks.priors import DirichletPrior
        >>> task = SingleParentTask(chain(7), DirichletPrior.symmetric(0.1, vocab_size=3))
        >>> model = SimplifiedTransformer(3, 8)
        >>> model.initialise(beta0=1.0)
        >>> stages = [Stage("graph", ("A1",), StageSection(steps=2, lr=100.0))]
        >>> generator = torch.Generator().manual_seed(0)
        >>> for step in fit(model, task, stages, batch_size=64, generator=generator):
        ...     print(step.number, step.stage, step.loss > 0, step.is_last)
        0 graph True False
        1 graph True False
        2 graph True True
    """
    if batch_size < 1 or accumulation < 1 or batch_size % accumulation:
        raise RecipeError(
            f"accumulation: {accumulation} parts do not divide a batch of {batch_size}"
        )
    plan = [_validated(stage) for stage in in_sequence(stages)]
    if not plan:
        raise RecipeError("stages: no steps in any of them: nothing to train")
    objective = Objective(graph_model(model, task), task, generator=generator, epsilon=epsilon)
    for stage in plan:
        objective.parameters(stage.parameters)
    return _steps(Learner(objective, plan), batch_size, accumulation)


def _validated(stage: Stage) -> Stage:
    section = validated(StageSection, asdict(stage.section), source=f"stage {stage.name}")
    return replace(stage, section=section)


def _steps(learner: "Learner", batch_size: int, accumulation: int) -> Iterator[Step]:
    try:
        for _ in loop([learner], batch_size, accumulation=accumulation):
            yield learner.step
    finally:
        learner.close()


class Trained(ABC):
    """What the loop trains: a learner, or a recorded run around one.

    Attributes:
        experiment: gives the loss.
        loss: on the last batch; the loop sets it.
    """

    experiment: Trainable
    loss: float

    @abstractmethod
    def begin_step(self) -> bool:
        """Go on to the next step, before its batch is drawn; False ends it."""

    @abstractmethod
    def descend(self) -> None:
        """Take the optimizer's step."""


T = TypeVar("T", bound=Trained)


def loop(trained: Sequence[T], batch_size: int, *, accumulation: int = 1) -> Iterator[list[T]]:
    """Train models of equal shape together, until each has ended.

    Each turn of the caller's loop sees those that go on, with their gradients and losses, before
    their optimizers move. All gradients come from one backward pass.
    """
    while going := [each for each in trained if each.begin_step()]:
        experiments = [each.experiment for each in going]
        losses = accumulate_gradients(experiments, batch_size, accumulation=accumulation)
        for each, loss in zip(going, losses, strict=True):
            each.loss = loss
        yield going
        for each in going:
            each.descend()
        trained = going


def accumulate_gradients(
    experiments: Sequence[Trainable], batch_size: int, *, accumulation: int
) -> list[float]:
    """Take the gradients of a batch part by part; return each model's mean loss."""
    totals = [0.0] * len(experiments)
    for _ in range(accumulation):
        losses = type(experiments[0]).training_losses(experiments, batch_size // accumulation)
        (losses.sum() / accumulation).backward()
        parts = losses.tolist()
        totals = [a + b / accumulation for a, b in zip(totals, parts, strict=True)]
    return totals


class Learner(Trained):
    """A model at one step of its stages, with the optimizer of the stage.

    Attributes:
        number: steps done so far.
        stage: the stage of the next step.
        optimizer: of the stage.
    """

    number: int
    stage: Stage
    optimizer: torch.optim.Optimizer

    def __init__(self, experiment: Trainable, plan: Sequence[Stage], *, start: int = 0) -> None:
        """Begin at a step.

        Args:
            experiment: what is trained.
            plan: its stages, in sequence.
            start: steps already done.
        """
        self.experiment = experiment
        self._end = plan[-1].end
        self._schedule = schedule(plan, experiment, start)

    @property
    def step(self) -> Step:
        """The step as `fit` yields it."""
        lr = self.optimizer.param_groups[0]["lr"]
        return Step(self.number, self.stage.name, self.loss, lr, self.number == self._end)

    def begin_step(self) -> bool:
        """Set the next step's learning rate and clear the gradients; False after the last."""
        following = next(self._schedule, None)
        if following is None:
            return False
        self.number, self.stage, self.optimizer = following
        self.optimizer.zero_grad()
        return True

    def descend(self) -> None:
        """Take the optimizer's step, unless all are done."""
        if self.number < self._end:
            self.optimizer.step()

    def close(self) -> None:
        """Leave the stage: all its parameters take gradients again."""
        self._schedule.close()
