"""The steps of a run: the stage, optimizer and learning rate of each."""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.recipes import StageSection
from mechcausal.recipes.stages import Stage, learning_rate


@runtime_checkable
class Trainable(Protocol):
    """What the loop needs of an experiment or an objective."""

    @classmethod
    def training_losses(cls, experiments: Sequence[Any], n_sequences: int) -> Float[Tensor, "run"]:
        """The losses of several on fresh sequences, nats."""

    def parameters(self, names: Sequence[str]) -> list[torch.nn.Parameter]:
        """The parameters with these names; "all" stands for every parameter."""

    def training_only(self, names: tuple[str, ...]) -> AbstractContextManager[None]:
        """Within the block only these parameters take gradients."""


def schedule(
    plan: Sequence[Stage], experiment: Trainable, start: int
) -> Generator[tuple[int, Stage, torch.optim.Optimizer]]:
    """Number, stage and optimizer of every step from `start` on.

    One more number follows the last training step, for the final probe step.
    """
    end = plan[-1].end
    for stage in plan:
        section = stage.section
        steps = range(max(start, stage.start), stage.end + (stage.end == end))
        if not steps:
            continue
        optimizer = _optimizer(section, experiment.parameters(stage.parameters))
        with experiment.training_only(stage.parameters):
            for step in steps:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(section, step - stage.start)
                yield step, stage, optimizer


def _optimizer(
    section: StageSection, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    kind: Any = kinds[section.optimizer]
    optimizer: torch.optim.Optimizer = kind(
        parameters, lr=section.lr, weight_decay=section.weight_decay
    )
    return optimizer
