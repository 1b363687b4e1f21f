"""What holds of the attention patterns that a model shows, and what does not.

Probes read patterns, edits change them, gradients flow back through them. Whether all that means
anything depends on the model: rows may not sum to 1, and a bridge may show a pattern after use.
`attach` checks the first pass of every model, which costs a sum over its patterns;
`check_attention` makes passes of its own and tries it out.
"""

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from probes.reading.errors import ProbeError, ProbeWarning
from probes.reading.hook_names import (
    EMBEDDED,
    Layers,
    attention_layers,
    config_of,
    hook_points,
    pattern,
    z,
)
from probes.reading.hooking import Hooks
from probes.reading.passes import checked_tokens, undisturbed


@dataclass(frozen=True)
class AttentionCheck:
    """What was found on one model.

    Attributes:
        row_sums: smallest and largest sum of a pattern's row, rows of zeros (padding) left out.
        sink: whether part of the attention goes to no token: rows sum to less than 1.
        excess: whether rows sum to more than 1, as under attention dropout.
        hidden: layers that mixed values without showing a pattern.
        late: layers that show their pattern after use, so that editing it changes nothing.
        unread: layers whose pattern no gradient reaches; None where no gradient was asked for.
    """

    row_sums: tuple[float, float]
    sink: bool
    excess: bool
    hidden: tuple[int, ...]
    late: tuple[int, ...]
    unread: tuple[int, ...] | None

    def problems(self) -> tuple[str, ...]:
        """What does not hold, each in a few words; empty if everything does.

        >>> AttentionCheck((1.0, 1.0), False, False, (), (0, 1), ()).problems()
        ('editing a pattern changes nothing in layers 0, 1, which show it after use',)
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
                f"attention rows sum to {low:.2f} to {high:.2f}: under attention dropout they are "
                "no shares (model.eval() turns it off)"
            )
        if self.late:
            lines.append(
                f"editing a pattern changes nothing in layers {_listed(self.late)}, which show it "
                "after use"
            )
        if self.unread:
            lines.append(f"no gradient reaches the patterns of layers {_listed(self.unread)}")
        return tuple(lines)


class PassCheck:
    """Watches the attention of one forward pass; changes nothing in it."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self._layers = layers
        self._sums: dict[int, tuple[Tensor, Tensor, float]] = {}
        self._mixed_before: dict[int, bool] = {}

    def watch(self, points: Mapping[str, nn.Module], hooks: Hooks) -> None:
        """Add what watches to a block of hooks."""
        for layer in self._layers:
            hooks.add_before(points[pattern(layer)], self._sees_pattern(layer))
            if (mixed := points.get(z(layer))) is not None:
                hooks.add(mixed, self._sees_mixed(layer))

    def _sees_pattern(self, layer: int) -> Any:
        def see(point: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer not in self._sums:
                with torch.no_grad():
                    self._sums[layer] = (*row_sums(args[0]), row_sum_tolerance(args[0]))

        return see

    def _sees_mixed(self, layer: int) -> Any:
        def see(point: nn.Module, inputs: tuple[Any, ...], mixed: Tensor) -> None:
            self._mixed_before.setdefault(layer, layer not in self._sums)

        return see

    def result(self, unread: tuple[int, ...] | None = None) -> AttentionCheck | None:
        """What one pass told; None if it showed no attention at all."""
        if not self._sums and not self._mixed_before:
            return None
        found = [
            (low.item(), high.item(), tolerance) for low, high, tolerance in self._sums.values()
        ]
        late = [layer for layer, before in self._mixed_before.items() if before]
        return AttentionCheck(
            (
                min((low for low, _, _ in found), default=1.0),
                max((h for _, h, _ in found), default=1.0),
            ),
            any(low < 1 - tolerance and high <= 1 + tolerance for low, high, tolerance in found),
            any(high > 1 + tolerance for _, high, tolerance in found),
            tuple(layer for layer in late if layer not in self._sums),
            tuple(layer for layer in late if layer in self._sums),
            unread,
        )


# Weak, so that a model is forgotten when it is gone.
_CHECKED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class FirstPassCheck:
    """Checks the first pass of a model that any block sees, and warns of what does not hold."""

    def __init__(self, model: nn.Module, points: Mapping[str, nn.Module], hooks: Hooks) -> None:
        # No module without a pattern is asked for its configuration: it may have none.
        layers = tuple(layer for layer in range(len(points)) if pattern(layer) in points)
        self._model = model
        self._pass = PassCheck(() if model in _CHECKED else layers)
        self._pass.watch(points, hooks)

    def conclude(self, stacklevel: int) -> None:
        """Warn in one line, if a pass was seen and the model is not checked yet."""
        found = self._pass.result()
        if found is None or self._model in _CHECKED:
            return
        _CHECKED.add(self._model)
        if problems := found.problems():
            name = type(self._model).__name__
            model_name = getattr(getattr(self._model, "cfg", None), "model_name", None)
            named = f"{name} {model_name!r}" if model_name else name
            warnings.warn(f"{named}: {'; '.join(problems)}", ProbeWarning, stacklevel + 1)


def check_attention(
    model: nn.Module, tokens: Int[Tensor, "batch pos"] | None = None, layers: Layers = None
) -> AttentionCheck:
    """Try out whether a model's attention patterns can be read, edited and differentiated.

    Rows are summed in one pass; every layer's pattern is halved in a pass of its own, which must
    change the output; and one backward pass must reach every pattern.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was, gradients too.
        tokens: what to run it on; None for two sequences of at most eight random tokens.
        layers: one layer, several, or None for every layer that has attention.

    Returns:
        What holds; `problems()` says what does not. Cost: a pass per layer, and three more.

    Raises:
        ProbeError: the model is none that probes can read, or the tokens do not fit it.

    >>> from transformer_lens import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> check_attention(model).problems()
    ()
    """
    points, wanted = hook_points(model), attention_layers(model, layers)
    config = config_of(model)
    if tokens is None:
        source = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.d_vocab, (2, min(8, config.n_ctx)), generator=source)
    tokens = checked_tokens(model, tokens)
    check = PassCheck(wanted)
    with undisturbed(model):
        with Hooks() as hooks:
            check.watch(points, hooks)
            output = model(tokens, return_type="logits")
        unused = []
        for layer in wanted:
            with Hooks() as hooks:
                hooks.add(points[pattern(layer)], lambda point, inputs, weights: weights / 2)
                if torch.equal(model(tokens, return_type="logits"), output):
                    unused.append(layer)
        unread = _unread(model, points, wanted, tokens) if EMBEDDED in points else None
    found = check.result(unread)
    if found is None:
        raise ProbeError(f"{type(model).__name__} showed no attention in a pass of its own")
    return replace(found, late=tuple(layer for layer in unused if layer not in found.hidden))


