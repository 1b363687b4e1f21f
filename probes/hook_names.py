"""Names of the places in a TransformerLens model: the only module that spells them.

HookedTransformer and TransformerBridge share these names (a bridge by alias).
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from probes.errors import ProbeError

TOKENS = "embed"
"""The embedding module; its input is the token batch, whatever the user passed to the model."""

ATTENTION_MASK = "attention_mask"
"""The attention mask `[batch pos]` of the pass, as it reaches the layers: 1 where none came."""

Layers: TypeAlias = int | Sequence[int] | None
"""One layer, several, or None for every layer that has attention."""


def attn_scores(layer: int) -> str:
    """Name of the masked scores before the softmax, `[batch head query key]`.

    >>> attn_scores(0)
    'blocks.0.attn.hook_attn_scores'
    """
    return f"blocks.{layer}.attn.hook_attn_scores"


def pattern(layer: int) -> str:
    """Name of the attention pattern after the softmax, `[batch head query key]`.

    >>> pattern(3)
    'blocks.3.attn.hook_pattern'
    """
    return f"blocks.{layer}.attn.hook_pattern"


def z(layer: int) -> str:
    """Name of each head's mixed values before W_O, `[batch pos head d_head]`.

    >>> z(1)
    'blocks.1.attn.hook_z'
    """
    return f"blocks.{layer}.attn.hook_z"


def hook_points(model: nn.Module) -> Mapping[str, nn.Module]:
    """Every hook point of the model by name.

    Raises:
        ProbeError: the model is not a TransformerLens model.
    """
    points: Any = getattr(model, "hook_dict", None)
    if not isinstance(points, Mapping):
        raise ProbeError(
            f"{type(model).__name__} has no hook points: "
            "probes need a HookedTransformer or a TransformerBridge"
        )
    return points


def attention_layers(model: nn.Module, layers: Layers = None) -> tuple[int, ...]:
    """The layers to read, each checked to exist and to have attention.

    Args:
        model: a HookedTransformer or TransformerBridge.
        layers: one layer, several, or None for every layer that has attention.

    Returns:
        The layer numbers, in the order asked for, without repeats.

    Raises:
        ProbeError: a layer does not exist, has no attention, or no layer has.
    """
    points = hook_points(model)
    config: Any = model.cfg
    n_layers: int = config.n_layers
    with_attention = [layer for layer in range(n_layers) if pattern(layer) in points]
    if not with_attention:
        raise ProbeError(f"{type(model).__name__} has no attention layer ({pattern(0)} not found)")
    if layers is None:
        return tuple(with_attention)
    wanted = tuple(dict.fromkeys([layers] if isinstance(layers, int) else layers))
    if not wanted:
        raise ProbeError("no layer was asked for: pass layer numbers, or None for all")
    for layer in wanted:
        if not 0 <= layer < n_layers:
            raise ProbeError(
                f"layer {layer} does not exist: the model has {n_layers} layers, "
                f"0 to {n_layers - 1}"
            )
        if layer not in with_attention:
            raise ProbeError(f"layer {layer} has no attention; layers that have: {with_attention}")
    return wanted
