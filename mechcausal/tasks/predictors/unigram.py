"""The unigram strategy: predict the smoothed token frequencies of the context.

How informative the frequencies are depends on the graph, the prior and the length. So the
smoothing is fitted once per task, on sequences drawn from it.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.tasks import GraphTask, SeveralParentsTask, SingleParentTask
from mechcausal.tasks.predictors.several_parents import context_prediction
from mechcausal.tasks.priors import DirichletPrior, FixedTransition

_MOST_DRAWS, _FEWEST_DRAWS = 1000, 200
_MAX_ENTRIES = 1_000_000  # entries of matrices and position pairs; _FEWEST_DRAWS takes precedence
_TOTALS = (1e-6, 1e12)
_BISECTIONS = 50


def unigram_prediction(
    task: GraphTask, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch vocab"]:
    """Smoothed frequencies of the context's tokens.

    `(A m_s + N(s)) / (A + N)`, where N(s) counts the token s in the context, N is the number of
    tokens in the context, m the prior's mean and A = `smoothing_total`. On average its loss is at
    most that of m, and so at most that of uniform. For a fixed matrix: the mean of the target,
    because frequencies add no information.

    Args:
        task: graph and prior.
        tokens: sequences; the single-parent task's query does not count as context.
    """
    if isinstance(task.prior, FixedTransition):
        return _mean_row(task).to(tokens.device, torch.float32).expand(tokens.shape[0], -1)
    counts = _counts(task, tokens)
    weights = counts + smoothing_total(task) * _prior_mean(task).to(counts)
    return weights / weights.sum(-1, keepdim=True)


@lru_cache(maxsize=64)
def smoothing_total(task: GraphTask) -> float:
    """The A of `unigram_prediction` with the smallest mean cross entropy under the task.

    The mean is over sequences from a generator with a fixed seed, so every run gets the same A.
    The loss is convex in `N / (N + A)`, so bisection finds the minimum.

    Example:
        >>> from mechcausal.graphs import chain
        >>> from mechcausal.tasks.priors import DirichletPrior
        >>> task = SingleParentTask(chain(19), DirichletPrior.symmetric(0.1, vocab_size=10))
        >>> 30 < smoothing_total(task) < 50  # S alpha would be 1
        True
    """
    size = task.vocab_size**2 + task.sequence_length**2
    n_draws = min(_MOST_DRAWS, max(_FEWEST_DRAWS, _MAX_ENTRIES // size))
    batch = task.sample(n_draws, generator=torch.Generator().manual_seed(0))
    # Replace the target by its conditional mean: the best A is the same, with less noise.
    if isinstance(task, SeveralParentsTask):
        n_nearest = len(task.query_parents)
        target = context_prediction(task, batch.tokens, n_nearest=n_nearest).double()
    else:
        assert batch.transition is not None  # the query is uniform
        target = batch.transition.double().mean(1)
    counts = _counts(task, batch.tokens).double()
    n, mean = float(counts[0].sum()), _prior_mean(task)
    change = counts / n - mean
    low, high = _TOTALS
    for _ in range(_BISECTIONS):
        total = math.sqrt(low * high)
        share = n / (n + total)
        if (
            target * change / (mean + share * change)
        ).sum() > 0:  # more weight on the frequencies helps
            high = total
        else:
            low = total
    return math.sqrt(low * high)


def _counts(task: GraphTask, tokens: Tensor) -> Float[Tensor, "batch vocab"]:
    context = tokens[:, :-1] if isinstance(task, SingleParentTask) else tokens
    counts = torch.zeros(tokens.shape[0], task.vocab_size, device=tokens.device)
    return counts.scatter_add_(1, context, torch.ones_like(context, dtype=counts.dtype))


def _prior_mean(task: GraphTask) -> Float[Tensor, "vocab"]:
    if not isinstance(task.prior, DirichletPrior):
        generator = torch.Generator().manual_seed(0)
        drawn = task.prior.sample(_MOST_DRAWS, generator=generator, dtype=torch.float64)
        return drawn.mean((0, 1))
    alpha = torch.tensor(task.prior.representable, dtype=torch.float64)
    return alpha / alpha.sum()


def _mean_row(task: GraphTask) -> Float[Tensor, "vocab"]:
    """The mean target for a fixed matrix: over a uniform query, or over the query's parent."""
    assert isinstance(task.prior, FixedTransition)
    matrix = torch.tensor(task.prior.rows, dtype=torch.float64)
    steps = 1
    if isinstance(task, SeveralParentsTask):  # roots are uniform
        steps += task.graph.depths[task.query_parents[0]]
    return matrix.new_full((len(matrix),), 1 / len(matrix)) @ matrix.matrix_power(steps)
