"""Experiments: what is trained on what, and what is looked at on the way.

The training loop knows only `Experiment`; each experiment brings its data, model, probes and
pictures.
"""

from mechcausal.experiments.base import Experiment, Generators, Observation
from mechcausal.recipes import Recipe
from mechcausal.tasks import SingleParentTask

__all__ = ["Experiment", "Generators", "Observation", "build_experiment", "check_experiment"]


def check_experiment(recipe: Recipe) -> None:
    """Find out in no time whether the experiment can be built.

    Raises:
        GraphError, PriorError: a graph or prior that is not one.
    """
    if recipe.task.kind == "causal_graph":
        SingleParentTask(recipe.build_graph(), recipe.build_prior())


def build_experiment(recipe: Recipe, generators: Generators) -> Experiment:
    """The experiment that a recipe describes.

    Raises:
        GraphError, PriorError: a graph or prior that is not one.
    """
    if recipe.task.kind == "repeated_tokens":
        from mechcausal.experiments.repeated_tokens import RepeatedTokens

        return RepeatedTokens(recipe, generators)
    from mechcausal.experiments.causal_graph import CausalGraphExperiment

    return CausalGraphExperiment(recipe, generators)
