"""Passes that start at the residual stream before a layer, where nothing earlier has changed."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.reading.hook_names import config_of
from probes.reading.passes import checked_logits, undisturbed


def starts_at_layers(model: nn.Module) -> bool:
    """Whether the model computes a pass from the residual stream before any layer on.

    A bridge always runs all layers, and shortformer's keys need positions in every layer.
    """
    positions = getattr(config_of(model), "positional_embedding_type", None)
    return not hasattr(model, "original_model") and positions != "shortformer"


def stream_before(
    model: nn.Module, layer: int, tokens: Int[Tensor, "batch pos"], rows: int
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream before a layer of a model that `starts_at_layers`.

    Args:
        model: left as it was.
        layer: counted from 0; no layer from it on is run.
        tokens: the sequences, as `checked_tokens` gives them.
        rows: sequences in one pass.
    """
    any_model: Any = model
    with undisturbed(model):
        return torch.cat([any_model(part, stop_at_layer=layer) for part in tokens.split(rows)])


def logits_from(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    stream: Float[Tensor, "batch pos d_model"] | None,
    layer: int,
    purpose: str,
) -> Float[Tensor, "batch pos vocab"]:
    """The logits of a pass from the stream before a layer on, or from the tokens without one.

    Raises:
        ProbeError: as `checked_logits`.
    """
    if stream is None:
        return checked_logits(model, tokens, None, purpose)
    any_model: Any = model
    logits: Tensor = any_model(stream, return_type="logits", start_at_layer=layer)
    return logits
