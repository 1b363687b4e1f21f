"""What counting a text alone predicts: n-gram models, to compare a language model with."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

STRENGTH = 5.0
"""How many observations the shorter context counts for."""


def ngram_losses(
    training: Int[Tensor, "part pos"],
    windows: Int[Tensor, "window window_pos"],
    vocab_size: int,
    *,
    order: int = 3,
    stride: int = 1,
) -> Float[Tensor, "order"]:
    """Mean losses on `windows` of n-gram models fitted to `training`, from unigram to `order`.

    Each order is interpolated with the one below, with `κ = STRENGTH` and add-one smoothing at the
    bottom, where c counts n-grams in the training parts and h is the n - 1 tokens before b:

        p_n(b | h) = (c(h, b) + κ p_{n-1}(b | h without its first token)) / (c(h) + κ)
        p_1(b) = (c(b) + 1) / (N + V)

    All predictions are scored but that of a window's first token; where a window holds fewer than
    n - 1 tokens before, they use those.

    Args:
        training: tokens in [0, vocab_size).
        windows: held-out tokens.
        vocab_size: V; the tables have V^order entries.
        order: largest n.
        stride: distance between the tokens of an n-gram; 2 for interleaved text.

    Returns:
        Nats, by n - 1.

    Source:
        MacKay and Peto 1995, "A hierarchical Dirichlet language model".

    Example:
        >>> alternating = torch.arange(200).view(1, -1) % 2
        >>> [round(loss, 1) for loss in ngram_losses(alternating, alternating, 2).tolist()]
        [0.7, 0.0, 0.0]
    """
    frequency = training.long().flatten().bincount(minlength=vocab_size).double()
    probability = (frequency[windows[:, 1:].long()] + 1) / (frequency.sum() + vocab_size)
    losses = [-probability.log().mean()]
    for n in range(2, order + 1):
        seen, asked = (_codes(tokens, n, stride, vocab_size) for tokens in (training, windows))
        start = (n - 1) * stride - 1  # the first prediction with n - 1 tokens before
        counts = seen.flatten().bincount(minlength=vocab_size**n).double()
        of_context = counts.view(-1, vocab_size).sum(1)
        ngrams = counts[asked] + STRENGTH * probability[:, start:]
        contexts = of_context[asked // vocab_size] + STRENGTH
        probability = torch.cat([probability[:, :start], ngrams / contexts], 1)
        losses.append(-probability.log().mean())
    return torch.stack(losses)


def _codes(
    tokens: Int[Tensor, "row pos"], n: int, stride: int, vocab_size: int
) -> Int[Tensor, "row ngram"]:
    """Every n-gram of every row as a number in base V, whose last digit is the last token."""
    length = max(0, tokens.shape[1] - (n - 1) * stride)
    code = torch.zeros(len(tokens), length, dtype=torch.long, device=tokens.device)
    for i in range(n):
        code = code * vocab_size + tokens[:, i * stride : i * stride + length]
    return code
