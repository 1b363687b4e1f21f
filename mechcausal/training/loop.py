"""The loop of all training: draw a batch, take its gradients, let others look, take the step.

`mechcausal.training.fit` turns it for a model and a task. Recorded runs wrap their records and
checkpoints around it, alone or several as one batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from mechcausal.recipes.stages import Stage
from mechcausal.training.schedule import Trainable, schedule


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
