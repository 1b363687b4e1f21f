"""Replace heads by their mean and measure how the loss rises: whether the model needs a head."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from probes.heads.in_context import repeated_pairs
from probes.heads.stimuli import Bos, longest_stimulus
from probes.reading.activation import Activation
from probes.reading.attach import attach
from probes.reading.errors import ProbeError
from probes.reading.hook_names import Head, check_head, hook_name, hook_points
from probes.reading.hooking import Hooks
from probes.reading.labelled import LabelledTensor, standard_error
from probes.reading.padding import real_positions
from probes.reading.passes import (
    MAX_BATCH_BYTES,
    batch_rows,
    checked_tokens,
    run,
    split,
    token_losses,
    undisturbed,
)

NEGLIGIBLE = 0.05
"""A head is removable if the loss rises, with two standard errors, by less than this, in nats."""


@dataclass(frozen=True)
class AblationEffect:
    """How the loss on the repeated half changes when one head is replaced by its mean.

    Attributes:
        layer: the head's layer.
        head: the head's number in that layer.
        rise: mean rise of the loss, in nats per token.
        stderr: its standard error, paired over sequences (NaN for one sequence).
        loss: the loss without ablation, in nats per token.
        removable: whether `rise + 2 stderr < negligible`; False where stderr is NaN.
    """

    layer: int
    head: int
    rise: float
    stderr: float
    loss: float
    removable: bool


@contextmanager
def mean_ablate(
    model: nn.Module,
    heads: Sequence[Head],
    *,
    tokens: Int[Tensor, "batch pos"] | None = None,
    attention_mask: Shaped[Tensor, "batch mask_pos"] | None = None,
    max_batch_bytes: int = MAX_BATCH_BYTES,
) -> Iterator[None]:
    """Replace heads by their mean for the length of a `with` block.

    The mixed values z of each head (before W_O) become their mean over all sequences and positions
    of a reference batch, computed in one pass at the start of the block. The head then writes the
    same vector at every position: the mean stays, the information is gone. All heads of the list
    are replaced together. Leaving the block, also by an exception, removes exactly these hooks.

    Args:
        model: a HookedTransformer or TransformerBridge.
        heads: the heads as (layer, head); an empty list changes nothing.
        tokens: the reference batch; None for 16 sequences of random tokens repeated twice.
        attention_mask: 0 at padding of the reference, which the mean skips; None to find padding by
            the tokenizer's PAD token, see `padding.real_positions`.
        max_batch_bytes: bound on the estimated activations of one reference pass, in bytes.

    Raises:
        ProbeError: a head does not exist, or the tokens do not fit the model.

    >>> from transformer_lens import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    >>> before = model(tokens)
    >>> with mean_ablate(model, [(0, 1)], tokens=tokens):
    ...     assert not torch.equal(model(tokens), before)
    >>> torch.equal(model(tokens), before)
    True
    """
    by_layer = _by_layer(model, heads)
    if not by_layer:
        yield
        return
    reference, real = _tokens_and_real(model, tokens, attention_mask, n_sequences=16)
    means = _mean_z(model, tuple(by_layer), reference, real, max_batch_bytes)
    with _replaced(model, by_layer, means):
        yield


def ablation_effects(
    model: nn.Module,
    heads: Sequence[Head],
    *,
    tokens: Int[Tensor, "batch pos"] | None = None,
    attention_mask: Shaped[Tensor, "batch mask_pos"] | None = None,
    n_sequences: int = 32,
    repeat_length: int | None = None,
    generator: torch.Generator | None = None,
    negligible: float = NEGLIGIBLE,
    max_batch_bytes: int = MAX_BATCH_BYTES,
    bos: Bos = "auto",
) -> tuple[AblationEffect, ...]:
    """How much the loss on the repeated half rises when each head, alone, is mean-ablated.

    `rise = mean over sequences of (loss with the head ablated - loss without ablation)`. The loss
    of a sequence is the mean over the tokens that induction can predict (`repeated_pairs`: the
    second copy without its first token). The same sequences are the reference of the ablation.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        heads: the heads as (layer, head).
        tokens: sequences in which pairs of tokens recur; None for random tokens repeated twice.
        attention_mask: 0 at padding of `tokens`, which is ignored; None as in `mean_ablate`.
        n_sequences: number of sequences to draw.
        repeat_length: tokens in the block, at least 3; None for the longest that fits, at most 50.
        generator: the source of randomness; None for a new one with seed 0.
        negligible: a head is removable if `rise + 2 stderr` is below this many nats.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.
        bos: token at the start: a token, None, or "auto" for the tokenizer's BOS.

    Returns:
        One effect per head, in the order of `heads`. Cost: one pass per head and two more.

    Raises:
        ValueError: `n_sequences` or `repeat_length` is too small.
        ProbeError: a head does not exist, the context is too short for two repeats, the tokens do
            not fit the model, no pair of tokens recurs, or the model predicts another vocabulary
            than it reads, or attends to later tokens.
    """
    by_layer = _by_layer(model, heads)
    if not by_layer:
        return ()
    tokens, real = _tokens_and_real(
        model,
        tokens,
        attention_mask,
        n_sequences=n_sequences,
        repeat_length=repeat_length,
        generator=generator,
        bos=bos,
    )
    pairs = repeated_pairs(tokens, real)
    used = pairs.any(1)
    if not used.any():
        raise ProbeError(
            "no pair of tokens recurs in the sequences given: there is no loss to compare"
        )
    pairs = pairs[used]
    means = _mean_z(model, tuple(by_layer), tokens, real, max_batch_bytes)
    # Random tokens hold no padding, even where one equals the tokenizer's PAD token.
    mask = torch.ones_like(tokens[used]) if real is None else real[used]

    def loss() -> Float[Tensor, "batch"]:
        losses = token_losses(
            model, tokens[used], attention_mask=mask, max_batch_bytes=max_batch_bytes
        )
        weights = (pairs / pairs.sum(1, keepdim=True)).to(losses)
        return (losses.double().where(pairs.to(losses.device), 0.0) * weights).sum(1)

    loss_before = loss()
    before = loss_before.mean().item()
    effects = []
    for layer, head in heads:
        with _replaced(model, {layer: [head]}, means):
            rises = loss() - loss_before
        rise, stderr = rises.mean().item(), standard_error(rises).item()
        removable = rise + 2 * stderr < negligible
        effects.append(AblationEffect(layer, head, rise, stderr, before, removable))
    return tuple(effects)


def _tokens_and_real(
    model: nn.Module, tokens: Tensor | None, attention_mask: Tensor | None, **drawing: Any
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None]:
    """The given or random tokens, and where they are not padding (None: everywhere)."""
    if tokens is None:
        return longest_stimulus(model, **drawing)[0].tokens, None
    tokens = checked_tokens(model, tokens)
    return tokens, real_positions(model, tokens, attention_mask)


def _by_layer(model: nn.Module, heads: Sequence[Head]) -> dict[int, list[int]]:
    """The heads of each layer.

    Raises:
        ProbeError: a head does not exist.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        check_head(model, (layer, head))
        by_layer.setdefault(layer, []).append(head)
    return by_layer


