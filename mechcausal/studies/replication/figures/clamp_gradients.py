"""The first gradient on the size of A2, with layer 1 clamped, against theory.

With layer 1's pattern P, A2 = beta I and beta -> 0, to leading order in 1/T,

    -dL/dbeta = 1 / (S T) sum_ij P_ij g_ij.

Terms of the next order are about the same for every P, so that they cancel in differences.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.tasks import Batch, SingleParentTask, cross_entropies
from mechcausal.theory import PairwiseTheory
from mechcausal.training.experiments.clamping import rows_as_pattern
from probes import fixed_to

Rows = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Descent:
    """`-dL/dbeta` at the start of training.

    Attributes:
        ours: of every sequence.
        theory: the leading order.
    """

    ours: Float[Tensor, "batch"]
    theory: float


def descent(
    task: SingleParentTask,
    theory: PairwiseTheory,
    batch: Batch,
    rows: Rows,
    *,
    beta0: float,
    epsilon: float,
) -> Descent:
    """`-dL/dbeta` at A1 = 0 and A2 = beta0 I, in float64.

    Args:
        task: the task.
        theory: of its graph and prior.
        batch: its sequences.
        rows: the keys at which rows of layer 1 are clamped; empty for a free layer 1.
        beta0: where the gradient is taken.
        epsilon: smoothing of predictions.
    """
    length, n = task.sequence_length, task.graph.n_positions
    model = SimplifiedTransformer(task.vocab_size, length)
    model.hooked.double()
    with model.clamped({0: fixed_to(rows_as_pattern(rows, length))}), torch.no_grad():
        attention1 = model.attention1()
    same = (batch.tokens == batch.tokens[:, -1:]).double()
    beta = torch.full((len(batch), 1), beta0, dtype=torch.float64, requires_grad=True)
    attention2 = (beta * (same @ attention1.T)).softmax(-1)
    output = attention2.new_zeros(batch.target.shape).scatter_add(1, batch.tokens, attention2)
    losses = cross_entropies(output, batch.target.double(), epsilon=epsilon)
    (gradient,) = torch.autograd.grad(losses.sum(), beta)
    expected = (attention1[:n, :n] * theory.g).sum().item() / (task.vocab_size * length)
    return Descent(-gradient.squeeze(1), expected)


def ratio(over: Descent, under: Descent) -> tuple[float, float, float]:
    """The ratio of the means over sequences, its standard error (delta method), and theory's.

    Example:
        >>> half = Descent(torch.tensor([1.0, 2.0]), 1.0)
        >>> ratio(half, Descent(2 * half.ours, 3.0))
        (0.5, 0.0, 0.3333333333333333)
    """
    ours = over.ours.mean() / under.ours.mean()
    spread = (over.ours - ours * under.ours).std() / under.ours.mean().abs()
    stderr = spread / len(over.ours) ** 0.5
    return ours.item(), stderr.item(), over.theory / under.theory


def minus(left: Descent, right: Descent) -> Descent:
    """The difference of two, on the same sequences."""
    return Descent(left.ours - right.ours, left.theory - right.theory)
