"""The loss of the hand-built solution of a model's kind, with the best scales: a reference level.

Layer 1 attends from every position to its parents (roots: uniformly). Layer 2's scores are beta
times the number u of the query's context tokens that a position's parents hold:

    a^h     layer 1's pattern of head h: row i one-hot on i's h-th parent, uniform if it has none
    u_k   = sum_h sum_j a^h_kj q^h[x_j],  q^h the query's token, or what head h copies for the query
    f_s   = sum_k softmax(beta u)_k [x_k = s]

f is the simplified model's prediction, `softmax(gain f)` the disentangled one's. The solutions are
those of `set_ideal`, with the beta and gain of the lowest loss. The paper's proof leaves the rows
of roots free; they are uniform here because a root that attends to one position counts as an
example whenever that position holds the query's token.

The loss is not a lower bound: trained weights can be slightly better.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from mechcausal.graphs import CausalGraph
from mechcausal.models.base import GraphModel
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.tasks import Batch, cross_entropies

_BETAS = (0.02, 200.0)
_GAINS = (0.02, 2000.0)
_GRID = 15  # values of beta; the best is refined, since the loss may have several minima
_PRECISION = 1e-4  # absolute, in log beta and log gain
_NO_EXAMPLE = -1e4  # u of the last position if its row copies the query's parents
_MAX_ENTRIES = 4_000_000


@dataclass(frozen=True)
class Construction:
    """The hand-built solution with the best scales.

    Attributes:
        loss: cross entropy on the sequences, nats, smoothed as in training.
        beta: layer 2's score of a match.
        gain: scale of the disentangled model's readout; None for the simplified model.
    """

    loss: float
    beta: float
    gain: float | None


@torch.no_grad()
def best_construction(
    model: GraphModel, graph: CausalGraph, batch: Batch, *, epsilon: float
) -> Construction | None:
    """The hand-built solution of the model's kind on a graph, with the best beta and gain.

    Fitting one or two scales on the n sequences that measure the loss lowers it by about 1/n,
    which is much less than its standard error.

    Args:
        model: determines the kind of solution; its weights are not used.
        graph: true graph.
        batch: sequences of the graph's task.
        epsilon: smoothing of predictions.

    Returns:
        None without a hand-built solution: for standard models, and for disentangled models that
        do not have two layers or have fewer heads in layer 1 than a position has parents.

    Example:
        >>> from mechcausal.graphs import chain
        >>> model = SimplifiedTransformer(vocab_size=3, sequence_length=6)
        >>> tokens = torch.tensor([[2, 0, 1, 0, 1, 0]])  # 0 is followed by 1, twice
        >>> batch = Batch(tokens, torch.tensor([[0.0, 1.0, 0.0]]))
        >>> solution = best_construction(model, chain(5), batch, epsilon=1e-3)
        >>> round(solution.loss, 3), solution.beta > 20
        (0.002, True)
    """
    readout = isinstance(model, DisentangledTransformer)
    if isinstance(model, DisentangledTransformer):
        if len(model.heads) != 2 or model.heads[0] < graph.max_parents:
            return None
    elif not isinstance(model, SimplifiedTransformer):
        return None
    matches = match_counts(graph, batch.tokens)

    def best_at(beta: float) -> Construction:
        share = _share(matches * beta, batch)
        if not readout:
            return Construction(_loss(share, batch, epsilon), beta, None)

        def loss(gain: float) -> float:
            return _loss((gain * share).softmax(-1), batch, epsilon)

        gain = _minimised(loss, *_GAINS)
        return Construction(loss(gain), beta, gain)

    grid = np.geomspace(*_BETAS, _GRID).tolist()
    losses = [best_at(beta).loss for beta in grid]
    lowest = int(np.argmin(losses))
    low, high = grid[max(lowest - 1, 0)], grid[min(lowest + 1, _GRID - 1)]
    refined = best_at(_minimised(lambda beta: best_at(beta).loss, low, high))
    return min((refined, best_at(grid[lowest])), key=lambda solution: solution.loss)


def match_counts(
    graph: CausalGraph, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """u of the module's equations: layer 2's scores of the query at beta = 1.

    If the graph has query parents, the last row copies these and does not count as an example.
    """
    several = graph.query_parents is not None
    vocab = int(tokens.max()) + 1
    total = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    for head in range(max(1, graph.max_parents)):
        pattern = _layer1_pattern(graph, head).to(tokens.device)
        if several:
            context = total.new_zeros(len(tokens), vocab)
            context.scatter_add_(1, tokens, pattern[-1].expand(tokens.shape))
        else:
            context = F.one_hot(tokens[:, -1], vocab).to(total.dtype)
        total += context.gather(1, tokens) @ pattern.T
    if several:
        total[:, -1] = _NO_EXAMPLE
    return total


def _layer1_pattern(graph: CausalGraph, head: int) -> Float[Tensor, "query key"]:
    length = graph.sequence_length
    pattern = torch.ones(length, length, dtype=torch.float64).tril()
    pattern /= pattern.sum(1, keepdim=True)
    rows = list(graph.parents)
    if graph.query_parents is not None:
        rows[-1] = graph.query_parents
    for position, parents in enumerate(rows):
        if head < len(parents):
            pattern[position] = 0
            pattern[position, parents[head]] = 1
    return pattern


def _share(scores: Float[Tensor, "batch pos"], batch: Batch) -> Float[Tensor, "batch vocab"]:
    """The attention on each token; computed in parts to limit memory."""
    share = scores.new_zeros(batch.target.shape)
    rows = max(1, _MAX_ENTRIES // scores.shape[1])
    for part, sums, tokens in zip(
        scores.split(rows), share.split(rows), batch.tokens.split(rows), strict=True
    ):
        sums.scatter_add_(1, tokens, part.softmax(-1))
    return share


def _loss(prediction: Float[Tensor, "batch vocab"], batch: Batch, epsilon: float) -> float:
    return cross_entropies(prediction, batch.target, epsilon=epsilon).mean().item()


def _minimised(loss: Callable[[float], float], low: float, high: float) -> float:
    """Minimise a loss over one positive number, on a logarithmic scale."""
    result = minimize_scalar(
        lambda log: loss(math.exp(log)),
        bounds=(math.log(low), math.log(high)),
        method="bounded",
        options={"xatol": _PRECISION},
    )
    return math.exp(float(result.x))
