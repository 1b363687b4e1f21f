"""Direct logit attribution: how much each head itself raises the logit of the right next token."""

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from probes.heads.in_context import repeated_pairs
from probes.heads.stimuli import Bos, longest_stimulus
from probes.reading.activation import Activation
from probes.reading.attach import attach
from probes.reading.errors import ProbeError
from probes.reading.final_norm import final_norm, logit_directions
from probes.reading.head_outputs import check_sum_of_heads, output_weights
from probes.reading.hook_names import layers_with
from probes.reading.labelled import standard_error
from probes.reading.padding import real_positions
from probes.reading.passes import (
    MAX_BATCH_BYTES,
    attends_ahead,
    batch_rows,
    checked_logits,
    checked_tokens,
    undisturbed,
)


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """What every head adds directly to the logit of the right token, on the repeated half.

    Attributes:
        layers: the layer number of each row.
        logit: mean over sequences, in nats of logit, `[layer, head]`.
        stderr: its standard error (NaN for one sequence).
        total: mean logit of the right token minus the vocabulary's mean, in nats: what all heads,
            MLPs, embeddings and biases add up to.
        sequences: number of sequences.
    """

    layers: tuple[int, ...]
    logit: Float[Tensor, "layer head"]
    stderr: Float[Tensor, "layer head"]
    total: float
    sequences: int


def direct_logit_attribution(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"] | None = None,
    *,
    n_sequences: int = 32,
    repeat_length: int | None = None,
    generator: torch.Generator | None = None,
    max_batch_bytes: int = MAX_BATCH_BYTES,
    bos: Bos = "auto",
) -> LogitAttribution:
    """How much each head itself raises the logit of the right next token, on the repeated half.

    With head h's output `c = z_h W_O[h]` at position i and the right token t,
    `w (c - m(c)) / s · (W_U[t] - mean_v W_U[v])`, where the final norm has the weight w, the mean m
    (0 for RMSNorm) and, held fixed, the scale s of the full residual stream. It is the mean over
    the tokens that induction can predict (`repeated_pairs`). The contributions of all heads, MLPs,
    embeddings and biases add up to `total`. What a head does through later layers is not in it,
    and a head with a large contribution need not be needed: others may make up for it.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        tokens: sequences in which pairs of tokens recur; None for random tokens repeated twice.
        n_sequences: number of sequences to draw, where no tokens are given.
        repeat_length: tokens in the block, at least 3; None for the longest that fits, at most 50.
        generator: the source of randomness; None for a new one with seed 0.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.
        bos: token at the start: a token, None, or "auto" for the tokenizer's BOS.

    Returns:
        Contributions `[layer, head]` with standard errors over sequences. Cost: one pass over the
        sequences, and one over two of them per layer.

    Raises:
        ValueError: `n_sequences` or `repeat_length` is too small.
        ProbeError: the tokens do not fit the model, or no pair recurs; or contributions are not
            defined: the model attends to later tokens, normalises or rescales what its heads
            write (Gemma 2 and 3, OLMo 2), or its logits are not its unembedding.

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> direct_logit_attribution(model, n_sequences=8).logit.shape
    torch.Size([1, 2])
    """
    tokens, pairs = repeated_sequences(
        model,
        tokens,
        n_sequences=n_sequences,
        repeat_length=repeat_length,
        generator=generator,
        bos=bos,
    )
    return attribute_logits(model, tokens, pairs, max_batch_bytes)


def attribute_logits(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    pairs: Bool[Tensor, "batch pos-1"],
    max_batch_bytes: int,
) -> LogitAttribution:
    """`direct_logit_attribution` on sequences that `repeated_sequences` gave."""
    layers = layers_with(model, "z")
    check_sum_of_heads(model, layers, tokens[:2])
    last = max(layers_with(model, "resid_post"))
    by_sequence, totals = [], []
    with undisturbed(model):
        norm = final_norm(model)
        size = batch_rows(model, tokens.shape[1], max_batch_bytes, logits=True)
        for batch, batch_pairs in zip(tokens.split(size), pairs.split(size), strict=True):
            mixed, stream = Activation("z", layers), Activation("resid_post", last)
            with attach(model, mixed, stream):
                logits = checked_logits(model, batch, None, "an attribution")
            targets = batch[:, 1:].to(logits.device)
            directions = logit_directions(
                model, norm, stream.reading().values[0, :, :-1], logits[:, :-1], targets
            )
            weights = batch_pairs.to(directions)
            weights = weights / weights.sum(1, keepdim=True)
            directions = directions * weights.unsqueeze(-1)
            by_sequence.append(_contributions(model, layers, mixed, directions))
            right = logits[:, :-1].gather(-1, targets.unsqueeze(-1))[..., 0] - logits[:, :-1].mean(
                -1
            )
            totals.append((right * weights.to(right)).sum(1))
    values = torch.cat(by_sequence, dim=1)
    total = torch.cat(totals).mean().item()
    return LogitAttribution(
        layers, values.mean(1), standard_error(values, 1), total, values.shape[1]
    )


def repeated_sequences(
    model: nn.Module,
    tokens: Tensor | None,
    *,
    n_sequences: int,
    repeat_length: int | None,
    generator: torch.Generator | None,
    bos: Bos,
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos-1"]]:
    """The given tokens, or random ones repeated twice, and where induction predicts the next.

    Raises:
        ValueError: as `longest_stimulus`.
        ProbeError: the tokens do not fit the model, hold padding, or a sequence has no pair that
            recurs; the model predicts another vocabulary or attends to later tokens.
    """
    if attends_ahead(model):
        raise ProbeError(
            f"{type(model).__name__} attends to later tokens: it has no next-token prediction"
        )
    if tokens is None:
        stimulus, _ = longest_stimulus(
            model,
            n_sequences=n_sequences,
            repeat_length=repeat_length,
            generator=generator,
            bos=bos,
        )
        tokens = stimulus.tokens
    else:
        tokens = checked_tokens(model, tokens)
        if real_positions(model, tokens) is not None:
            raise ProbeError("sequences with padding cannot be compared position by position")
    pairs = repeated_pairs(tokens)
    if not pairs.any(1).all():
        row = int(pairs.any(1).int().argmin())
        raise ProbeError(f"no pair of tokens recurs in sequence {row}: there is nothing to predict")
    return tokens, pairs


def _contributions(
    model: nn.Module,
    layers: tuple[int, ...],
    mixed: Activation,
    directions: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "layer batch head"]:
    """`Σ_i c_i · u_i` of every head and sequence."""
    reading = mixed.reading()
    parts = []
    for layer in layers:
        z = reading.sel(layer=layer).values[:, :-1].to(directions)
        weights = output_weights(model, layer).to(directions)
        # Through W_O backwards: no tensor is larger than z.
        back = einsum(directions, weights, "batch pos model, head i model -> batch pos head i")
        parts.append(einsum(back, z, "batch pos head i, batch pos head i -> batch head"))
    return torch.stack(parts)
