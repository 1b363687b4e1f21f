"""Load a saved model as the class of its kind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechcausal.models.adapter import ModelFileError, load_with_extra
from mechcausal.models.base import GraphModel
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.in_context_graphs import InContextGraphTransformer
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.models.standard import StandardTransformer
from mechcausal.support.messages import excerpt

KINDS: tuple[type[GraphModel], ...] = (
    SimplifiedTransformer,
    DisentangledTransformer,
    StandardTransformer,
    InContextGraphTransformer,
)


def load_graph_model(folder: str | Path, *, device: str = "cpu") -> GraphModel:
    """Load a model that a run saved, as the class of its kind.

    Raises:
        ModelFileError: not a readable model of one of `KINDS`.
    """
    hooked, saved = load_with_extra(folder, device=device)
    kind = kind_of(saved)
    if kind is None:
        allowed = ", ".join(kind.kind for kind in KINDS)
        saved_kind = excerpt(repr(saved.get("kind")))
        raise ModelFileError(f"{folder}: kind {saved_kind} is none of {allowed}")
    return kind.from_saved(folder, hooked, saved)


def kind_of(saved: Mapping[str, Any]) -> type[GraphModel] | None:
    """The class of a saved model, by the values saved with it; None if it is none of `KINDS`."""
    return next((kind for kind in KINDS if kind.kind == saved.get("kind")), None)
