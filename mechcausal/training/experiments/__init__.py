"""Experiments: what differs between kinds of runs, behind the interface `Experiment`."""

from mechcausal.measures.observation import Observation
from mechcausal.recipes import Recipe, RecipeError
from mechcausal.tasks import SeveralParentsTask, Task, build_task
from mechcausal.training.experiments.base import Experiment, Generators, Tell, tell_nobody
from mechcausal.training.experiments.memory import check_memory, experiment_needs

__all__ = ["Experiment", "Generators", "Observation", "build_experiment", "check_experiment"]


def check_experiment(recipe: Recipe, *, on_this_machine: bool = True) -> None:
    """Check quickly, before anything large is allocated, that the experiment can be built.

    Args:
        recipe: a parsed recipe.
        on_this_machine: whether this machine will train it, and must have the memory.

    Raises:
        GraphError, PriorError: the graph or the prior is invalid.
        RecipeError: the model cannot learn the task, or the run does not fit into memory.
    """
    graph = None
    if recipe.task.kind == "causal_graph":
        graph = recipe.build_graph()
        task = build_task(graph, recipe.build_prior())
        check_model(recipe, task)
        length = task.sequence_length
    else:
        assert recipe.task.repeat_lengths is not None  # checked when the recipe was parsed
        length = 2 * recipe.task.repeat_lengths[1] + 1
    model, vocab = recipe.model, recipe.task.vocab_size
    if model.kind == "standard" and model.embeddings == "fixed" and model.d_model < vocab + length:
        raise RecipeError(
            f"model.d_model: fixed embeddings of {vocab} tokens and {length} positions "
            f"need {vocab + length}, found {model.d_model}"
        )
    if on_this_machine:
        check_memory(experiment_needs(recipe, graph, length), recipe.device)


def check_model(recipe: Recipe, task: Task) -> None:
    """Check that the model can learn the task.

    Raises:
        RecipeError: it cannot.
    """
    model, graph = recipe.model, task.graph
    if model.kind == "simplified" and isinstance(task, SeveralParentsTask):
        raise RecipeError(
            "model.kind: simplified learns graphs with at most one parent for each position and a "
            f"uniform query; this one has up to {graph.max_parents}: choose disentangled or "
            "standard"
        )
    if recipe.training.target == "posterior" and not isinstance(task, SeveralParentsTask):
        raise RecipeError(
            "training.target: posterior is for graphs that name the query's parents: "
            "with other graphs the posterior given the roots has no closed form"
        )


def build_experiment(
    recipe: Recipe,
    generators: Generators,
    tell: Tell = tell_nobody,
    *,
    closed_form: bool = False,
) -> Experiment:
    """The experiment that a recipe describes.

    Args:
        recipe: checked.
        generators: of the run.
        tell: called with what is being prepared.
        closed_form: probe a simplified model in closed form instead of through hooks.

    Raises:
        GraphError, PriorError: the graph or the prior is invalid.
    """
    if recipe.task.kind == "repeated_tokens":
        from mechcausal.training.experiments.repeated_tokens import RepeatedTokens

        return RepeatedTokens(recipe, generators)
    from mechcausal.training.experiments.causal_graph import CausalGraphExperiment

    return CausalGraphExperiment(recipe, generators, tell, closed_form=closed_form)
