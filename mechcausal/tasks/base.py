"""What every task gives and how predictions are scored: batches and the cross entropy."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences with what generated them.

    Attributes:
        tokens: the sequences; in the single-parent task the last position is the query.
        target: soft label, the distribution of the token to be predicted.
        transition: the matrix `pi` of every sequence; None in tasks with several parents, where it
            is integrated out.
    """

    tokens: Int[Tensor, "batch pos"]
    target: Float[Tensor, "batch vocab"]
    transition: Float[Tensor, "batch vocab vocab"] | None = None

    @property
    def query(self) -> Int[Tensor, "batch"]:
        """The last token of every sequence."""
        return self.tokens[:, -1]

    def __len__(self) -> int:
        """Number of sequences."""
        return self.tokens.shape[0]

    def __getitem__(self, rows: slice) -> "Batch":
        """Some of the sequences.

        Example:
            >>> batch = Batch(torch.tensor([[0], [1], [0]]), torch.full((3, 2), 0.5))
            >>> len(batch[1:])
            2
        """
        transition = None if self.transition is None else self.transition[rows]
        return Batch(self.tokens[rows], self.target[rows], transition)


def soft_cross_entropy(
    prediction: Float[Tensor, "batch vocab"],
    target: Float[Tensor, "batch vocab"],
    *,
    epsilon: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean cross entropy in nats of smoothed predictions against soft labels.

    `-mean_b sum_s target_bs log((prediction_bs + epsilon) / (1 + S epsilon))`. The division makes
    the smoothed prediction a distribution again, so that losses stay comparable with the Bayes
    loss; it adds the constant `log(1 + S epsilon)` to the paper's loss and changes no gradient.
    """
    normaliser = math.log1p(prediction.shape[-1] * epsilon)
    return normaliser - (target * (prediction + epsilon).log()).sum(-1).mean()


def cross_entropies(
    prediction: Float[Tensor, "batch vocab"],
    target: Float[Tensor, "batch vocab"],
    *,
    epsilon: float = 0.0,
) -> Float[Tensor, "batch"]:
    """`soft_cross_entropy` of each sequence, in float64 and nats; 0 log 0 = 0.

    The cross entropy of a row with itself is therefore its entropy.

    Example:
        >>> row = torch.tensor([[0.5, 0.5, 0.0]])
        >>> round(cross_entropies(row, row).item(), 6)
        0.693147
    """
    smoothed = prediction.double() + epsilon
    normaliser = math.log1p(prediction.shape[1] * epsilon)
    products: Tensor = torch.special.xlogy(target.double(), smoothed)
    return normaliser - products.sum(1)


def cumulative(probabilities: Float[Tensor, "*any vocab"]) -> Float[Tensor, "*any vocab"]:
    """Cumulative sums, the last entry exactly 1: rounding never lets a draw fall behind the end."""
    sums = probabilities.cumsum(-1)
    return sums / sums[..., -1:]
