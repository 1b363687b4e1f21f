"""Predictions for several parents: count what followed the query's context.

The context consists of the tokens of the query's last parents (bigram, trigram, ...); the context
of all parents gives the Bayes predictor.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.tasks import SeveralParentsTask
from mechcausal.tasks.priors import DirichletPrior


def context_prediction(
    task: SeveralParentsTask, tokens: Int[Tensor, "batch pos"], *, n_nearest: int
) -> Float[Tensor, "batch vocab"]:
    """The next token's distribution from the query's last `n_nearest` parents alone.

    `(alpha'_s + N(s)) / sum_s (alpha'_s + N(s))`. N(s) counts the positions that hold s, have k
    parents like the query, and whose last `n_nearest` parents hold the same tokens as the query's.
    For `n_nearest` = k, alpha' is the prior's alpha and this is the Bayes predictor. Otherwise the
    target is modelled as the mean of n = S^(k - n_nearest) rows: alpha' is proportional to alpha,
    and its sum n (A + 1) - 1, with A = sum alpha, matches the variance of that mean. For a fixed
    matrix, the prediction is its row.

    Raises:
        ValueError: `n_nearest` is not from 1 to k.
    """
    k = len(task.query_parents)
    if not 1 <= n_nearest <= k:
        raise ValueError(f"n_nearest is {n_nearest}: allowed are 1 to {k}, the query's parents")
    prior = task.prior
    if not isinstance(prior, DirichletPrior):
        matrix = torch.tensor(prior.rows, device=tokens.device)
        return matrix[tokens[:, task.query_parents[0]]]
    counts = task.context_counts(tokens, n_nearest=n_nearest)
    return _posterior_mean(counts, prior, n_rows=float(task.vocab_size) ** (k - n_nearest))


def _posterior_mean(counts: Tensor, prior: DirichletPrior, *, n_rows: float) -> Tensor:
    alpha = torch.tensor(prior.representable, device=counts.device)
    total = alpha.sum()
    weights = counts + alpha / total * (n_rows * total + (n_rows - 1))
    return weights / weights.sum(-1, keepdim=True)
