"""What is trained when: the stages of a recipe, its probe steps, its learning rates."""

import math
from dataclasses import dataclass

from mechcausal.recipes import ProbingSection, Recipe, StageSection


@dataclass(frozen=True)
class Stage:
    """One stage of gradient descent: which parameters, how, from which step on."""

    name: str
    parameters: tuple[str, ...]
    section: StageSection
    start: int


def stages(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe's algorithm, in order; empty ones are left out."""
    training = recipe.training
    plan: list[tuple[str, tuple[str, ...], StageSection]]
    if training.algorithm == "joint":
        plan = [("joint", ("all",), training.joint)]
    else:
        plan = [("stage1", ("A1",), training.stage1), ("stage2", ("A2",), training.stage2)]
    result: list[Stage] = []
    start = 0
    for name, parameters, section in plan:
        if section.steps:
            result.append(Stage(name, parameters, section, start))
            start += section.steps
    return result


def probe_steps(probing: ProbingSection, plan: list[Stage]) -> list[int]:
    """The steps at which the model is looked at: the first and last, and by the schedule.

    Each stage starts with `dense` probe steps in a row; then follow every `every`-th step, or with
    the geometric schedule those at 1, 2, 4, 8, ... from the stage's start.
    """
    end = plan[-1].start + plan[-1].section.steps if plan else 0
    steps = {0, end}
    for stage in plan if probing.enabled else ():
        offsets = set(range(min(probing.dense, stage.section.steps)))
        if probing.schedule == "every":
            offsets |= set(range(0, stage.section.steps, probing.every))
        else:
            offsets |= {2**k for k in range(stage.section.steps.bit_length())}
        steps |= {stage.start + offset for offset in offsets if offset < stage.section.steps}
    return sorted(steps)


def learning_rate(section: StageSection, step: int) -> float:
    """The learning rate of a step, counted from the start of its stage.

    `lr min(1, (step + 1) / warmup)`; with the cosine schedule that times
    `(1 + cos(pi step / steps)) / 2`.

    Example:
        >>> [learning_rate(StageSection(steps=4, lr=1.0, schedule="cosine"), t) for t in (0, 2)]
        [1.0, 0.5]
    """
    rate = section.lr
    if step < section.warmup:
        rate *= (step + 1) / section.warmup
    if section.schedule == "cosine":
        rate *= (1 + math.cos(math.pi * step / section.steps)) / 2
    return rate
