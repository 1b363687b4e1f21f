"""Names of the places in a TransformerLens model: the only module that spells them.

HookedTransformer and TransformerBridge share these names (a bridge by alias).
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from probes.reading.errors import ProbeError

TOKENS = "embed"
"""The embedding module; its input is the token batch, whatever the user passed to the model."""

EMBEDDED = "hook_embed"
"""The token embeddings: where a forward pass begins."""

ATTENTION_MASK = "attention_mask"
"""The attention mask `[batch pos]` of the pass, as it reaches the layers: 1 where none came."""

_INCOMING = ".incoming"

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


def incoming(name: str) -> str:
    """Names what arrives at a hook point, before any hook there can change it.

    >>> incoming(pattern(3))
    'blocks.3.attn.hook_pattern.incoming'
    """
    return f"{name}{_INCOMING}"


def split_incoming(name: str) -> tuple[str, bool]:
    """The hook point of a name, and whether the name is one of `incoming`.

    >>> split_incoming(incoming(pattern(3)))
    ('blocks.3.attn.hook_pattern', True)
    """
    return name.removesuffix(_INCOMING), name.endswith(_INCOMING)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module that runs; a bridge keeps the model it wraps outside its own tree."""
    original = getattr(model, "original_model", None)
    return [*model.modules(), *(original.modules() if isinstance(original, nn.Module) else ())]


def hook_points(model: nn.Module) -> Mapping[str, nn.Module]:
    """Every hook point of the model by name.

    Raises:
        ProbeError: the model is not a TransformerLens model, is wrapped, or is compiled.
    """
    points: Any = getattr(model, "hook_dict", None)
    kind = type(model).__name__
    if not isinstance(points, Mapping):
        wrapped = getattr(model, "module", None)
        if isinstance(getattr(wrapped, "hook_dict", None), Mapping):
            raise ProbeError(
                f"{kind} wraps a {type(wrapped).__name__}: attach to its .module; "
                "passes through the wrapper are then seen, those of this process alone"
            )
        raise ProbeError(
            f"{kind} has no hook points: probes need a HookedTransformer or a TransformerBridge"
        )
    if any(_is_compiled(module) for module in modules_of(model)):
        raise ProbeError(
            f"this {kind} was compiled with torch.compile, and compiled code may pass over hooks "
            "that are added later: attach to the model as it was before, and run that"
        )
    return points


def config_of(model: nn.Module) -> Any:
    """A model's configuration.

    Raises:
        ProbeError: it has none: the model is not a TransformerLens model, or is wrapped.
    """
    config = getattr(model, "cfg", None)
    if config is None:
        hook_points(model)
        raise ProbeError(f"{type(model).__name__} has no configuration (.cfg)")
    return config


def _is_compiled(module: nn.Module) -> bool:
    """By `torch.compile(module)`, which wraps it, or by `module.compile()`."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


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
    config = config_of(model)
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
