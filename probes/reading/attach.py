"""Attach probes to a model for the length of a `with` block.

Probes register torch hooks on the model's hook points instead of calling `HookPoint.add_hook`:
`model.reset_hooks()` and `model.hooks()` inside the block then do not remove them, and leaving the
block removes no others. Gradients are read with `Tensor.register_hook`: a module backward hook
would turn every activation into a view, which other hooks could no longer change in place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVarTuple, cast

import torch
from torch import Tensor, nn

from probes.reading.attention_check import FirstPassCheck
from probes.reading.errors import ProbeError
from probes.reading.hook_names import ATTENTION_MASK, TOKENS, hook_points, split_incoming
from probes.reading.hooking import Hooks, converted
from probes.reading.labelled import LabelledTensor

BackwardHook: TypeAlias = Callable[[Tensor], None]
"""Receives the detached gradient of the loss with respect to one activation; only reads it."""

ForwardHook: TypeAlias = Callable[[Tensor], BackwardHook | None]
"""Receives a detached activation; may return the hook for the gradient of that activation."""


class Probe(ABC):
    """An instrument: its hooks read activations, and `reading()` returns the result.

    A probe accumulates over every pass made while it is attached, in one `with` block or in
    several, until `reset()`. Hooks receive detached tensors that share memory with the model:
    they must not write to them.
    """

    _block: "_Block | None" = None

    @abstractmethod
    def hooks(self, model: nn.Module) -> Mapping[str, ForwardHook]:
        """The forward hooks by name of the hook point in `model`.

        Besides hook points, three names are allowed: under `hook_names.TOKENS` the hook receives
        the tokens, under `ATTENTION_MASK` the attention mask, before any attention is computed, and
        under `hook_names.incoming(name)` the activation before other hooks at `name` change it.

        Raises:
            ProbeError: the model lacks what this probe reads.
        """

    def begin_pass(self) -> None:  # noqa: B027
        """Called at the start of every pass through `model(...)`, before any hook of that pass."""

    @abstractmethod
    def reset(self) -> None:
        """Forget every pass seen so far."""

    @abstractmethod
    def reading(self) -> LabelledTensor:
        """The result over all passes since the last reset.

        Raises:
            ProbeError: there was no pass yet.
        """


Probes = TypeVarTuple("Probes")


def attach(model: nn.Module, *probes: *Probes) -> AbstractContextManager[tuple[*Probes]]:
    """Let probes read every forward and backward pass made inside the block.

    All probes share the passes that the caller makes. Leaving the block, also by an exception,
    removes exactly the hooks added here, and blocks may be nested. A gradient probe also works on a
    model whose parameters are frozen.

    `attach` checks the first pass of every model. If attention rows do not sum to 1, or a layer
    runs no pattern hook, or runs it after using the pattern, a one-line `ProbeWarning` at the end
    of the block says so (`check_attention` runs a fuller check).

    Args:
        model: a HookedTransformer or TransformerBridge.
        *probes: the probes to attach; they keep their readings after the block.

    Returns:
        A context manager that returns the probes on entering.

    Raises:
        ProbeError: on entering: the model lacks what a probe reads, or a probe is already attached.

    >>> import warnings
    >>> from mechcausal.models.adapter import HookedTransformer
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
    return cast(AbstractContextManager[tuple[*Probes]], _Attachment(model, probes))


@dataclass
class _Block:
    """The state of one `with` block.

    Attributes:
        is_open: a backward pass may run after the block and must not be read.
        forward_only: the hooks that ask for no gradient.
    """

    is_open: bool = True
    forward_only: set[int] = field(default_factory=set)


