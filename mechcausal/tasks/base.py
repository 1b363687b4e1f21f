"""Batches of sequences, and the cross entropy that scores predictions."""

import math
import operator
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

AnyBatch = TypeVar("AnyBatch", bound="Batch")


@dataclass(frozen=True)
class Batch:
    """Sequences and their targets; of several runs, one after another.

    A task whose figures need more, such as a lag for every sequence, returns a subclass with
    further tensors, all of them with the batch axis first.

    Attributes:
        tokens: the sequences; in the single-parent task the last position is the query.
        target: soft labels: the distribution of the next token, or one at every position.
        transition: the matrix `pi` of every sequence, of tasks that draw one.
        scored: of labels at every position, those that count; all when absent.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class LagBatch(Batch):
        ...     lag: Int[Tensor, "batch"] | None = None
        >>> tokens, target = torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 1)
        >>> LagBatch(tokens, target, lag=torch.tensor([1, 2, 3]))[1:].lag
        tensor([2, 3])
    """

    tokens: Int[Tensor, "*runs batch pos"]
    target: Float[Tensor, "*runs batch vocab"] | Float[Tensor, "*runs batch pos vocab"]
    transition: Float[Tensor, "*runs batch vocab vocab"] | None = None
    scored: Bool[Tensor, "*runs batch pos"] | None = None

    @property
    def query(self) -> Int[Tensor, "*runs batch"]:
        """The last token of every sequence."""
        return self.tokens[..., -1]

    @property
    def labels_positions(self) -> bool:
        """Whether there is a label at every position."""
        return self.target.ndim > self.tokens.ndim

    def run(self: AnyBatch, number: int) -> AnyBatch:
        """The sequences of one run, of a batch with a leading run axis."""
        return self._indexed(number)

    def __len__(self) -> int:
        """Number of sequences, of a batch without a run axis."""
        return self.tokens.shape[0]

    def __getitem__(self: AnyBatch, rows: slice | int) -> AnyBatch:
        """A slice of the sequences, or one sequence as a batch of one.

        Raises:
            IndexError: the batch has no sequence with this index.

        Example:
            >>> batch = Batch(torch.tensor([[0], [1], [0]]), torch.full((3, 2), 0.5))
            >>> len(batch[1:]), batch[1].tokens
            (2, tensor([[1]]))
        """
        if not isinstance(rows, slice):
            first = operator.index(rows)
            if not -len(self) <= first < len(self):
                raise IndexError(f"sequence {first}: the batch has {len(self)}")
            rows = slice(first, first + 1 or None)
        return self._indexed(rows)

    def _indexed(self: AnyBatch, index: slice | int) -> AnyBatch:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        indexed = {
            name: value[index] for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **indexed)


def to_score(
    prediction: Float[Tensor, "*any vocab"],
    target: Float[Tensor, "*any vocab"],
    epsilon: float | Float[Tensor, "*ones"],
) -> Float[Tensor, "*any vocab"]:
    """The argument of the logarithm: `prediction + epsilon`, or 1 where the target is 0.

    So tokens with target 0 contribute no loss and no gradient. If the target is positive and both
    prediction and epsilon are 0, the loss is infinite.
    """
    return torch.where(target > 0, prediction + epsilon, 1.0)


def soft_cross_entropy(
    prediction: Float[Tensor, "*runs batch vocab"],
    target: Float[Tensor, "*runs batch vocab"],
    *,
    epsilon: float | Float[Tensor, "*runs"] = 0.0,
) -> Float[Tensor, "*runs"]:
    """Mean cross entropy in nats of smoothed predictions against soft labels, for each run.

    `-mean_b sum_s target_bs log((prediction_bs + epsilon) / (1 + S epsilon))`, with 0 log 0 = 0
    (see `to_score`). The division keeps the smoothed prediction a distribution, so the loss can be
    compared with the Bayes loss. It adds `log(1 + S epsilon)` to the paper's loss and changes no
    gradient.
    """
    smoothing = torch.as_tensor(epsilon, dtype=prediction.dtype, device=prediction.device)
    log_score = to_score(prediction, target, smoothing[..., None, None]).log()
    normaliser = torch.log1p(prediction.shape[-1] * smoothing)
    return normaliser - (target * log_score).sum(-1).mean(-1)


def batch_loss(
    prediction: Float[Tensor, "batch *pos vocab"], batch: Batch, *, epsilon: float = 0.0
) -> Float[Tensor, ""]:
    """`soft_cross_entropy` of predictions shaped like the batch's target, over what is scored."""
    target = batch.target
    if not batch.labels_positions:
        return soft_cross_entropy(prediction, target, epsilon=epsilon)
    return soft_cross_entropy(
        scored_rows(prediction, batch), scored_rows(target, batch), epsilon=epsilon
    )


def scored_rows(
    values: Float[Tensor, "batch *pos vocab"], batch: Batch
) -> Float[Tensor, "row vocab"]:
    """The rows of a tensor shaped like the batch's target whose labels count."""
    if batch.labels_positions and batch.scored is not None:
        return values[batch.scored]
    return values.reshape(-1, values.shape[-1])


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
    prediction, target = prediction.double(), target.double()
    normaliser = math.log1p(prediction.shape[1] * epsilon)
    return normaliser - (target * to_score(prediction, target, epsilon).log()).sum(1)


def cumulative(probabilities: Float[Tensor, "*any vocab"]) -> Float[Tensor, "*any vocab"]:
    """Cumulative sums whose last entry is exactly 1: rounding cannot push a draw past the end."""
    sums = probabilities.cumsum(-1)
    return sums / sums[..., -1:]
