"""Attach probes to a model for the length of a `with` block.

Hooks are registered with torch itself on the model's hook points, not through
`HookPoint.add_hook`: `model.reset_hooks()` and `model.hooks()` inside the block then cannot
remove ours, and leaving the block removes ours alone. The backward side is a hook on the
activation's own gradient rather than a module backward hook, which would make every activation
a view that other people's hooks may no longer change in place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeAlias, TypeVarTuple, cast

import torch
from torch import Tensor, nn

from probes.reading.attention_check import FirstPassCheck
from probes.reading.errors import ProbeError
from probes.reading.hook_names import ATTENTION_MASK, TOKENS, hook_points, split_incoming
from probes.reading.hooking import Hooks
from probes.reading.labelled import LabelledTensor

BackwardHook: TypeAlias = Callable[[Tensor], None]
"""Receives the detached gradient of the loss with respect to one activation; must not change it."""

ForwardHook: TypeAlias = Callable[[Tensor], BackwardHook | None]
"""Receives a detached activation; may return what to call with that same activation's gradient."""


class Probe(ABC):
    """An instrument: hooks that read, and a reading of what they saw.

    A probe accumulates over every pass made while it is attached, in one `with` block or in
    several, until `reset()`. Hooks get detached tensors which share memory with the model:
    they read them and never write.
    """

    _session: "_Session | None" = None

    @abstractmethod
    def hooks(self, model: nn.Module) -> Mapping[str, ForwardHook]:
        """What to call at which hook point of `model`.

        `hook_names.TOKENS` is called with the tokens, `hook_names.incoming(name)` with what
        arrives at a hook point, before any hook there can change it, and `ATTENTION_MASK` with the
        mask that came with the tokens, before any attention.

        Raises:
            ProbeError: the model lacks what this probe reads.
        """

    def begin_pass(self) -> None:  # noqa: B027
        """Called when the model is called, before anything else of that pass."""

    @abstractmethod
    def reset(self) -> None:
        """Forget every pass seen so far."""

    @abstractmethod
    def reading(self) -> LabelledTensor:
        """What was seen since the last reset.

        Raises:
            ProbeError: nothing was seen yet.
        """


Probes = TypeVarTuple("Probes")


def attach(model: nn.Module, *probes: *Probes) -> AbstractContextManager[tuple[*Probes]]:
    """Let probes read every forward and backward pass made inside the block.

    All of them share the passes that the caller makes. On leaving the block, by whatever
    exception too, exactly the hooks added here are gone; hooks of others are not touched, and
    blocks may be nested. A gradient probe also works on a model whose parameters are frozen.

    The first pass of every model is checked: where attention rows do not sum to 1, patterns are
    hidden, or are shown after use, a `ProbeWarning` at the end of the block says so in one line
    (`check_attention` tries a model out).

    Args:
        model: a HookedTransformer or TransformerBridge.
        *probes: the probes to attach; they keep what they saw after the block.

    Returns:
        A context manager that gives the probes.

    Raises:
        ProbeError: on entering: the model lacks what a probe reads, or a probe is already attached.

    >>> import warnings
    >>> from transformer_lens import HookedTransformer
    >>> from probes import AttentionGradient, AttentionPattern
    >>> sizes = {"n_layers": 2, "n_heads": 1, "d_model": 4, "d_head": 4, "n_ctx": 5, "d_vocab": 3}
    >>> with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    ...     model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> tokens = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 1, 0, 0]])
    >>> with attach(model, AttentionPattern(), AttentionGradient()) as (pattern, gradient):
    ...     model(tokens, return_type="loss").backward()
    >>> pattern.reading()
    LabelledTensor(attention_pattern: layer=2 (0, 1), batch=2, head=1, query=5, key=5; float32)
    >>> gradient.reading().sel(layer=0, head=0, query=0).values.tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0]
    """
    return _Attachment(model, cast(tuple[Probe, ...], probes))  # type: ignore[return-value]


