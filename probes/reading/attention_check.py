"""Check whether a model's attention patterns can be read, edited and differentiated.

This depends on the model: rows may not sum to 1, and a bridge may run its pattern hook only after
using the pattern. `attach` checks the first pass of every model, which costs one sum over its
patterns; `check_attention` runs passes of its own and checks more.
"""

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from probes.reading.errors import ProbeError, ProbeWarning
from probes.reading.hook_names import (
    EMBEDDED,
    Layers,
    config_of,
    hook_name,
    hook_points,
    layers_with,
)
from probes.reading.hooking import Hooks
from probes.reading.passes import checked_tokens, undisturbed


@dataclass(frozen=True)
class AttentionCheck:
    """The result of checking one model.

    Attributes:
        row_sums: smallest and largest sum of a pattern's row, without rows of zeros (padding).
        sink: whether part of the attention goes to no token: rows sum to less than 1.
        excess: whether rows sum to more than 1, as under attention dropout.
        hidden: layers that computed z without running a pattern hook.
        late: layers that run the pattern hook after use, so that editing it changes nothing.
        unread: layers whose pattern no gradient reaches; None if gradients were not checked.
    """

    row_sums: tuple[float, float]
    sink: bool
    excess: bool
    hidden: tuple[int, ...]
    late: tuple[int, ...]
    unread: tuple[int, ...] | None

    def problems(self) -> tuple[str, ...]:
        """One phrase for every failed check; empty if the model passes all.

        >>> AttentionCheck((1.0, 1.0), False, False, (), (0, 1), ()).problems()
        ('editing a pattern changes nothing in layers 0, 1, which run hook_pattern after use',)
        """
        low, high = self.row_sums
        lines = []
        if self.hidden:
            lines.append(f"layers {_listed(self.hidden)} show no attention pattern")
        if self.sink:
            lines.append(
                f"attention has a sink: rows sum to {low:.2f} to {high:.2f}, the rest goes to no "
                "token"
            )
        if self.excess:
            lines.append(
                f"attention rows sum to {low:.2f} to {high:.2f}, not to 1: attention dropout is on "
                "(model.eval() turns it off)"
            )
        if self.late:
            lines.append(
                f"editing a pattern changes nothing in layers {_listed(self.late)}, which run "
                "hook_pattern after use"
            )
        if self.unread:
            lines.append(f"no gradient reaches the patterns of layers {_listed(self.unread)}")
        return tuple(lines)


