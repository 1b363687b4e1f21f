"""Stimuli for head scores: blocks of tokens repeated twice, and controls that do not repeat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from probes.heads.token_sources import TokenSource
from probes.reading.errors import ProbeError
from probes.reading.hook_names import config_of
from probes.reading.padding import real_positions
from probes.reading.passes import checked_tokens, device_of

Bos: TypeAlias = Literal["auto"] | int | None
"""The token at the start of a sequence: a token, None for none, "auto" for the tokenizer's BOS."""

SHORTEST, LONGEST = 3, 50
"""Limits of the repeat length. With 2, an induction head attends to the previous token."""


def repeated_tokens(
    batch: int,
    repeat_length: int,
    vocab_size: int,
    *,
    generator: torch.Generator,
    n_repeats: int = 2,
    bos: int | None = None,
) -> Int[Tensor, "batch pos"]:
    """Sequences `[bos] r r ... r` of a random block r of tokens, drawn anew for each sequence.

    If the vocabulary is large enough, no token occurs twice in a block: with two repeats, every
    token of the second has exactly one earlier occurrence. From a smaller vocabulary, tokens are
    drawn with replacement. `bos` is never drawn. Cost: batch · vocab_size random numbers.

    Args:
        batch: number of sequences.
        repeat_length: tokens in the block.
        vocab_size: tokens are drawn uniformly from 0 to vocab_size - 1.
        generator: the source of randomness; its device is the result's device.
        n_repeats: how often the block occurs.
        bos: token at the start of every sequence, if any.

    Returns:
        Tokens of shape `[batch, n_repeats · repeat_length (+ 1 with bos)]`.

    Raises:
        ValueError: a size is not positive, or there is no token to draw.

    Source:
        Olsson et al. 2022, "In-context Learning and Induction Heads".

    >>> tokens = repeated_tokens(2, 3, 50, generator=torch.Generator().manual_seed(0), bos=7)
    >>> tokens.shape, bool((tokens[:, 1:4] == tokens[:, 4:]).all())
    (torch.Size([2, 7]), True)
    """
    sizes = {
        "batch": batch,
        "repeat_length": repeat_length,
        "vocab_size": vocab_size,
        "n_repeats": n_repeats,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    weights = torch.ones(vocab_size, device=generator.device)
    if bos is not None and 0 <= bos < vocab_size:
        weights[bos] = 0
    n_drawable = int(weights.sum())
    if n_drawable == 0:
        raise ValueError(f"vocab_size is {vocab_size}: without bos {bos} no token remains")
    block = torch.multinomial(
        weights.expand(batch, -1),
        repeat_length,
        replacement=repeat_length > n_drawable,
        generator=generator,
    )
    tokens = block.repeat(1, n_repeats)
    return tokens if bos is None else torch.nn.functional.pad(tokens, (1, 0), value=bos)


@dataclass(frozen=True, eq=False)
class Stimulus:
    """Sequences of one length, each with a control.

    Attributes:
        tokens: sequences in which tokens recur.
        control: random tokens, all different if the vocabulary is large enough; same padding.
        real: False at padding; None if there is no padding.
    """

    tokens: Int[Tensor, "batch pos"]
    control: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"] | None = None


def bos_token(model: nn.Module, bos: Bos = "auto") -> int | None:
    """The token at the start of a sequence, or None.

    With "auto": None if the config has `default_prepend_bos=False`; else the tokenizer's BOS, or
    without a tokenizer the BOS in a bridge's Hugging Face config; None if that token is not in the
    model's vocabulary.

    Raises:
        ProbeError: `bos` is a token outside the vocabulary.
    """
    config = config_of(model)
    if bos != "auto":
        if bos is not None and not 0 <= bos < config.d_vocab:
            raise ProbeError(f"bos is {bos}, the vocabulary runs from 0 to {config.d_vocab - 1}")
        return bos
    if not getattr(config, "default_prepend_bos", True):
        return None
    source: Any = getattr(model, "tokenizer", None)
    if source is None:
        source = getattr(getattr(model, "original_model", None), "config", None)
    token = getattr(source, "bos_token_id", None)
    return token if isinstance(token, int) and 0 <= token < config.d_vocab else None


def fitting_repeat_lengths(n_ctx: int, vocab_size: int, bos: int | None = None) -> tuple[int, ...]:
    """About five different repeat lengths R, from short to the longest that fits.

    `2R (+1 with BOS) <= n_ctx` and `3 <= R <= 50`. In a vocabulary of at least six tokens also
    `2R <= vocab_size`, without the BOS, so that a control needs no token twice.

    Raises:
        ProbeError: the context cannot hold two repeats of three tokens.

    >>> fitting_repeat_lengths(1024, 50257, bos=50256)
    (10, 20, 30, 40, 50)
    >>> fitting_repeat_lengths(16, 100)
    (3, 4, 6, 7, 8)
    """
    _check_context(n_ctx, SHORTEST, bos)
    drawable = vocab_size - (bos is not None)
    fitting = (n_ctx - (bos is not None)) // 2
    longest = min(LONGEST, fitting, max(SHORTEST, drawable // 2))
    shortest = max(SHORTEST, longest // 5)
    return tuple(sorted({round(shortest + (longest - shortest) * i / 4) for i in range(5)}))


def draw_stimuli(
    model: nn.Module,
    *,
    n_sequences: int,
    repeat_lengths: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    bos: Bos = "auto",
    source: TokenSource | None = None,
) -> list[Stimulus]:
    """Blocks repeated twice, `[bos] r r`, of several repeat lengths, each with a control.

    Sequence i has the repeat length `repeat_lengths[i mod n]`.

    Args:
        model: a HookedTransformer or TransformerBridge.
        n_sequences: number of repeated sequences over all lengths; the controls are as many.
        repeat_lengths: tokens in the block; None for `fitting_repeat_lengths`.
        generator: the source of randomness; None for a new one with seed 0.
        bos: token at the start.
        source: where the blocks and the controls come from; None for uniformly random ids.

    Returns:
        One stimulus per repeat length, on the model's device.

    Raises:
        ValueError: `n_sequences` or a repeat length is too small, or a text is too short.
        ProbeError: the context is too short, or the BOS or a token of the source is outside the
            vocabulary.
    """
    if n_sequences < 1:
        raise ValueError(f"n_sequences is {n_sequences}; it must be at least 1")
    config = config_of(model)
    front = bos_token(model, bos)
    lengths = (
        fitting_repeat_lengths(config.n_ctx, config.d_vocab, front)
        if repeat_lengths is None
        else _checked_lengths(repeat_lengths, config.n_ctx, front)
    )
    random = torch.Generator().manual_seed(0) if generator is None else generator
    stimuli = []
    for index, length in enumerate(lengths):
        batch = len(range(index, n_sequences, len(lengths)))
        if batch and source is not None:
            stimuli.append(_from_source(model, source, batch, length, random, front))
        elif batch:
            tokens = repeated_tokens(batch, length, config.d_vocab, generator=random, bos=front)
            stimuli.append(_with_control(model, tokens, random, front))
    return stimuli


def longest_stimulus(
    model: nn.Module,
    *,
    n_sequences: int,
    repeat_length: int | None = None,
    generator: torch.Generator | None = None,
    bos: Bos = "auto",
    source: TokenSource | None = None,
) -> tuple[Stimulus, int]:
    """A stimulus of one repeat length, by default the longest that fits, and that length.

    Raises:
        ValueError, ProbeError: as `draw_stimuli`.
    """
    if repeat_length is None:
        config = config_of(model)
        front = bos_token(model, bos)
        repeat_length = fitting_repeat_lengths(config.n_ctx, config.d_vocab, front)[-1]
    (stimulus,) = draw_stimuli(
        model,
        n_sequences=n_sequences,
        repeat_lengths=(repeat_length,),
        generator=generator,
        bos=bos,
        source=source,
    )
    return stimulus, repeat_length


def given_stimuli(
    model: nn.Module,
    tokens: Tensor,
    *,
    attention_mask: Shaped[Tensor, "batch mask_pos"] | None = None,
    generator: torch.Generator | None = None,
) -> list[Stimulus]:
    """The user's tokens, with a control of random tokens of the same shape and padding.

    The control keeps the first token if all sequences share it, or if the only sequence starts
    with the model's BOS.

    Raises:
        ValueError: the tokens are not integers `[batch, pos]`, or the mask differs in shape.
        ProbeError: a token outside the vocabulary, or a sequence longer than the context.
    """
    tokens = checked_tokens(model, tokens)
    real = real_positions(model, tokens, attention_mask)
    starts = tokens[:, 0] if real is None else tokens.gather(1, real.int().argmax(1, keepdim=True))
    first = int(starts.flatten()[0])
    shared = bool((starts == first).all()) and (len(tokens) > 1 or first == bos_token(model))
    source = torch.Generator().manual_seed(0) if generator is None else generator
    return [_with_control(model, tokens, source, first if shared else None, real)]


def _from_source(
    model: nn.Module,
    source: TokenSource,
    batch: int,
    length: int,
    generator: torch.Generator,
    front: int | None,
) -> Stimulus:
    block = source.draw(batch, length, generator)
    sides = [block.repeat(1, 2), source.draw(batch, 2 * length, generator)]
    if front is not None:
        sides = [torch.nn.functional.pad(side, (1, 0), value=front) for side in sides]
    return Stimulus(*(checked_tokens(model, side) for side in sides))


def _with_control(
    model: nn.Module,
    tokens: Tensor,
    generator: torch.Generator,
    front: int | None,
    real: Tensor | None = None,
) -> Stimulus:
    batch, longest = tokens.shape
    if real is not None:
        longest = max(1, int(real.sum(1).max()))
    config: Any = model.cfg
    drawn = max(1, longest - (front is not None))
    control = repeated_tokens(
        batch, drawn, config.d_vocab, generator=generator, n_repeats=1, bos=front
    )[:, :longest]
    device = device_of(model)
    tokens, control = tokens.to(device), control.to(device)
    if real is not None:
        # The n-th position of text gets the n-th random token.
        text_index = (real.cumsum(1) - 1).clamp(0, longest - 1)
        control = torch.where(real, control.gather(1, text_index), tokens)
    return Stimulus(tokens, control, real)


def _checked_lengths(lengths: Sequence[int], n_ctx: int, bos: int | None) -> tuple[int, ...]:
    distinct = tuple(dict.fromkeys(lengths))
    if not distinct or min(distinct) < SHORTEST:
        raise ValueError(
            f"repeat_lengths are {list(lengths)}; each must be at least {SHORTEST}, or induction "
            "cannot be told from attention to the previous token"
        )
    _check_context(n_ctx, max(distinct), bos)
    return distinct


def _check_context(n_ctx: int, repeat_length: int, bos: int | None) -> None:
    needed = 2 * repeat_length + (bos is not None)
    if needed > n_ctx:
        raise ProbeError(
            f"a context of {n_ctx} is too short for two repeats of {repeat_length} tokens: "
            f"{needed} positions are needed"
        )
