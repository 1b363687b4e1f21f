"""How the loss changes without a head, on one batch or on several beside a control."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import overload

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from probes.heads.in_context import repeated_pairs
from probes.heads.stimuli import Bos, given_stimuli
from probes.intervening.ablation import heads_by_layer, mean_z, replaced, tokens_and_real
from probes.reading.errors import ProbeError
from probes.reading.hook_names import Head
from probes.reading.labelled import standard_error
from probes.reading.passes import MAX_BATCH_BYTES, token_losses

NEGLIGIBLE = 0.05
"""A head is removable if the loss rises, with two standard errors, by less than this, in nats."""

CONTROL = "control"
"""The name of the batch without repeats that goes with batches by name."""


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


@overload
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
) -> tuple[AblationEffect, ...]: ...


@overload
def ablation_effects(
    model: nn.Module,
    heads: Sequence[Head],
    *,
    tokens: Mapping[str, Tensor],
    attention_mask: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    negligible: float = NEGLIGIBLE,
    max_batch_bytes: int = MAX_BATCH_BYTES,
) -> dict[str, tuple[AblationEffect, ...]]: ...


def ablation_effects(
    model: nn.Module,
    heads: Sequence[Head],
    *,
    tokens: Tensor | Mapping[str, Tensor] | None = None,
    attention_mask: Tensor | Mapping[str, Tensor] | None = None,
    n_sequences: int = 32,
    repeat_length: int | None = None,
    generator: torch.Generator | None = None,
    negligible: float = NEGLIGIBLE,
    max_batch_bytes: int = MAX_BATCH_BYTES,
    bos: Bos = "auto",
) -> tuple[AblationEffect, ...] | dict[str, tuple[AblationEffect, ...]]:
    """How much the loss on the repeated half rises when each head, alone, is mean-ablated.

    `rise = mean over sequences of (loss with the head ablated - loss without ablation)`. The loss
    of a sequence is the mean over the tokens that induction can predict (`repeated_pairs`: the
    second copy without its first token). The same sequences are the reference of the ablation.

    Several batches by name show whether they share a circuit: which heads each of them needs. Then
    the result has one more entry, "control": random tokens of the shape and padding of the longest
    batch, with its first token if all its sequences share it. The loss there is the mean over the
    tokens that induction can NOT predict. A head that only serves repeats does not help there: its
    ablation leaves the control's loss as it is, or lowers it.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        heads: the heads as (layer, head).
        tokens: sequences in which pairs of tokens recur, or several such batches by name; None for
            random tokens repeated twice.
        attention_mask: 0 at padding of `tokens`, which is ignored; None as in `mean_ablate`. With
            several batches, masks by the same names; a batch without one is treated as with None.
        n_sequences: number of sequences to draw, where no tokens are given.
        repeat_length: tokens in the block, at least 3; None for the longest that fits, at most 50.
        generator: the source of randomness; None for a new one with seed 0.
        negligible: a head is removable if `rise + 2 stderr` is below this many nats.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.
        bos: token at the start: a token, None, or "auto" for the tokenizer's BOS.

    Returns:
        One effect per head, in the order of `heads`; with several batches, by name. Cost: one pass
        per head and two more, for each batch.

    Raises:
        ValueError: `n_sequences` or `repeat_length` is too small, or the names of the batches do
            not fit.
        ProbeError: a head does not exist, the context is too short for two repeats, the tokens do
            not fit the model, no pair of tokens recurs, or the model predicts another vocabulary
            than it reads, or attends to later tokens.

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> from probes import repeated_tokens
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> source = torch.Generator().manual_seed(0)
    >>> batches = {f"length {n}": repeated_tokens(8, n, 20, generator=source) for n in (3, 4)}
    >>> {name: len(effects) for name, effects in ablation_effects(
    ...     model, [(0, 0), (0, 1)], tokens=batches).items()}
    {'length 3': 2, 'length 4': 2, 'control': 2}
    """
    effects_on = partial(
        _effects, model, heads, negligible=negligible, max_batch_bytes=max_batch_bytes
    )
    if isinstance(tokens, Mapping):
        batches = _named_batches(model, tokens, attention_mask, generator)
        return {
            name: effects_on(*batch, repeats=name != CONTROL, name=name)
            for name, batch in batches.items()
        }
    if isinstance(attention_mask, Mapping):
        raise ValueError("attention masks by name go with batches of tokens by name")
    if not heads:
        return ()
    batch = tokens_and_real(
        model,
        tokens,
        attention_mask,
        n_sequences=n_sequences,
        repeat_length=repeat_length,
        generator=generator,
        bos=bos,
    )
    return effects_on(*batch, repeats=True)


def _named_batches(
    model: nn.Module,
    tokens: Mapping[str, Tensor],
    attention_mask: Tensor | Mapping[str, Tensor] | None,
    generator: torch.Generator | None,
) -> dict[str, tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None]]:
    """The tokens and text positions of every batch, and of the control.

    Raises:
        ValueError: there is no batch, one is named as the control, or the masks' names differ.
    """
    if not tokens or CONTROL in tokens:
        raise ValueError(
            f"batches are named {list(tokens)}; give at least one, and none named {CONTROL!r}, the "
            "batch without repeats that is always added"
        )
    masks = {} if attention_mask is None else attention_mask
    if not isinstance(masks, Mapping) or not masks.keys() <= tokens.keys():
        raise ValueError(f"batches by name take attention masks by the same names, {list(tokens)}")
    batches = {}
    for name, batch in tokens.items():
        batches[name] = tokens_and_real(model, batch, masks.get(name))
    longest = max(batches, key=lambda name: batches[name][0].shape[1])
    (stimulus,) = given_stimuli(
        model, batches[longest][0], attention_mask=masks.get(longest), generator=generator
    )
    return {**batches, CONTROL: (stimulus.control, stimulus.real)}


def _effects(
    model: nn.Module,
    heads: Sequence[Head],
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"] | None,
    *,
    repeats: bool,
    negligible: float,
    max_batch_bytes: int,
    name: str | None = None,
) -> tuple[AblationEffect, ...]:
    """The effect of each head on one batch, at the tokens that repeat or at those that do not.

    Raises:
        ProbeError: as `ablation_effects`.
    """
    by_layer = heads_by_layer(model, heads)
    if not by_layer:
        return ()
    pairs = repeated_pairs(tokens, real)
    if not repeats:
        both = torch.ones_like(pairs) if real is None else real[:, :-1] & real[:, 1:]
        pairs = both & ~pairs
    used = pairs.any(1)
    if not used.any():
        batch = "the sequences given" if name is None else f"batch {name!r}"
        raise ProbeError(
            f"no pair of tokens recurs in {batch}: there is no loss to compare"
            if repeats
            else f"every pair of tokens recurs in {batch}: there is no loss to compare"
        )
    pairs = pairs[used]
    means = mean_z(model, tuple(by_layer), tokens, real, max_batch_bytes)
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
        with replaced(model, {layer: [head]}, means):
            rises = loss() - loss_before
        rise, stderr = rises.mean().item(), standard_error(rises).item()
        removable = rise + 2 * stderr < negligible
        effects.append(AblationEffect(layer, head, rise, stderr, before, removable))
    return tuple(effects)
