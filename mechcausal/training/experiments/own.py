"""An experiment of the caller's own: what is accepted, and what a recipe says of it."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import partial
from inspect import isabstract, signature
from typing import Any

from mechcausal.recipes import Recipe, RecipeError
from mechcausal.recipes.stages import stages
from mechcausal.support.messages import excerpt
from mechcausal.training.experiments.base import Experiment, Generators, Tell

OwnExperiment = type[Experiment] | partial[Experiment]
"""A subclass of `Experiment`, or `functools.partial` of one with its further arguments."""

_LONGEST = 200


def recorded(recipe: Recipe, experiment: OwnExperiment) -> Recipe:
    """The recipe that a run of the caller's own experiment records: it says whose it is.

    Its `experiment` describes the class and its arguments, `task.kind` becomes the class's, and
    `model.kind` becomes "own" if the caller builds the model.

    Raises:
        RecipeError: that is no experiment, or its kind needs other settings.
    """
    kind = check_own(experiment).kind
    changes: dict[str, Any] = {"experiment": describe(experiment), "task__kind": kind}
    if options_of(experiment).get("model") is not None:
        changes["model__kind"] = "own"
    return recipe.with_overrides(**changes)


def check_own(experiment: object) -> type[Experiment]:
    """The class of an experiment of the caller's own.

    Raises:
        RecipeError: it is not a subclass of `Experiment` or a partial of one, it lacks methods, or
            its constructor cannot be called with a recipe and generators.
    """
    kind = experiment.func if isinstance(experiment, partial) else experiment
    if not isinstance(kind, type) or not issubclass(kind, Experiment):
        raise RecipeError(
            f"experiment: {excerpt(_name(experiment))} is neither a subclass of "
            "mechcausal.Experiment nor functools.partial of one"
        )
    if isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise RecipeError(f"experiment: {kind.__name__} lacks {missing}")
    arguments = experiment.args if isinstance(experiment, partial) else ()
    if arguments:
        raise RecipeError(f"experiment: give the arguments of {kind.__name__} to partial by name")
    options = experiment.keywords if isinstance(experiment, partial) else {}
    try:
        signature(kind).bind("recipe", "generators", **options)
    except TypeError as error:
        raise RecipeError(
            f"experiment: {kind.__name__} is called with a recipe and generators: {error}"
        ) from None
    return kind


def options_of(experiment: OwnExperiment | None) -> Mapping[str, Any]:
    """The named arguments that the caller gives the experiment."""
    return experiment.keywords if isinstance(experiment, partial) else {}


def build_own(
    experiment: OwnExperiment, recipe: Recipe, generators: Generators, tell: Tell
) -> Experiment:
    """Build the caller's experiment, and check what training needs of it.

    Raises:
        RecipeError: it holds no recipe or no HookedTransformer, or lacks a stage's parameters.
    """
    from mechcausal.models.adapter import HookedTransformer  # takes seconds to load

    wants = signature(experiment).parameters
    options = {"tell": tell} if "tell" in wants else {}
    built = experiment(recipe, generators, **options)
    name = type(built).__name__
    if getattr(built, "recipe", None) != recipe:
        raise RecipeError(
            f"experiment: {name} has not kept its recipe: its __init__ has to call "
            "super().__init__(recipe, generators)"
        )
    if not isinstance(built.hooked, HookedTransformer):
        raise RecipeError(
            f"experiment: {name}.hooked is a {type(built.hooked).__name__}, "
            "needed is a HookedTransformer"
        )
    for stage in stages(recipe):
        built.parameters(stage.parameters)
    return built


def describe(value: object) -> str:
    """A class or partial as one line for the recipe; the same on every machine.

    Example:
        >>> from functools import partial
        >>> describe(partial(Experiment, task=partial(int, "101", base=2)))
        "Experiment(task=int('101', base=2))"
    """
    if not isinstance(value, partial):
        return _name(value)
    parts = [describe(item) for item in value.args]
    parts += [f"{key}={describe(item)}" for key, item in value.keywords.items()]
    return excerpt(f"{_name(value.func)}({', '.join(parts)})", 2 * _LONGEST)


def _name(value: object) -> str:
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str):
        return name.rpartition("<locals>.")[2]
    if isinstance(value, bool | int | float | str | None) or is_dataclass(value):
        text = repr(value)
        if len(text) <= _LONGEST:
            return text
    return type(value).__name__
