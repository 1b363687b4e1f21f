"""The steps of a run: the stage, optimizer and learning rate of each."""

from collections.abc import Generator, Sequence
from typing import Any

import torch

from mechcausal.recipes import StageSection
from mechcausal.recipes.stages import Stage, learning_rate
from mechcausal.training.objective import Trainable


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
