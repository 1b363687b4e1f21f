"""Random tokens, repeated: the stimulus that identifies induction heads."""

import torch
from jaxtyping import Int
from torch import Tensor


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
