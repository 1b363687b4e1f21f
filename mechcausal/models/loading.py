"""Load a saved model of any kind."""

from pathlib import Path

from mechcausal.models.adapter import ModelFileError, build_from_files
from mechcausal.models.base import GraphModel
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.models.standard import StandardTransformer
from mechcausal.support.messages import excerpt

KINDS: tuple[type[SimplifiedTransformer | DisentangledTransformer | StandardTransformer], ...] = (
    SimplifiedTransformer,
    DisentangledTransformer,
    StandardTransformer,
)


def load_graph_model(folder: str | Path, *, device: str = "cpu") -> GraphModel:
    """Load a model that a run saved, as the class of its kind.

    Raises:
        ModelFileError: not a readable model of one of `KINDS`.
    """
    _, extra = build_from_files(folder, device=device)
    for kind in KINDS:
        if kind.kind == extra.get("kind"):
            return kind.load(folder, device=device)
    allowed = ", ".join(kind.kind for kind in KINDS)
    saved_kind = excerpt(repr(extra.get("kind")))
    raise ModelFileError(f"{folder}: kind {saved_kind} is none of {allowed}")