class PassCheck:
    """Checks the attention of one forward pass without changing it."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self._layers = layers
        self._sums: dict[int, tuple[Tensor, Tensor, float]] = {}
        self._z_came_first: dict[int, bool] = {}

    def watch(self, points: Mapping[str, nn.Module], hooks: Hooks) -> None:
        """Add the checking hooks to a block of hooks."""
        for layer in self._layers:
            hooks.add_before(points[hook_name("pattern", layer)], partial(self._at_pattern, layer))
            if (z_point := points.get(hook_name("z", layer))) is not None:
                hooks.add(z_point, partial(self._at_z, layer))

    def _at_pattern(self, layer: int, point: nn.Module, args: Any, kwargs: Any) -> None:
        if layer not in self._sums:
            with torch.no_grad():
                self._sums[layer] = (*row_sums(args[0]), row_sum_tolerance(args[0]))

    def _at_z(self, layer: int, point: nn.Module, inputs: Any, z: Tensor) -> None:
        self._z_came_first.setdefault(layer, layer not in self._sums)

    def result(self, unread: tuple[int, ...] | None = None) -> AttentionCheck | None:
        """The result for the pass; None if no attention hook ran in it."""
        if not self._sums and not self._z_came_first:
            return None
        sums = [(low.item(), high.item(), rounding) for low, high, rounding in self._sums.values()]
        late = [layer for layer, z_first in self._z_came_first.items() if z_first]
        lowest = min((low for low, _, _ in sums), default=1.0)
        highest = max((high for _, high, _ in sums), default=1.0)
        return AttentionCheck(
            row_sums=(lowest, highest),
            sink=any(low < 1 - rounding and high <= 1 + rounding for low, high, rounding in sums),
            excess=any(high > 1 + rounding for _, high, rounding in sums),
            hidden=tuple(layer for layer in late if layer not in self._sums),
            late=tuple(layer for layer in late if layer in self._sums),
            unread=unread,
        )


# Weak references, so that the set does not keep a model alive.
_CHECKED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class FirstPassCheck:
    """Checks the first pass that any block makes with a model, and warns of the problems."""

    def __init__(self, model: nn.Module, points: Mapping[str, nn.Module], hooks: Hooks) -> None:
        # Count layers by hook point: a model without attention may have no configuration.
        candidates = range(0 if model in _CHECKED else len(points))
        layers = tuple(i for i in candidates if hook_name("pattern", i) in points)
        self._model = model
        self._pass = PassCheck(layers)
        self._pass.watch(points, hooks)

    def conclude(self, stacklevel: int) -> None:
        """Warn of the problems in one line, if there was a pass; only once per model."""
        check = self._pass.result()
        if check is None or self._model in _CHECKED:
            return
        _CHECKED.add(self._model)
        if problems := check.problems():
            kind = type(self._model).__name__
            model_name = getattr(getattr(self._model, "cfg", None), "model_name", None)
            name = f"{kind} {model_name!r}" if model_name else kind
            warnings.warn(f"{name}: {'; '.join(problems)}", ProbeWarning, stacklevel + 1)


def check_attention(
    model: nn.Module, tokens: Int[Tensor, "batch pos"] | None = None, layers: Layers = None
) -> AttentionCheck:
    """Check whether a model's attention patterns can be read, edited and differentiated.

    One pass sums the rows; one pass per layer halves the layer's pattern, which must change the
    output; and one backward pass must reach every pattern.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was, gradients too.
        tokens: the input of the passes; None for two sequences of at most eight random tokens.
        layers: one layer, several, or None for every layer that has attention.

    Returns:
        The result; its `problems()` lists the failed checks. Cost: one pass per layer and three
        more.

    Raises:
        ProbeError: probes cannot read the model, or the tokens do not fit it.

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> check_attention(model).problems()
    ()
    """
    points, chosen = hook_points(model), layers_with(model, "pattern", layers)
    config = config_of(model)
    if tokens is None:
        source = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.d_vocab, (2, min(8, config.n_ctx)), generator=source)
    tokens = checked_tokens(model, tokens)
    pass_check = PassCheck(chosen)
    with undisturbed(model):
        with Hooks() as hooks:
            pass_check.watch(points, hooks)
            output = model(tokens, return_type="logits")
        unused = []
        for layer in chosen:
            with Hooks() as hooks:
                hooks.edit(points[hook_name("pattern", layer)], lambda weights: weights / 2)
                if torch.equal(model(tokens, return_type="logits"), output):
                    unused.append(layer)
        unread = _unread(model, points, chosen, tokens) if EMBEDDED in points else None
    check = pass_check.result(unread)
    if check is None:
        raise ProbeError(f"a forward pass of {type(model).__name__} ran no attention hook")
    return replace(check, late=tuple(layer for layer in unused if layer not in check.hidden))


def row_sums(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest sum of a pattern's row; rows of zeros (padding) count as 1."""
    wide = torch.promote_types(weights.dtype, torch.float32)
    sums = weights.sum(-1, dtype=wide)
    sums = sums.masked_fill(sums == 0, 1.0)
    return sums.min(), sums.max()


def row_sum_tolerance(weights: Tensor) -> float:
    """How far rounding alone may move the sum of a row from 1."""
    return max(1e-3, 4 * torch.finfo(weights.dtype).eps)


def _unread(
    model: nn.Module, points: Mapping[str, nn.Module], layers: tuple[int, ...], tokens: Tensor
) -> tuple[int, ...]:
    """The layers whose pattern gets no gradient in a backward pass to the embeddings."""
    reached: set[int] = set()
    starts: list[Tensor] = []

    def start(embedded: Tensor) -> Tensor:
        starts.append(embedded.detach().requires_grad_())
        return starts[-1]

    def at_pattern(layer: int, point: nn.Module, inputs: Any, weights: Tensor) -> None:
        if weights.requires_grad:
            weights.register_hook(lambda gradient: reached.add(layer))

    with torch.enable_grad(), Hooks() as hooks:
        hooks.edit(points[EMBEDDED], start)
        for layer in layers:
            hooks.add(points[hook_name("pattern", layer)], partial(at_pattern, layer))
        output = model(tokens, return_type="logits")
        # Differentiate with respect to the embeddings only: every parameter keeps its .grad.
        torch.autograd.grad(output.float().square().sum(), starts, allow_unused=True)
    return tuple(layer for layer in layers if layer not in reached)


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
