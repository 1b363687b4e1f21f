"""Read attention patterns, and the gradient of a loss with respect to them."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from probes import hook_names
from probes.attach import BackwardHook, ForwardHook
from probes.errors import ProbeError
from probes.hook_names import Layers
from probes.labelled import LabelledTensor
from probes.records import Concatenated, LayerProbe, Moments, Sum


class AttentionPattern(LayerProbe[Concatenated | Sum]):
    """The attention pattern `softmax(scores)` of every head.

    The reading has axes `("layer", "batch", "head", "query", "key")`; several batches follow
    one another along `batch`. With `reduce="mean"` it is the mean over all sequences seen and
    has no `batch` axis: a running sum, so memory does not grow.

    Args:
        layers: one layer, several, or None for every layer that has attention.
        reduce: None keeps the sequences apart, "mean" averages them.

    Raises:
        ValueError: `reduce` is neither None nor "mean".
    """

    def __init__(self, layers: Layers = None, *, reduce: Literal["mean"] | None = None) -> None:
        if reduce not in (None, "mean"):
            raise ValueError(f'reduce is {reduce!r}; allowed: None, "mean"')
        super().__init__(layers, Concatenated if reduce is None else Sum)

    def hooks(self, model: nn.Module) -> Mapping[str, ForwardHook]:
        """Read the pattern of every chosen layer."""
        return {
            hook_names.pattern(layer): partial(self._read, layer) for layer in self._layers(model)
        }

    def _read(self, layer: int, pattern: Tensor) -> None:
        self._records[layer].add(pattern)

    def _seen(self) -> str:
        return "forward pass"

    def reading(self) -> LabelledTensor:
        """Attention from each query to each key; rows sum to 1.

        Raises:
            ProbeError: no forward pass was seen.
        """
        records = self._complete_records()
        values = self._stack(
            {
                layer: record.mean() if isinstance(record, Sum) else record.values()
                for layer, record in records.items()
            }
        )
        batch = ("batch",) if values.ndim == 5 else ()
        axes = ("layer", *batch, "head", "query", "key")
        return LabelledTensor("attention_pattern", values, axes, {"layer": tuple(records)})


class AttentionGradient(LayerProbe[Moments]):
    """The gradient of the user's loss with respect to attention, summed over sequences.

    The reading is `Σ_b ∂L/∂scores[b, head, query, key]` (`wrt="scores"`: before the softmax) or
    `Σ_b ∂L/∂pattern[b, head, query, key]` (`wrt="pattern"`: after it; does not shrink when the
    softmax saturates), with axes `("layer", "head", "query", "key")`, in units of the loss.
    `stderr()` is the standard error of that sum. Entries that the model masks are exact zeros.

    The sum runs over every sequence of every backward pass since the last reset. With a loss
    that is a mean over its batch, divide by `batches` to get the gradient of the mean loss.
    Only two float64 sums per layer are kept between passes.

    Args:
        wrt: "scores" or "pattern".
        layers: one layer, several, or None for every layer that has attention.
        centred: subtract from each row of each sequence its mean over the visible keys. A pattern's
            rows sum to 1, so only differences within a row can be followed; under uniform
            attention over i keys the gradient of the scores is this, divided by i.

    Raises:
        ValueError: `wrt` is neither "scores" nor "pattern".
    """

    def __init__(
        self,
        wrt: Literal["scores", "pattern"] = "scores",
        layers: Layers = None,
        *,
        centred: bool = False,
    ) -> None:
        if wrt not in ("scores", "pattern"):
            raise ValueError(f'wrt is {wrt!r}; allowed: "scores", "pattern"')
        super().__init__(layers, Moments)
        self._wrt = wrt
        self._centred = centred
        self._masked: dict[int, Tensor] = {}

    def hooks(self, model: nn.Module) -> Mapping[str, ForwardHook]:
        """Read the gradient at every chosen layer, and which of its entries are masked."""
        hooks: dict[str, ForwardHook] = {}
        for layer in self._layers(model):
            hooks[hook_names.attn_scores(layer)] = partial(self._at_scores, layer)
            if self._wrt == "pattern":
                hooks[hook_names.pattern(layer)] = partial(self._at_pattern, layer)
        return hooks

    def _at_scores(self, layer: int, scores: Tensor) -> BackwardHook | None:
        # HookedTransformer masks with -inf, TransformerBridge with the dtype's minimum.
        masked = scores <= torch.finfo(scores.dtype).min / 2
        if self._wrt == "scores":
            return partial(self._add, layer, masked)
        self._masked[layer] = masked
        return None

    def _at_pattern(self, layer: int, pattern: Tensor) -> BackwardHook:
        # A bridge that lets the original model attend may show its pattern before its scores.
        masked = self._masked.pop(layer, torch.zeros((), dtype=torch.bool, device=pattern.device))
        return partial(self._add, layer, masked)

    def _add(self, layer: int, masked: Tensor, gradient: Tensor) -> None:
        # At masked entries a pattern's gradient is not zero, and a score's is NaN in a row
        # that is masked from end to end (padding).
        gradient = gradient.masked_fill(masked, 0.0)
        if self._centred:
            n_visible = (~masked).expand_as(gradient).sum(-1, keepdim=True)
            gradient = gradient - gradient.sum(-1, keepdim=True) / n_visible.clamp(min=1)
            gradient = gradient.masked_fill(masked, 0.0)
        self._records[layer].add(gradient)

    def _seen(self) -> str:
        return "backward pass"

    def reset(self) -> None:
        """Forget every pass seen so far."""
        super().reset()
        self._masked.clear()

    def reading(self) -> LabelledTensor:
        """The summed gradient `Σ_b ∂L/∂attention[b]`.

        Raises:
            ProbeError: no backward pass was seen.
        """
        sums = {layer: record.sum() for layer, record in self._complete_records().items()}
        return self._labelled(f"attention_gradient_{self._wrt}", sums)

    def stderr(self) -> LabelledTensor:
        """The standard error of the summed gradient over its B sequences, `sqrt(B · s²)`.

        `s²` is the sample variance of one sequence's contribution. The sequences must be
        independent draws and the loss a sum (or mean) over them.

        Raises:
            ProbeError: fewer than two sequences were seen.
        """
        records = self._complete_records()
        if any(record.sequences < 2 for record in records.values()):
            raise ProbeError("a standard error needs at least two sequences, 1 was seen")
        errors = {layer: record.stderr() for layer, record in records.items()}
        return self._labelled(f"attention_gradient_{self._wrt}_stderr", errors)

    def _labelled(self, name: str, values: dict[int, Tensor]) -> LabelledTensor:
        axes = ("layer", "head", "query", "key")
        return LabelledTensor(name, self._stack(values), axes, {"layer": tuple(values)})
