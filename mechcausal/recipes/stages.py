"""The schedule of a run: its stages, its probe steps and its learning rates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mechcausal.recipes import ProbingSection, Recipe, StageSection


@dataclass(frozen=True)
class Stage:
    """One stage of gradient descent.

    Attributes:
        name: "stage1", "stage2" or "joint" in runs of a recipe.
        parameters: names of the trained parameters, or "all".
        section: the stage's settings.
        start: the run's step at which the stage starts; `in_sequence` sets it.
    """

    name: str
    parameters: tuple[str, ...]
    section: StageSection
    start: int = 0

    @property
    def end(self) -> int:
        """The run's step after the last one of the stage."""
        return self.start + self.section.steps


def stages(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe's algorithm, in order, without stages of 0 steps."""
    training = recipe.training
    if training.algorithm == "joint":
        return in_sequence([Stage("joint", ("all",), training.joint)])
    first = Stage("stage1", ("A1",), training.stage1)
    return in_sequence([first, Stage("stage2", ("A2",), training.stage2)])


def in_sequence(plan: Sequence[Stage | StageSection]) -> list[Stage]:
    """The stages one after another from step 0, without those of 0 steps.

    A bare section trains all parameters, under the name "stage" and its number.

    Example:
        >>> plan = [StageSection(steps=2), Stage("second", ("A2",), StageSection(steps=3))]
        >>> [(stage.name, stage.start, stage.end) for stage in in_sequence(plan)]
        [('stage1', 0, 2), ('second', 2, 5)]
    """
    result: list[Stage] = []
    start = 0
    for number, given in enumerate(plan, 1):
        stage = given if isinstance(given, Stage) else Stage(f"stage{number}", ("all",), given)
        if stage.section.steps:
            result.append(replace(stage, start=start))
            start += stage.section.steps
    return result


def probe_steps(probing: ProbingSection, plan: list[Stage]) -> list[int]:
    """The steps at which the model is probed, ascending: the first, the last and the schedule's.

    Each stage starts with `dense` probe steps in a row. Then comes every `every`-th step, or with
    the geometric schedule the steps 1, 2, 4, 8, ... after the stage's start.
    """
    end = plan[-1].end if plan else 0
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
    """The learning rate at a step, counted from the start of its stage.

    `lr min(1, (step + 1) / warmup)`, times `(1 + cos(pi step / steps)) / 2` with the cosine
    schedule.

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
