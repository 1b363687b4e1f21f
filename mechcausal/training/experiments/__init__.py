"""Experiments: what differs between kinds of runs, behind the interface `Experiment`."""

from mechcausal.measures.observation import Observation
from mechcausal.recipes import Recipe, RecipeError
from mechcausal.tasks import GraphTask, SeveralParentsTask, build_task, check_prior
from mechcausal.training.experiments.base import Experiment, Generators, Tell, tell_nobody
from mechcausal.training.experiments.clamping import RunClamp, check_clamp_fits
from mechcausal.training.experiments.kinds import KINDS
from mechcausal.training.experiments.memory import check_memory, experiment_needs, n_probe_steps
from mechcausal.training.experiments.own import OwnExperiment, build_own, check_own, options_of

__all__ = [
    "Experiment",
    "Generators",
    "Observation",
    "OwnExperiment",
    "RunClamp",
    "build_experiment",
    "check_experiment",
]


def check_experiment(
    recipe: Recipe, experiment: OwnExperiment | None = None, *, on_this_machine: bool = True
) -> None:
    """Check quickly, before anything large is allocated, that the experiment can be built.

    Args:
        recipe: a parsed recipe.
        experiment: the caller's own.
        on_this_machine: whether this machine will train it, and must have the memory.

    Raises:
        GraphError, PriorError, TaskError: the graph, the prior or the task is invalid.
        RecipeError: the model cannot learn the task, the text cannot be read, the run does not fit
            into memory, or the recipe is of the caller's own experiment and that is not given.
    """
    if experiment is not None:
        check_own(experiment).check(recipe, **options_of(experiment))
    elif recipe.experiment is not None or "own" in (recipe.task.kind, recipe.model.kind):
        raise RecipeError(
            f"{recipe.name}: the experiment is the caller's own, "
            f"{recipe.experiment or 'not named'}: pass it in Python, as "
            "mechcausal.train(recipe, experiment=...) or mechcausal.resume(folder, experiment=...)"
        )
    if recipe.task.kind == "own":
        n_probe_steps(recipe)
        return
    kind = KINDS[recipe.task.kind]
    graph = None
    if recipe.task.kind == "causal_graph":
        graph = recipe.build_graph()
        prior = options_of(experiment).get("prior")
        if prior is not None:
            check_prior(prior, recipe.task.vocab_size)
        check_model(recipe, build_task(graph, prior or recipe.build_prior()))
    elif recipe.task.kind == "text" and on_this_machine:
        recipe.build_text()
    length = kind.length(recipe)
    model, vocab = recipe.model, recipe.task.vocab_size
    if model.kind == "standard" and model.embeddings == "fixed" and model.d_model < vocab + length:
        raise RecipeError(
            f"model.d_model: fixed embeddings of {vocab} tokens and {length} positions "
            f"need {vocab + length}, found {model.d_model}"
        )
    check_clamp_fits(recipe, graph, length)
    if on_this_machine:
        check_memory(experiment_needs(recipe, graph, length), recipe.device)


def check_model(recipe: Recipe, task: GraphTask) -> None:
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
    experiment: OwnExperiment | None = None,
    closed_form: bool = False,
) -> Experiment:
    """The experiment that a recipe describes, or the caller's own.

    Args:
        recipe: checked.
        generators: of the run.
        tell: called with what is being prepared.
        experiment: the caller's own, checked.
        closed_form: probe a simplified model in closed form instead of through hooks.

    Raises:
        GraphError, PriorError: the graph or the prior is invalid.
        RecipeError: the text has changed since it was checked.
    """
    if experiment is not None:
        return build_own(experiment, recipe, generators, tell)
    kind = KINDS[recipe.task.kind].load()
    if recipe.task.kind == "causal_graph":
        return kind(recipe, generators, tell=tell, closed_form=closed_form)
    return kind(recipe, generators)