class _Attachment(AbstractContextManager[tuple[Probe, ...]]):
    """The block: a class, since a generator could be interrupted outside of its own code."""

    def __init__(self, model: nn.Module, probes: tuple[Probe, ...]) -> None:
        self._model = model
        self._probes = probes
        self._hooks = Hooks()
        self._check: FirstPassCheck | None = None

    def __enter__(self) -> tuple[Probe, ...]:
        try:
            self._attach()
        except BaseException:
            self._hooks.__exit__(None, None, None)
            raise
        return self._probes

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(None, None, None)
        # A warning that is an error must break neither a pass nor hide the block's own error.
        if self._check is not None and error[0] is None:
            self._check.conclude(stacklevel=2)

    def _attach(self) -> None:
        session = _Session()
        self._hooks.finally_call(session.end)
        points = hook_points(self._model)
        self._check = FirstPassCheck(self._model, points, self._hooks)
        for probe in self._probes:
            if probe._session is not None:
                raise ProbeError(
                    f"this {type(probe).__name__} is already attached: use a second one"
                )
            self._hooks.finally_call(partial(_release, probe, session))
            probe._session = session
            self._hooks.add_before(self._model, _begins(probe))
            for name, hook in probe.hooks(self._model).items():
                self._add(points, name, hook, session)

    def _add(
        self, points: Mapping[str, nn.Module], name: str, hook: ForwardHook, session: "_Session"
    ) -> None:
        kind = type(self._model).__name__
        if name == TOKENS:
            embed = getattr(self._model, TOKENS, None)
            if not isinstance(embed, nn.Module):
                raise ProbeError(f"{kind} has no token embedding ({TOKENS!r})")
            self._hooks.add_before(embed, _reads_tokens(hook))
            return
        if name == ATTENTION_MASK:
            self._hooks.add_before(_takes_mask(self._model), _reads_mask(hook))
            return
        point, before_hooks = split_incoming(name)
        if point not in points:
            raise ProbeError(f"{kind} has no hook point {point!r}")
        if before_hooks:
            self._hooks.add_before(points[point], _reads_incoming(hook, session))
        else:
            self._hooks.add(points[point], _reads_activation(hook, session))


class _Session:
    """Whether the block is still open: a graph made inside it may be used after it."""

    def __init__(self) -> None:
        self.open = True

    def end(self) -> None:
        self.open = False


def _release(probe: Probe, session: _Session) -> None:
    if probe._session is session:
        probe._session = None


def _reads_tokens(hook: ForwardHook) -> Callable[..., None]:
    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        hook(tokens.detach())

    return read


def _begins(probe: Probe) -> Callable[..., None]:
    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        probe.begin_pass()

    return begin


def _takes_mask(model: nn.Module) -> nn.Module:
    """What gets the attention mask in every pass: a bridge's wrapped model, or the first block."""
    original: Any = getattr(model, "original_model", None)
    if isinstance(original, nn.Module):
        return original
    blocks: Any = getattr(model, "blocks", None)
    if blocks is None or not len(blocks):
        raise ProbeError(f"{type(model).__name__} has no blocks that could take an attention mask")
    first: nn.Module = blocks[0]
    return first


def _reads_mask(hook: ForwardHook) -> Callable[..., None]:
    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if given is None or given.ndim < 2:
                return
            mask = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
        hook(mask.detach())

    return read


def _reads_activation(hook: ForwardHook, session: _Session) -> Callable[..., Tensor | None]:
    def read(point: nn.Module, inputs: tuple[Any, ...], activation: Tensor) -> Tensor | None:
        return _observed(point, activation, hook, session)

    return read


def _reads_incoming(hook: ForwardHook, session: _Session) -> Callable[..., Any]:
    def read(point: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (activation,) = args  # a hook point takes one tensor
        leaf = _observed(point, activation, hook, session)
        return None if leaf is None else ((leaf,), kwargs)

    return read


def _observed(
    point: nn.Module, activation: Tensor, hook: ForwardHook, session: _Session
) -> Tensor | None:
    """Have the hook called, now and with the gradient; what takes the activation's place."""
    with torch.no_grad():
        backward = hook(_converted(point, activation.detach()))
    if backward is None or not torch.is_grad_enabled():
        return None

    def on_gradient(gradient: Tensor | None) -> None:
        # None: compiled code computes with another copy of this activation.
        if session.open and gradient is not None:
            with torch.no_grad():
                backward(_converted(point, gradient.detach()))

    if activation.requires_grad:
        activation.register_hook(on_gradient)
        return None
    # Nothing before this point is trainable: the same numbers as a new leaf of the graph.
    leaf = activation.detach().requires_grad_()
    leaf.register_hook(on_gradient)
    return leaf.clone()  # a leaf itself may not be changed in place


def _converted(point: nn.Module, values: Tensor) -> Tensor:
    """Bridges may keep an activation in another layout than the one TransformerLens names."""
    conversion: Any = getattr(point, "hook_conversion", None)
    if conversion is None:
        return values
    converted: Tensor = conversion.convert(values)
    return converted
