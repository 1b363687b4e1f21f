"""Train any model on any task, without a folder, W&B or a recipe."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import torch

from mechcausal.models.adapter import HookedTransformer
from mechcausal.models.base import GraphModel
from mechcausal.models.predicting import graph_model
from mechcausal.recipes import RecipeError, StageSection
from mechcausal.recipes.errors import validated
from mechcausal.recipes.stages import Stage, in_sequence
from mechcausal.tasks import Task
from mechcausal.training.loop import Learner, Step, loop
from mechcausal.training.objective import Objective


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


def _steps(learner: Learner, batch_size: int, accumulation: int) -> Iterator[Step]:
    try:
        for _ in loop([learner], batch_size, accumulation=accumulation):
            yield learner.step
    finally:
        learner.close()
