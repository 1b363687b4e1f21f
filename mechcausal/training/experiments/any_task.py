"""Any task, learned by a standard transformer or a model of the user's own."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechcausal.measures.observation import Observation
from mechcausal.measures.task_observer import TaskObserver
from mechcausal.models.predicting import graph_model
from mechcausal.recipes import Recipe, RecipeError
from mechcausal.tasks import Task, TaskError, check_batch
from mechcausal.training.experiments.base import Generators, ModelExperiment
from mechcausal.training.experiments.models import ModelBuilder, build_model
from mechcausal.training.objective import Objective


class TaskExperiment(ModelExperiment):
    """A model trained to predict the labels of a task.

    The model is the standard transformer that the recipe describes, or the caller's. The figures
    are `loss/eval` and, of a task with `predictions`, the Bayes loss and a `strategy/kl_*` for each
    of them; the matrices are the attention of every layer. For more, override `observe`.

    Attributes:
        task: what is learned.
        model: the trained model.
        observer: measures the model on fixed sequences.
    """

    def __init__(
        self,
        recipe: Recipe,
        generators: Generators,
        *,
        task: Task,
        model: ModelBuilder | None = None,
    ) -> None:
        """Build the model at its start, and the observer.

        Args:
            recipe: its sections `graph` and `task` are not read.
            generators: of the run.
            task: what is learned.
            model: builds the model; the recipe's standard transformer when absent.

        Raises:
            TaskError: the task's batches make no sense.
            ModelError: the caller's model does not fit the task.
        """
        super().__init__(recipe, generators)
        self.task = task
        device = generators.data.device
        built = model or partial(build_model, recipe)
        self.model = graph_model(built(task, seed=generators.init, device=device), task)
        evaluation, epsilon = recipe.evaluation, recipe.training.epsilon
        self.observer = TaskObserver(
            self.model,
            task,
            n_sequences=evaluation.n_sequences,
            epsilon=epsilon,
            generator=generators.evaluation,
        )
        self.objective = Objective(self.model, task, generator=generators.data, epsilon=epsilon)

    @classmethod
    def check(cls, recipe: Recipe, **options: Any) -> None:
        """Refuse a task whose batches make no sense, and a recipe's model of causal graphs."""
        task = options.get("task")
        if not isinstance(task, Task):
            raise TaskError(
                f"task: a {type(task).__name__} lacks vocab_size, sequence_length or sample"
            )
        check_batch(task, task.sample(2, generator=torch.Generator().manual_seed(0)), 2)
        if recipe.training.target != "sampled":
            raise RecipeError(
                f"training.target: {recipe.training.target} is for causal graphs; your own task "
                "says in its labels what is learned"
            )
        if options.get("model") is None and recipe.model.kind != "standard":
            raise RecipeError(
                f"model.kind: {recipe.model.kind} learns causal graphs alone; this task needs kind "
                "standard, or a model of your own"
            )

    def losses(self) -> dict[str, float]:
        """Evaluation loss and, if the task knows it, the Bayes loss and the gap to it."""
        return self.observer.losses()

    def evaluation_tokens(self) -> Int[Tensor, "batch pos"]:
        """The evaluation sequences."""
        return self.observer.batch.tokens

    def observe(self) -> Observation:
        """Losses, the divergence from every prediction of the task, and attention."""
        return self.observer.observe()
