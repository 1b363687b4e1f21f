"""Watch a transformer learn causal structure: train, probe, and compare with information theory.

>>> import mechcausal
>>> recipe = mechcausal.load_recipe("markov_chain")
>>> recipe.graph.preset
'chain'
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "CausalGraph": "graphs",
    "DirichletPrior": "priors",
    "FixedTransition": "priors",
    "Recipe": "recipes",
    "RunResult": "training",
    "SimplifiedTransformer": "models.simplified",
    "SingleParentTask": "tasks",
    "load_model": "models.adapter",
    "load_recipe": "recipes",
    "pairwise_theory": "theory",
    "resume": "resuming",
    "save_model": "models.adapter",
    "train": "training",
}

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Names load on first use: `mechcausal --help` must not wait for torch.
    if name in _HOMES:
        return getattr(import_module(f"mechcausal.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mechcausal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
