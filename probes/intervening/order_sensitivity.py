"""Whether a model's prediction depends on the order of the tokens before it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from probes.heads.stimuli import bos_token
from probes.reading.labelled import standard_error
from probes.reading.padding import real_positions
from probes.reading.passes import (
    MAX_BATCH_BYTES,
    batch_rows,
    checked_logits,
    checked_tokens,
    split,
    undisturbed,
)


@dataclass(frozen=True)
class OrderSensitivity:
    """How far the last prediction moves when the tokens before the last are permuted.

    Attributes:
        kl: mean divergence over sequences and permutations, in nats.
        stderr: its standard error over sequences (NaN for one).
        n_sequences: number of sequences.
        n_permutations: permutations of each sequence.
        keeps_first: whether the first token stayed where it was.
    """

    kl: float
    stderr: float
    n_sequences: int
    n_permutations: int
    keeps_first: bool


def order_sensitivity(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    *,
    n_permutations: int = 4,
    keep_first: bool | None = None,
    attention_mask: Shaped[Tensor, "batch mask_pos"] | None = None,
    generator: torch.Generator | None = None,
    max_batch_bytes: int = MAX_BATCH_BYTES,
) -> OrderSensitivity:
    """The divergence between predictions before and after permuting all tokens but the last.

    `mean of KL(p(· | t_1 … t_T) ‖ p(· | t_σ(1) … t_σ(T-1), t_T))` over sequences and over uniform
    permutations σ, where p is the prediction at the last token. It is 0 for one causal layer
    without positions, whose last query sums over a set of keys, and for bidirectional layers
    without positions. More causal layers know the order even without positions.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        tokens: the sequences.
        n_permutations: permutations drawn for each sequence.
        keep_first: whether the first token, as a BOS, stays where it is. None: if all sequences
            share it, or the only sequence starts with the model's BOS.
        attention_mask: 0 at padding, which stays where it is; None to find padding by the
            tokenizer's PAD token, see `padding.real_positions`.
        generator: the source of randomness; None for a new one with seed 0.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.

    Returns:
        Mean and standard error, in nats. Cost: one pass over the sequences, and one for each
        permutation.

    Raises:
        ValueError: a sequence has fewer than two tokens to permute, or `n_permutations` is below 1.
        ProbeError: the tokens do not fit the model, or it predicts another vocabulary.

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu", "seed": 0})
    >>> tokens = torch.randint(20, (8, 6), generator=torch.Generator().manual_seed(0))
    >>> with_positions = order_sensitivity(model, tokens)
    >>> _ = model.pos_embed.W_pos.data.zero_()
    >>> with_positions.kl > 1e-6 > abs(order_sensitivity(model, tokens).kl)
    True
    """
    if n_permutations < 1:
        raise ValueError(f"n_permutations is {n_permutations}; it must be at least 1")
    tokens = checked_tokens(model, tokens)
    real = real_positions(model, tokens, attention_mask)
    text = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
    first, last = _ends(text)
    starts = tokens.gather(1, first.unsqueeze(1))
    if keep_first is None:
        keep_first = bool((starts == starts[0]).all()) and (
            len(tokens) > 1 or int(starts[0]) == bos_token(model)
        )
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    movable = text & (positions != last.unsqueeze(1))
    if keep_first:
        movable &= positions != first.unsqueeze(1)
    if int(movable.sum(1).min()) < 2:
        kept = "the first and the last, which stay" if keep_first else "the last, which stays"
        raise ValueError(
            f"a sequence of {int(text.sum(1).min())} tokens is too short: besides {kept}, it "
            "needs two to permute"
        )
    source = torch.Generator().manual_seed(0) if generator is None else generator
    with undisturbed(model):
        before = _last_predictions(model, tokens, real, last, max_batch_bytes)
        divergences = before.new_zeros(len(tokens))
        for _ in range(n_permutations):
            permuted = _permuted(tokens, movable, source)
            after = _last_predictions(model, permuted, real, last, max_batch_bytes)
            terms = before.exp() * (before - after)
            divergences += terms.masked_fill(before == -torch.inf, 0.0).sum(-1) / n_permutations
    return OrderSensitivity(
        kl=divergences.mean().item(),
        stderr=standard_error(divergences).item(),
        n_sequences=len(tokens),
        n_permutations=n_permutations,
        keeps_first=keep_first,
    )


def _ends(text: Bool[Tensor, "batch pos"]) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]:
    """The first and the last position of text in every sequence."""
    pos = text.shape[1]
    return text.int().argmax(1), pos - 1 - text.flip(1).int().argmax(1)


def _permuted(
    tokens: Int[Tensor, "batch pos"],
    movable: Bool[Tensor, "batch pos"],
    generator: torch.Generator,
) -> Int[Tensor, "batch pos"]:
    """The tokens with those at movable positions in random order, anew for each sequence."""
    keys = torch.rand(tokens.shape, generator=generator, device=generator.device).to(tokens.device)
    # Both orders list the movable positions first and the others alike.
    drawn = keys.masked_fill(~movable, 2.0).argsort(dim=1, stable=True)
    targets = (~movable).long().argsort(dim=1, stable=True)
    return torch.empty_like(tokens).scatter_(1, targets, tokens.gather(1, drawn))


def _last_predictions(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"] | None,
    last: Int[Tensor, "batch"],
    max_batch_bytes: int,
) -> Float[Tensor, "batch vocab"]:
    """Log-probabilities at the last token of every sequence, in at least float32."""
    predictions = []
    rows = batch_rows(model, tokens.shape[1], max_batch_bytes, logits=True)
    for batch, batch_real, batch_last in split(rows, tokens, real, last):
        logits = checked_logits(model, batch, batch_real, "order_sensitivity")
        chosen = logits[torch.arange(len(batch), device=logits.device), batch_last]
        wide = torch.promote_types(chosen.dtype, torch.float32)
        predictions.append(chosen.to(wide).log_softmax(-1))
    return torch.cat(predictions)
