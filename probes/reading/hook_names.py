"""Names of TransformerLens hook points, which no other module spells out.

HookedTransformer and TransformerBridge share these names (a bridge by alias).
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from probes.reading.errors import ProbeError

TOKENS = "embed"
"""The embedding module. Its input is always the token batch, even if the user passed text."""

EMBEDDED = "hook_embed"
"""Name of the token embeddings, the first hook point of a forward pass."""

ATTENTION_MASK = "attention_mask"
"""Stands for the attention mask `[batch pos]` that the layers get; all 1 if they get none."""

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
    """Name of the activation that enters a hook point, before hooks there can change it.

    >>> incoming(pattern(3))
    'blocks.3.attn.hook_pattern.incoming'
    """
    return f"{name}{_INCOMING}"


def split_incoming(name: str) -> tuple[str, bool]:
    """The hook point of a name, and whether `incoming` made the name.

    >>> split_incoming(incoming(pattern(3)))
    ('blocks.3.attn.hook_pattern', True)
    """
    return name.removesuffix(_INCOMING), name.endswith(_INCOMING)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module of a model, with those of the wrapped model that a bridge does not list."""
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
                f"{kind} wraps a {type(wrapped).__name__}: attach to its .module, which reads "
                "passes through the wrapper too, but only those of this process"
            )
        raise ProbeError(
            f"{kind} has no hook points: probes need a HookedTransformer or a TransformerBridge"
        )
    if any(_is_compiled(module) for module in modules_of(model)):
        raise ProbeError(
            f"this {kind} was compiled with torch.compile, and compiled code may skip hooks that "
            "are added later: attach to the uncompiled model and run that"
        )
    return points


def config_of(model: nn.Module) -> Any:
    """A model's configuration.

    Raises:
        ProbeError: the model has none, as it is not a TransformerLens model, or is wrapped.
    """
    config = getattr(model, "cfg", None)
    if config is None:
        hook_points(model)
        raise ProbeError(f"{type(model).__name__} has no configuration (.cfg)")
    return config


def _is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile(module)`, which wraps it, or `module.compile()` compiled a module."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def attention_layers(model: nn.Module, layers: Layers = None) -> tuple[int, ...]:
    """The layers to read, each checked to exist and to have attention.

    Args:
        model: a HookedTransformer or TransformerBridge.
        layers: one layer, several, or None for every layer that has attention.

    Returns:
        The layer numbers in the given order, without repeats.

    Raises:
        ProbeError: a layer does not exist or has no attention, or no layer of the model has.
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
        raise ProbeError("layers is empty: pass layer numbers, or None for all")
    for layer in wanted:
        if not 0 <= layer < n_layers:
            raise ProbeError(
                f"layer {layer} does not exist: the model has {n_layers} layers, "
                f"0 to {n_layers - 1}"
            )
        if layer not in with_attention:
            raise ProbeError(f"layer {layer} has no attention; layers that have: {with_attention}")
    return wanted