def row_sums(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest sum of a pattern's row; rows of zeros, which are padding, count as 1."""
    wide = torch.promote_types(weights.dtype, torch.float32)
    sums = weights.sum(-1, dtype=wide)
    sums = sums.masked_fill(sums == 0, 1.0)
    return sums.min(), sums.max()


def row_sum_tolerance(weights: Tensor) -> float:
    """How far rounding alone may take a row from its sum of 1."""
    return max(1e-3, 4 * torch.finfo(weights.dtype).eps)


def _unread(
    model: nn.Module, points: Mapping[str, nn.Module], layers: tuple[int, ...], tokens: Tensor
) -> tuple[int, ...]:
    """The layers whose pattern a gradient back to the embeddings does not pass through."""
    reached: set[int] = set()
    starts: list[Tensor] = []

    def start(point: nn.Module, inputs: tuple[Any, ...], embedded: Tensor) -> Tensor:
        starts.append(embedded.detach().requires_grad_())
        return starts[-1]

    def follow(layer: int) -> Any:
        def see(point: nn.Module, inputs: tuple[Any, ...], weights: Tensor) -> None:
            if weights.requires_grad:
                weights.register_hook(lambda gradient: reached.add(layer))

        return see

    with torch.enable_grad(), Hooks() as hooks:
        hooks.add(points[EMBEDDED], start)
        for layer in layers:
            hooks.add(points[pattern(layer)], follow(layer))
        output = model(tokens, return_type="logits")
        # To the embeddings alone: no parameter's .grad is touched.
        torch.autograd.grad(output.float().square().sum(), starts, allow_unused=True)
    return tuple(layer for layer in layers if layer not in reached)


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
