"""How much lower the loss is when a sequence repeats: loss by position."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from probes.heads.stimuli import Bos, longest_stimulus
from probes.heads.token_sources import TokenSource
from probes.reading.labelled import standard_error
from probes.reading.padding import pairs_of
from probes.reading.passes import MAX_BATCH_BYTES, token_losses


@dataclass(frozen=True, eq=False)
class PositionLoss:
    """Loss of the next token along random tokens repeated twice, `[bos] r r`, in nats.

    Attributes:
        loss: mean over sequences of `-log p(t[i+1] | t[0..i])`, `[pos - 1]`.
        stderr: its standard error (NaN for one sequence), `[pos - 1]`.
        repeat_length: tokens R in the block.
        first_copy: the position at which r first begins (1 with a BOS, else 0).
        in_context_gain: mean loss in the first copy minus mean loss in the second, each over the
            R - 1 tokens that follow another token of the same copy.
        in_context_gain_stderr: its standard error, paired over sequences (NaN for one).
    """

    loss: Float[Tensor, "pos"]
    stderr: Float[Tensor, "pos"]
    repeat_length: int
    first_copy: int
    in_context_gain: float
    in_context_gain_stderr: float


def loss_by_position(
    model: nn.Module,
    *,
    n_sequences: int = 32,
    repeat_length: int | None = None,
    generator: torch.Generator | None = None,
    max_batch_bytes: int = MAX_BATCH_BYTES,
    bos: Bos = "auto",
    source: TokenSource | None = None,
) -> PositionLoss:
    """Mean next-token loss by position on random tokens repeated twice.

    Without in-context copying, the loss stays at `log d_vocab` or above at every position. With an
    induction circuit, it drops at the second token of the second copy.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        n_sequences: sequences to average over.
        repeat_length: tokens in the block, at least 3; None for the longest that fits, at most 50.
        generator: the source of randomness; None for a new one with seed 0.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.
        bos: token at the start: a token, None, or "auto" for the tokenizer's BOS.
        source: where the blocks come from; None for uniformly random ids.

    Returns:
        Losses in nats by position, and the gain.

    Raises:
        ValueError: `n_sequences` or `repeat_length` is too small.
        ProbeError: the context is too short for two repeats, or the model predicts another
            vocabulary than it reads, or attends to later tokens.

    Source:
        Olsson et al. 2022, "In-context Learning and Induction Heads".

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 1, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu", "seed": 0})
    >>> reading = loss_by_position(model)
    >>> reading.repeat_length, reading.loss.shape, abs(reading.in_context_gain) < 0.1
    (4, torch.Size([7]), True)
    """
    stimulus, repeat_length = longest_stimulus(
        model,
        n_sequences=n_sequences,
        repeat_length=repeat_length,
        generator=generator,
        bos=bos,
        source=source,
    )
    losses = token_losses(
        model,
        stimulus.tokens,
        attention_mask=torch.ones_like(stimulus.tokens),  # random tokens have no padding
        max_batch_bytes=max_batch_bytes,
    )
    first = stimulus.tokens.shape[1] - 2 * repeat_length
    copies = losses[:, first : first + 2 * repeat_length - 1]
    gain = copies[:, : repeat_length - 1].mean(1) - copies[:, repeat_length:].mean(1)
    return PositionLoss(
        loss=losses.mean(0),
        stderr=standard_error(losses),
        repeat_length=repeat_length,
        first_copy=first,
        in_context_gain=gain.mean().item(),
        in_context_gain_stderr=standard_error(gain).item(),
    )


def repeated_pairs(
    tokens: Int[Tensor, "batch pos"], attention_mask: Shaped[Tensor, "batch pos"] | None = None
) -> Bool[Tensor, "batch pos-1"]:
    """True where the pair of this token and the next occurred before: induction predicts it.

    `∃ k < i: t[k] = t[i], t[k+1] = t[i+1]` at index i. In a block of different tokens repeated
    twice, these are the predictions of the second copy's tokens after its first. Pairs with
    padding, where the attention mask is 0, do not count.

    >>> repeated_pairs(torch.tensor([[5, 6, 7, 5, 6, 7]]))
    tensor([[False, False, False,  True,  True]])
    """
    now, following = tokens[:, :-1], tokens[:, 1:]
    same = (now[:, :, None] == now[:, None, :]) & (following[:, :, None] == following[:, None, :])
    if attention_mask is not None:
        real = attention_mask.bool()
        same = same & pairs_of(real[:, :-1] & real[:, 1:])
    return same.tril(-1).any(-1)


@dataclass(frozen=True)
class InContextScore:
    """How much better a model predicts late in a sequence than early.

    Attributes:
        score: loss at position `late` minus loss at position `early`, nats; below 0 if the model
            learns from context.
        stderr: its standard error, paired over sequences (NaN for one).
        early_loss: mean loss of the token at position `early`, nats.
        late_loss: mean loss of the token at position `late`, nats.
        n_sequences: sequences with text at both positions.
    """

    score: float
    stderr: float
    early_loss: float
    late_loss: float
    n_sequences: int


def in_context_score(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    *,
    early: int = 50,
    late: int = 500,
    attention_mask: Shaped[Tensor, "batch mask_pos"] | None = None,
    max_batch_bytes: int = MAX_BATCH_BYTES,
) -> InContextScore:
    """The loss of the token at position `late` minus that at position `early`, on given data.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        tokens: sequences of more than `late` tokens.
        early: a position, at least 1 (the first token is not predicted).
        late: a later position.
        attention_mask: 0 at padding; None to find padding by the tokenizer's PAD token.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.

    Raises:
        ValueError: positions outside the sequences, or no sequence has text at both.
        ProbeError: as `loss_by_position`.

    Source:
        Olsson et al. 2022, "In-context Learning and Induction Heads", with positions 50 and 500.

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 1, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu", "seed": 0})
    >>> in_context_score(model, torch.randint(20, (16, 8)), early=1, late=7).n_sequences
    16
    """
    pos = tokens.shape[-1]
    if not 1 <= early < late < pos:
        raise ValueError(
            f"early is {early} and late is {late}; in sequences of {pos} tokens they must satisfy "
            f"1 <= early < late <= {pos - 1}"
        )
    losses = token_losses(
        model, tokens, attention_mask=attention_mask, max_batch_bytes=max_batch_bytes
    ).double()
    pair = losses[:, [early - 1, late - 1]]
    pair = pair[~pair.isnan().any(1)]
    if not len(pair):
        raise ValueError(f"no sequence has text at both positions {early} and {late}")
    difference = pair[:, 1] - pair[:, 0]
    return InContextScore(
        score=difference.mean().item(),
        stderr=standard_error(difference).item(),
        early_loss=pair[:, 0].mean().item(),
        late_loss=pair[:, 1].mean().item(),
        n_sequences=len(pair),
    )
