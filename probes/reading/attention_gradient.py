"""Read the gradient of a loss with respect to attention."""

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from probes.reading.attach import BackwardHook, ForwardHook
from probes.reading.attention_check import row_sum_tolerance, row_sums
from probes.reading.errors import ProbeError, ProbeWarning
from probes.reading.hook_names import EMBEDDED, Layers, hook_name, hook_points, incoming
from probes.reading.labelled import LabelledTensor
from probes.reading.records import LayerProbe, Moments


@runtime_checkable
class LossScaler(Protocol):
    """An object that multiplies a loss before the backward pass, such as `torch.amp.GradScaler`."""

    def get_scale(self) -> float:
        """The factor of the next backward pass."""
        ...


class AttentionGradient(LayerProbe[Moments]):
    """The gradient of the user's loss with respect to attention, summed over sequences.

    The reading is `Σ_b ∂L/∂scores[b, head, query, key]` (`wrt="scores"`: before the softmax) or
    `Σ_b ∂L/∂pattern[b, head, query, key]` (`wrt="pattern"`: after the softmax; does not shrink when
    the softmax saturates), with axes `("layer", "head", "query", "key")`, in units of the loss.
    `stderr()` is the standard error of that sum. Entries that the model masks are exactly 0.

    The gradient on scores is computed from the pattern A, `dS = A ∘ (dA - Σ_key A·dA)`, because
    some bridges run the scores hook with the pattern. An entry is masked if its score is the
    lowest of its type; where no scores are read before the pattern, if its weight is exactly 0.

    The sum runs over every sequence of every backward pass since the last reset. With a loss
    that is a mean over its batch, divide by `batches` to get the gradient of the mean loss.
    The probe keeps only two float64 sums per layer between passes.

    Args:
        wrt: "scores" or "pattern".
        layers: one layer, several, or None for every layer that has attention.
        centred: subtract from each row of each sequence its mean over the visible keys. The rows
            of a pattern sum to 1, so only differences within a row matter to training; under
            uniform attention over i keys the centred gradient is i times that of the scores.
        loss_scale: the factor by which the reading is divided, because the loss was multiplied by
            it before the backward pass: a number, or the GradScaler, whose factor is read in every
            backward pass. None divides by nothing and warns under float16 autocast. After a pass
            that overflows the reading is not finite: call reset(), as the scaler skips its step.

    Raises:
        ValueError: `wrt` is neither "scores" nor "pattern", or a scale that is not above 0.
    """

    _pass_kind = "backward pass"

    def __init__(
        self,
        wrt: Literal["scores", "pattern"] = "scores",
        layers: Layers = None,
        *,
        centred: bool = False,
        loss_scale: float | int | LossScaler | None = None,
    ) -> None:
        if wrt not in ("scores", "pattern"):
            raise ValueError(f'wrt is {wrt!r}; allowed: "scores", "pattern"')
        if isinstance(loss_scale, float | int) and not 0 < loss_scale < math.inf:
            raise ValueError(f"loss_scale is {loss_scale}; it must be a finite number above 0")
        super().__init__(layers, Moments)
        self._wrt = wrt
        self._centred = centred
        self._loss_scale = loss_scale
        self._scores: dict[int, Tensor] = {}
        self._scores_come_late: set[int] = set()
        self._forget()

    def _forget(self) -> None:
        self._unknown_dropout: set[int] = set()
        self._z_has_gradient: set[int] = set()
        self._float16 = False

    def hooks(self, model: nn.Module) -> Mapping[str, ForwardHook]:
        """Hooks that read the gradient at every chosen layer, and which entries are masked."""
        points = hook_points(model)
        self._scores.clear()
        self._scores_come_late.clear()
        hooks: dict[str, ForwardHook] = {}
        if hasattr(model, "original_model") and EMBEDDED in points:
            # A bridge may run the pattern hook after it uses the pattern: if its parameters are
            # frozen, the graph must begin before. A backward hook makes it begin there.
            hooks[EMBEDDED] = lambda _: lambda gradient: None
        for layer in self._layers(model):
            scores, pattern, z = (
                hook_name(hook, layer) for hook in ("attn_scores", "pattern", "z")
            )
            if scores in points:
                hooks[scores] = partial(self._at_scores, layer)
            if self._wrt == "scores":  # the softmax's own output, before edits of the pattern
                pattern = incoming(pattern)
            hooks[pattern] = partial(self._at_pattern, layer)
            if z in points:
                hooks[z] = partial(self._at_z, layer)
        return hooks

    def _at_scores(self, layer: int, scores: Tensor) -> None:
        if layer not in self._scores_come_late:
            self._scores[layer] = scores

    def _at_pattern(self, layer: int, pattern: Tensor) -> BackwardHook:
        scores = self._scores.pop(layer, None)
        if scores is None:  # a scores hook that runs after this one gets the pattern again
            self._scores_come_late.add(layer)
            masked = pattern == 0
        else:
            # -inf, or the dtype's minimum, which some models then divide by their scale.
            masked = scores <= torch.finfo(scores.dtype).min / 64
        device = pattern.device.type
        if torch.is_autocast_enabled(device):
            self._float16 |= torch.get_autocast_dtype(device) == torch.float16
        if self._wrt == "pattern":
            return partial(self._add, layer, masked)
        pattern = pattern.clone()  # later hooks may change the model's tensor in place
        softmax: Tensor | None = pattern
        if row_sums(pattern)[1].item() > 1 + row_sum_tolerance(pattern):
            softmax = None if scores is None else _before_dropout(pattern, scores)
        return partial(self._add_score_gradient, layer, masked, pattern, softmax)

    def _at_z(self, layer: int, z: Tensor) -> BackwardHook:
        return lambda _: self._z_has_gradient.add(layer)

    def _add_score_gradient(
        self, layer: int, masked: Tensor, pattern: Tensor, softmax: Tensor | None, gradient: Tensor
    ) -> None:
        if softmax is None:
            self._unknown_dropout.add(layer)
        else:
            self._add(layer, masked, _score_gradient(pattern, softmax, gradient))

    def _add(self, layer: int, masked: Tensor, gradient: Tensor) -> None:
        # The gradient of a pattern is not 0 at masked entries.
        gradient = gradient.masked_fill(masked, 0.0)
        if self._centred:
            gradient = centred_by_row(gradient, (~masked).expand_as(gradient))
        self._records[layer].add(self._unscaled(gradient))

    def _unscaled(self, gradient: Tensor) -> Tensor:
        if self._loss_scale is None:
            return gradient
        scale = self._loss_scale
        factor = scale.get_scale() if isinstance(scale, LossScaler) else scale
        # Half precision would lose small entries.
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / factor

    def _complete_records(self) -> dict[int, Moments]:
        if self._unknown_dropout:
            raise ProbeError(
                f"attention dropout was on in layers {sorted(self._unknown_dropout)}, which do not "
                "expose their scores: call model.eval() before the pass, or read "
                'wrt="pattern"; then reset()'
            )
        with_gradient = sorted(self._z_has_gradient)
        unread = [layer for layer in with_gradient if not self._records[layer].batches]
        if unread:
            raise ProbeError(
                f"gradients reach the mixed values of layers {unread}, but not the patterns at "
                "their hook_pattern: the model, or an edit, computes with other patterns"
            )
        if self._float16 and self._loss_scale is None:
            warnings.warn(
                "the gradient was read under float16 autocast, where a GradScaler usually "
                "multiplies the loss: pass loss_scale=scaler, or loss_scale=1 if there is none",
                ProbeWarning,
                stacklevel=3,
            )
        return super()._complete_records()

    def reset(self) -> None:
        """Forget every pass seen so far."""
        super().reset()
        self._forget()

    def reading(self) -> LabelledTensor:
        """The summed gradient `Σ_b ∂L/∂attention[b]`.

        Raises:
            ProbeError: there was no backward pass yet.
        """
        sums = {layer: record.sum() for layer, record in self._complete_records().items()}
        return self._labelled(f"attention_gradient_{self._wrt}", sums)

    def stderr(self) -> LabelledTensor:
        """The standard error of the summed gradient over its B sequences, `sqrt(B · s²)`.

        `s²` is the sample variance of one sequence's contribution. The sequences must be
        independent draws and the loss a sum (or mean) over them.

        Raises:
            ProbeError: there were fewer than two sequences.
        """
        records = self._complete_records()
        if any(record.sequences < 2 for record in records.values()):
            raise ProbeError("a standard error needs at least two sequences, found 1")
        errors = {layer: record.stderr() for layer, record in records.items()}
        return self._labelled(f"attention_gradient_{self._wrt}_stderr", errors)

    def _labelled(self, name: str, values: dict[int, Tensor]) -> LabelledTensor:
        axes = ("layer", "head", "query", "key")
        return LabelledTensor(name, self._stack(values), axes, {"layer": tuple(values)})


