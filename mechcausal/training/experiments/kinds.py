"""What each `task.kind` of a recipe trains; a new kind of task is added to this table."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from mechcausal.recipes import Recipe
from mechcausal.training.experiments.base import Experiment


@dataclass(frozen=True)
class Kind:
    """One kind of task.

    Attributes:
        experiment: `module:class` of its experiment, in this package. Loaded when a run is built,
            because TransformerLens takes seconds to import.
        length: tokens of a sequence, from a parsed recipe.
        length_field: the recipe's field that determines the length.
    """

    experiment: str
    length: Callable[[Recipe], int]
    length_field: str

    def load(self) -> Callable[..., Experiment]:
        """The class of its experiment; its constructor takes a recipe and generators."""
        module, name = self.experiment.split(":")
        experiment: Callable[..., Experiment] = getattr(
            import_module(f"{__package__}.{module}"), name
        )
        return experiment


def _of_graph(recipe: Recipe) -> int:
    return recipe.build_graph().sequence_length


def _of_task(recipe: Recipe) -> int:
    return recipe.build_task().sequence_length


def _of_repeats(recipe: Recipe) -> int:
    assert recipe.task.repeat_lengths is not None  # checked when the recipe was parsed
    return 2 * recipe.task.repeat_lengths[1] + 1


def _of_text(recipe: Recipe) -> int:
    assert recipe.task.context is not None  # checked when the recipe was parsed
    return recipe.task.context


KINDS: dict[str, Kind] = {
    "causal_graph": Kind("causal_graph:CausalGraphExperiment", _of_graph, "graph.sequence_length"),
    "repeated_tokens": Kind("repeated_tokens:RepeatedTokens", _of_repeats, "task.repeat_lengths"),
    "text": Kind("text:TextExperiment", _of_text, "task.context"),
    "tree": Kind("tree:TreeExperiment", _of_task, "task.depth"),
    "in_context_graphs": Kind(
        "in_context_graphs:InContextGraphExperiment", _of_task, "task.positions, task.examples"
    ),
    "selective_lags": Kind("selective_lags:LagExperiment", _of_task, "task.context"),
}
"""Every kind that a recipe can name, "own" apart."""
