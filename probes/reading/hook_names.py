"""Names of TransformerLens hook points, and checks that a model has what a probe asks for.

No other module spells these names out. HookedTransformer and TransformerBridge share them (a bridge
by alias).
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from probes.reading.errors import ProbeError

Head: TypeAlias = tuple[int, int]
"""A head as (layer, head)."""

Layers: TypeAlias = int | Sequence[int] | None
"""One layer, several, or None for every layer that has the hook point."""

TOKENS = "embed"
"""The embedding module. Its input is always the token batch, even if the user passed text."""

EMBEDDED = "hook_embed"
"""Name of the token embeddings, the first hook point of a forward pass."""

ATTENTION_MASK = "attention_mask"
"""Stands for the attention mask `[batch pos]` that the layers get; all 1 if they get none."""

_INCOMING = ".incoming"

_STREAM = ("batch", "pos", "d_model")
_BY_HEAD = ("batch", "pos", "head", "d_head")
_WEIGHTS = ("batch", "head", "query", "key")
_NEURONS = ("batch", "pos", "d_mlp")

LAYER_HOOKS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "resid_pre": ("hook_resid_pre", _STREAM),
    "resid_mid": ("hook_resid_mid", _STREAM),
    "resid_post": ("hook_resid_post", _STREAM),
    "attn_out": ("hook_attn_out", _STREAM),
    "mlp_out": ("hook_mlp_out", _STREAM),
    "q": ("attn.hook_q", _BY_HEAD),
    "k": ("attn.hook_k", _BY_HEAD),
    "v": ("attn.hook_v", _BY_HEAD),
    "z": ("attn.hook_z", _BY_HEAD),
    "attn_scores": ("attn.hook_attn_scores", _WEIGHTS),
    "pattern": ("attn.hook_pattern", _WEIGHTS),
    "pre": ("mlp.hook_pre", _NEURONS),
    "post": ("mlp.hook_post", _NEURONS),
}
"""The hook points of a layer: TransformerLens's short name, the name in the block, and the axes.

`attn_scores` and `pattern` are attention before and after the softmax; `z` holds each head's mixed
values, before W_O.
"""


def hook_name(hook: str, layer: int) -> str:
    """The full name of one of the `LAYER_HOOKS`.

    >>> hook_name("pattern", 3)
    'blocks.3.attn.hook_pattern'
    """
    return f"blocks.{layer}.{LAYER_HOOKS[hook][0]}"


def incoming(name: str) -> str:
    """Name of the activation that enters a hook point, before hooks there can change it.

    >>> incoming(hook_name("pattern", 3))
    'blocks.3.attn.hook_pattern.incoming'
    """
    return f"{name}{_INCOMING}"


def split_incoming(name: str) -> tuple[str, bool]:
    """The hook point of a name, and whether `incoming` made the name.

    >>> split_incoming(incoming("blocks.3.attn.hook_pattern"))
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
    # `torch.compile(module)` wraps a module; `module.compile()` changes how it is called.
    if any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None
        for module in modules_of(model)
    ):
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


def layers_with(model: nn.Module, hook: str, layers: Layers = None) -> tuple[int, ...]:
    """The layers to read, each checked to exist and to have a hook point.

    Args:
        model: a HookedTransformer or TransformerBridge.
        hook: one of the `LAYER_HOOKS`; "pattern" for the layers that have attention.
        layers: one layer, several, or None for every layer that has the hook point.

    Returns:
        The layer numbers in the given order, without repeats.

    Raises:
        ProbeError: a layer does not exist or lacks the hook point, or every layer lacks it.
    """
    points = hook_points(model)
    n_layers: int = config_of(model).n_layers
    having = [layer for layer in range(n_layers) if hook_name(hook, layer) in points]
    missing = "attention" if hook == "pattern" else f"hook point {hook!r}"
    if not having:
        raise ProbeError(
            f"{type(model).__name__} has no {missing} ({hook_name(hook, 0)} not found)"
        )
    if layers is None:
        return tuple(having)
    wanted = tuple(dict.fromkeys([layers] if isinstance(layers, int) else layers))
    if not wanted:
        raise ProbeError("layers is empty: pass layer numbers, or None for all")
    for layer in wanted:
        if not 0 <= layer < n_layers:
            raise ProbeError(
                f"layer {layer} does not exist: the model has {n_layers} layers, "
                f"0 to {n_layers - 1}"
            )
        if layer not in having:
            raise ProbeError(f"layer {layer} has no {missing}; layers that have: {having}")
    return wanted


def check_head(model: nn.Module, head: Head) -> None:
    """Check that a head exists.

    Raises:
        ProbeError: it does not.
    """
    layer, index = head
    layers_with(model, "pattern", layer)
    n_heads = config_of(model).n_heads
    if not 0 <= index < n_heads:
        raise ProbeError(
            f"head {index} does not exist: layer {layer} has {n_heads} heads, 0 to {n_heads - 1}"
        )