def _mean_z(
    model: nn.Module,
    layers: tuple[int, ...],
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"] | None,
    max_batch_bytes: int,
) -> LabelledTensor:
    """Mean over sequences and positions of every head's mixed values, without padding."""
    batch_real: Tensor | None = None

    def text_positions(z: Tensor) -> Tensor:
        return z.flatten(0, 1) if batch_real is None else z[batch_real.to(z.device)]

    mean = Activation("z", layers, reduce=text_positions, axes=("head", "d_head"))
    rows = batch_rows(model, tokens.shape[1], max_batch_bytes)
    with undisturbed(model), attach(model, mean):
        for batch, batch_real in split(rows, tokens, real):
            run(model, batch, batch_real)
    return mean.reading()


@contextmanager
def _replaced(
    model: nn.Module, by_layer: Mapping[int, list[int]], means: LabelledTensor
) -> Iterator[None]:
    """Replace the mixed values of heads by their means inside the block."""
    points = hook_points(model)
    with Hooks() as hooks:
        for layer, heads in by_layer.items():
            replace = partial(_with_values, heads, means.sel(layer=layer).values[heads])
            hooks.edit(points[hook_name("z", layer)], replace)
        yield


def _with_values(heads: list[int], values: Float[Tensor, "head d_head"], z: Tensor) -> Tensor:
    replaced = z.clone()
    replaced[:, :, heads] = values.to(z)
    return replaced