class _Attachment(Hooks):
    """The hooks of one `attach`.

    A class with `__exit__`, because Ctrl-C may hit a generator-based block outside its `finally`.
    """

    def __init__(self, model: nn.Module, probes: tuple[Any, ...]) -> None:
        super().__init__()
        self._model = model
        self._probes = probes
        self._block = _Block()
        self._check: FirstPassCheck | None = None

    def __enter__(self) -> tuple[Probe, ...]:
        try:
            self._attach()
        except BaseException:
            super().__exit__()
            raise
        return self._probes

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        # A user may turn warnings into errors: warn after the passes, and never replace an error.
        if self._check is not None and error[0] is None:
            self._check.conclude(stacklevel=2)

    def remove(self) -> None:
        """Remove the hooks; the probes may then be attached again."""
        self._block.is_open = False
        super().remove()

    def _attach(self) -> None:
        points = hook_points(self._model)
        self._check = FirstPassCheck(self._model, points, self)
        for probe in self._probes:
            if probe._block is not None and probe._block.is_open:
                raise ProbeError(
                    f"this {type(probe).__name__} is already attached: use a second one"
                )
            probe._block = self._block
            self.add_before(self._model, partial(_begin_pass, probe))
            for name, hook in probe.hooks(self._model).items():
                self._add_named(points, name, hook)

    def _add_named(self, points: Mapping[str, nn.Module], name: str, hook: ForwardHook) -> None:
        kind = type(self._model).__name__
        if name == TOKENS:
            embed = getattr(self._model, TOKENS, None)
            if not isinstance(embed, nn.Module):
                raise ProbeError(f"{kind} has no token embedding ({TOKENS!r})")
            self.add_before(embed, partial(_read_tokens, hook))
            return
        if name == ATTENTION_MASK:
            self.add_before(_module_with_mask(self._model), partial(_read_mask, hook))
            return
        point, before_hooks = split_incoming(name)
        if point not in points:
            raise ProbeError(f"{kind} has no hook point {point!r}")
        if before_hooks:
            self.add_before(points[point], partial(_read_incoming, hook, self._block))
        else:
            self.add(points[point], partial(_read_activation, hook, self._block))


def _module_with_mask(model: nn.Module) -> nn.Module:
    """The module that receives the attention mask: a bridge's wrapped model, or the first block."""
    original: Any = getattr(model, "original_model", None)
    if isinstance(original, nn.Module):
        return original
    blocks: Any = getattr(model, "blocks", None)
    if blocks is None or not len(blocks):
        raise ProbeError(f"{type(model).__name__} has no blocks that could take an attention mask")
    first: nn.Module = blocks[0]
    return first


def _begin_pass(probe: Probe, module: nn.Module, args: Any, kwargs: Any) -> None:
    probe.begin_pass()


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _read_tokens(hook: ForwardHook, module: nn.Module, args: Any, kwargs: Any) -> None:
    tokens = _first_tensor(args, kwargs)
    assert tokens is not None
    hook(tokens.detach())


def _read_mask(hook: ForwardHook, module: nn.Module, args: Any, kwargs: Any) -> None:
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        inputs = _first_tensor(args, kwargs)
        if inputs is None or inputs.ndim < 2:
            return
        mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    hook(mask.detach())


def _read_incoming(
    hook: ForwardHook, block: _Block, point: nn.Module, args: tuple[Tensor], kwargs: Any
) -> Any:
    replacement = _read_activation(hook, block, point, None, args[0])
    return None if replacement is None else ((replacement,), kwargs)


def _read_activation(
    hook: ForwardHook, block: _Block, point: nn.Module, inputs: Any, activation: Tensor
) -> Tensor | None:
    """Call the hook, and its backward hook once the gradient arrives.

    Returns:
        The tensor that replaces the activation in the pass; None to keep the activation.
    """
    if id(hook) in block.forward_only and _is_recomputed():
        return None
    with torch.no_grad():
        backward = hook(converted(point, activation.detach()))
    if backward is None:
        block.forward_only.add(id(hook))
    if backward is None or not torch.is_grad_enabled():
        return None

    def on_gradient(gradient: Tensor | None) -> None:
        # The gradient is None where compiled code computes with another copy of the activation.
        if block.is_open and gradient is not None:
            with torch.no_grad():
                backward(converted(point, gradient.detach()))

    if activation.requires_grad:
        activation.register_hook(on_gradient)
        return None
    # No earlier parameter is trainable, so no gradient would come: start the graph here.
    leaf = activation.detach().requires_grad_()
    leaf.register_hook(on_gradient)
    return leaf.clone()  # torch forbids in-place changes of a leaf, and other hooks may make some


def _is_recomputed() -> bool:
    """Whether this forward pass runs inside a backward pass, as activation checkpointing does."""
    return bool(torch._C._current_graph_task_id() != -1)  # as torch.utils.checkpoint asks