def centred_by_row(values: Tensor, mask: Bool[Tensor, "*any query key"]) -> Tensor:
    """Subtract each row's mean over the mask; 0 outside of it."""
    values = torch.where(mask, values, 0.0)
    mean = values.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, values - mean, 0.0)


def _score_gradient(pattern: Tensor, softmax: Tensor, gradient: Tensor) -> Tensor:
    """`P ∘ dP - A · Σ_key P·dP`: A is the softmax, P the pattern after dropout (without: A)."""
    wide = torch.promote_types(pattern.dtype, torch.float32)
    weighted = pattern.to(wide) * gradient.to(wide)
    return weighted - softmax.to(wide) * weighted.sum(-1, keepdim=True)


def _before_dropout(pattern: Tensor, scores: Tensor) -> Tensor | None:
    """The softmax of the scores, or None if dropout of it cannot give the pattern.

    Dropout multiplies every weight that it keeps by the same factor. The test uses only softmax
    weights above 0.01, whose relative rounding error is small.
    """
    wide = torch.promote_types(pattern.dtype, torch.float32)
    softmax = scores.to(wide).softmax(-1).nan_to_num(0.0)
    factors = (pattern.to(wide) / softmax)[(pattern > 0) & (softmax > 0.01)]
    tolerance = row_sum_tolerance(pattern)
    if factors.numel() and factors.max() > factors.min() * (1 + tolerance):
        return None
    return softmax
