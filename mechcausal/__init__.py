"""Watch a transformer learn causal structure: train, probe, and compare with information theory.

>>> import mechcausal
>>> recipe = mechcausal.load_recipe("markov_chain")
>>> recipe.graph.preset
'chain'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechcausal.pictures import interactive as plot  # noqa: F401

_HOMES = {
    "Batch": "tasks",
    "CausalGraph": "graphs",
    "CausalGraphExperiment": "training.experiments.causal_graph",
    "DirichletPrior": "tasks.priors",
    "Experiment": "training.experiments",
    "FixedTransition": "tasks.priors",
    "Observation": "measures.observation",
    "Recipe": "recipes",
    "RunResult": "training.run",
    "SimplifiedTransformer": "models.simplified",
    "SingleParentTask": "tasks",
    "Stage": "recipes.stages",
    "StageSection": "recipes",
    "StandardTransformer": "models.standard",
    "Task": "tasks",
    "TaskExperiment": "training.experiments.any_task",
    "fit": "training.fit",
    "load_model": "models.adapter",
    "load_recipe": "recipes",
    "observe": "measures.look",
    "pairwise_theory": "theory",
    "resume": "training.resuming",
    "save_model": "models.adapter",
    "stages": "recipes.stages",
    "train": "training.run",
}

__all__ = sorted([*_HOMES, "plot"])
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Names load on first use: `mechcausal --help` must not wait for torch.
    if name == "plot":
        return import_module("mechcausal.pictures.interactive")
    if name in _HOMES:
        return getattr(import_module(f"mechcausal.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mechcausal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
