"""The gradient of a loss on attention, measured in passes that leave no trace in training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from probes.reading.attach import attach
from probes.reading.attention_gradient import AttentionGradient
from probes.reading.errors import ProbeError
from probes.reading.hook_names import Layers
from probes.reading.labelled import LabelledTensor
from probes.reading.padding import real_positions
from probes.reading.passes import (
    MAX_BATCH_BYTES,
    batch_rows,
    checked_tokens,
    frozen,
    mask_argument,
    next_token_losses,
    split,
    undisturbed,
)

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`loss(logits, tokens)`: the mean over the sequences of a batch, a scalar tensor."""

Wrt = Literal["scores", "pattern"]

MIN_BLOCKS = 16
"""Standard errors compare at least this many blocks of sequences (or single sequences)."""


@dataclass(frozen=True, eq=False)
class LossGradient:
    """The mean over sequences of the gradient of a loss on attention.

    Attributes:
        mean: `∂L/∂scores` or `∂L/∂pattern`, axes ("layer", "head", "query", "key").
        stderr: its standard error over blocks of sequences, the same axes.
        summed: the sum of `mean` over heads, axes ("layer", "query", "key").
        summed_stderr: the standard error of `summed`; heads are correlated, so it does not follow
            from `stderr`.
        n_sequences: sequences in the mean.
        wrt: what the gradient is taken with respect to.
    """

    mean: LabelledTensor
    stderr: LabelledTensor
    summed: LabelledTensor
    summed_stderr: LabelledTensor
    n_sequences: int
    wrt: Wrt


def attention_gradient(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    *,
    loss: Loss | None = None,
    layers: Layers = None,
    wrt: Wrt = "scores",
    attention_mask: Shaped[Tensor, "sequence pos"] | None = None,
    max_batch_bytes: int = MAX_BATCH_BYTES,
) -> LossGradient:
    """Measure the gradient of a loss on every head's attention, with its standard error.

    The passes run in evaluation mode with frozen parameters: no `.grad`, optimizer, DDP reducer or
    GradScaler notices them. Entries that the model masks are exactly 0.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        tokens: independent sequences, at least two.
        loss: mean over the sequences of a batch; None for `next_token_loss`.
        layers: one layer, several, or None for every layer that has attention.
        wrt: "scores" before the softmax, "pattern" after it.
        attention_mask: 0 at padding, which the model gets too; None to find padding by the
            tokenizer's PAD token. Only the default loss leaves padding out by itself.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.

    Raises:
        ValueError: one sequence, or tokens or a mask of another shape.
        ProbeError: tokens that the model cannot read, a loss that is not a finite scalar that
            depends on the model's attention, or whatever `AttentionGradient` refuses.

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 6, "d_vocab": 5}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu", "seed": 0})
    >>> gradient = attention_gradient(model, torch.randint(5, (32, 6)))
    >>> gradient.mean
    LabelledTensor(loss_gradient_scores: layer=1 (0,), head=2, query=6, key=6; float64)
    >>> all(parameter.grad is None for parameter in model.parameters())
    True
    """
    tokens = checked_tokens(model, tokens)
    n_sequences = len(tokens)
    if n_sequences < 2:
        raise ValueError("a gradient with a standard error needs at least two sequences")
    real = real_positions(model, tokens, attention_mask)
    rows = batch_rows(model, tokens.shape[1], max(1, max_batch_bytes // 3), logits=True)
    rows = min(rows, max(1, n_sequences // MIN_BLOCKS))
    probe = AttentionGradient(wrt, layers, loss_scale=1)
    by_head, summed = _Blocks(), _Blocks()
    with frozen(model), undisturbed(model), torch.enable_grad(), attach(model, probe):
        for batch, batch_real in split(rows, tokens, real):
            logits = model(batch, return_type="logits", **mask_argument(batch_real))
            if loss is None:
                value = next_token_loss(logits, batch, batch_real)
            else:
                value = loss(logits, batch)
            _check_loss(value)
            probe.reset()
            value.backward()
            reading = probe.reading()
            by_head.add(reading.values.double(), len(batch))
            summed.add(reading.values.double().sum(1), len(batch))
    axes, coords = reading.axes, reading.coords
    name = f"loss_gradient_{wrt}"
    return LossGradient(
        mean=LabelledTensor(name, by_head.mean(), axes, coords),
        stderr=LabelledTensor(f"{name}_stderr", by_head.stderr(), axes, coords),
        summed=LabelledTensor(name, summed.mean(), ("layer", *axes[2:]), coords),
        summed_stderr=LabelledTensor(
            f"{name}_stderr", summed.stderr(), ("layer", *axes[2:]), coords
        ),
        n_sequences=n_sequences,
        wrt=wrt,
    )


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    real: Shaped[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross entropy of the next token, in nats: over positions, then over sequences.

    Where `real` is False, neither the token nor the prediction made from it counts.

    >>> next_token_loss(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])).exp().round()
    tensor(4.)
    """
    losses = next_token_losses(logits, tokens)
    if real is None:
        return losses.mean()
    counted = (real[:, :-1].bool() & real[:, 1:].bool()).to(losses.device)
    of_sequence = (losses * counted).sum(1) / counted.sum(1).clamp(min=1)
    return of_sequence.mean()


def _check_loss(value: object) -> None:
    if not isinstance(value, Tensor) or value.ndim != 0:
        kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ProbeError(f"the loss must be a scalar tensor, found {kind}: take its mean")
    if not bool(value.isfinite()):
        raise ProbeError(f"the loss is {value.item()}")
    if not value.requires_grad:
        raise ProbeError(
            "the loss does not depend on the model's attention: no gradient reaches it"
        )


class _Blocks:
    """A mean over sequences, and its standard error, from the means of blocks of them.

    With blocks of n_j sequences and mean x_j, N in total: the mean is `m = Σ n_j x_j / N`, its
    variance `Σ n_j (x_j - m)² / (J - 1) / N`.
    """

    def __init__(self) -> None:
        self._blocks = self._total = 0
        self._sum = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, mean: Tensor, size: int) -> None:
        self._blocks += 1
        self._total += size
        self._sum = self._sum.to(mean.device) + size * mean
        self._squares = self._squares.to(mean.device) + size * mean.square()

    def mean(self) -> Tensor:
        return self._sum / self._total

    def stderr(self) -> Tensor:
        if self._blocks < 2:
            return torch.full_like(self._sum, math.nan)
        spread = (self._squares - self._total * self.mean().square()).clamp(min=0)
        return (spread / (self._blocks - 1) / self._total).sqrt()
