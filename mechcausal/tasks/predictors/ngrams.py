"""What counting a text alone predicts: n-gram models, to compare a language model with."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

STRENGTH = 5.0
"""How many observations the shorter context counts for."""
_MAX_ENTRIES = 16_000_000


class NGrams:
    """N-gram models fitted to a text, from unigram to `order`.

    Each order is interpolated with the one below, with `κ = STRENGTH` and add-one smoothing at the
    bottom, where c counts n-grams in the training parts and h is the n - 1 tokens before b:

        p_n(b | h) = (c(h, b) + κ p_{n-1}(b | h without its first token)) / (c(h) + κ)
        p_1(b) = (c(b) + 1) / (N + V)

    Where a window holds fewer than n - 1 tokens before, they use those.

    Args:
        training: tokens in [0, vocab_size).
        vocab_size: V; the tables have V^order entries.
        order: largest n.
        stride: distance between the tokens of an n-gram; 2 for interleaved text.

    Source:
        MacKay and Peto 1995, "A hierarchical Dirichlet language model".

    Example:
        >>> alternating = torch.arange(200).view(1, -1) % 2
        >>> models = NGrams(alternating, 2)
        >>> [round(loss, 1) for loss in models.losses(alternating).tolist()]
        [0.7, 0.0, 0.0]
        >>> models.predictions(alternating[:, :4])[1, 0].round(decimals=1)
        tensor([[0., 1.],
                [1., 0.],
                [0., 1.]], dtype=torch.float64)
    """

    def __init__(
        self,
        training: Int[Tensor, "part pos"],
        vocab_size: int,
        *,
        order: int = 3,
        stride: int = 1,
    ) -> None:
        self._vocab_size, self._stride = vocab_size, stride
        self._counts = _counts(training, vocab_size, order, stride)

    def losses(self, windows: Int[Tensor, "window window_pos"]) -> Float[Tensor, "order"]:
        """Mean losses, in nats, by n - 1; on every token of the windows but each one's first."""
        order, target = len(self._counts), windows[:, 1:, None].long()
        losses = torch.zeros(order, dtype=torch.float64, device=windows.device)
        rows = max(1, _MAX_ENTRIES // (order * windows.shape[1] * self._vocab_size))
        for part, next_token in zip(windows.split(rows), target.split(rows), strict=True):
            probability = self.predictions(part).gather(-1, next_token.expand(order, -1, -1, -1))
            losses -= probability.log().sum((1, 2, 3))
        return losses / target.numel()

    def predictions(
        self, windows: Int[Tensor, "window window_pos"]
    ) -> Float[Tensor, "order window window_pos-1 vocab"]:
        """The distributions that the models predict of every token but a window's first."""
        frequency = self._counts[0] + 1
        unigram = (frequency / frequency.sum()).expand(*windows[:, 1:].shape, -1)
        predictions = [unigram]
        for n, counts in enumerate(self._counts[1:], start=2):
            start = (n - 1) * self._stride - 1  # the first prediction with n - 1 tokens before
            below = predictions[-1]
            context = _codes(windows[:, : -self._stride], n - 1, self._stride, self._vocab_size)
            seen = counts[context]
            above = (seen + STRENGTH * below[:, start:]) / (seen.sum(-1, keepdim=True) + STRENGTH)
            predictions.append(torch.cat([below[:, :start], above], 1))
        return torch.stack(predictions)


def _counts(
    training: Int[Tensor, "part pos"], vocab_size: int, order: int, stride: int
) -> list[Float[Tensor, "context vocab"]]:
    """How often each token follows each context, for n from 1 to `order`."""
    codes = (_codes(training, n, stride, vocab_size).flatten() for n in range(1, order + 1))
    return [
        code.bincount(minlength=vocab_size**n).double().view(-1, vocab_size)
        for n, code in enumerate(codes, start=1)
    ]


def _codes(
    tokens: Int[Tensor, "row pos"], n: int, stride: int, vocab_size: int
) -> Int[Tensor, "row ngram"]:
    """Every n-gram of every row as a number in base V, whose last digit is the last token."""
    length = max(0, tokens.shape[1] - (n - 1) * stride)
    code = torch.zeros(len(tokens), length, dtype=torch.long, device=tokens.device)
    for i in range(n):
        code = code * vocab_size + tokens[:, i * stride : i * stride + length]
    return code
