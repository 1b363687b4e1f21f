"""The Bayes predictor of a task, and simpler strategies to compare a model with.

A model that learns in context passes through strategies: the uniform distribution, the token
frequencies of the context (unigram), and the transitions along the edges of the graph (bigram, or
longer contexts for several parents). The last one approaches or equals the Bayes predictor.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.tasks import GraphTask, SeveralParentsTask
from mechcausal.tasks.finite_prior import FinitePrior
from mechcausal.tasks.predictors import single_parent
from mechcausal.tasks.predictors.bayes_loss import BayesLoss, bayes_loss
from mechcausal.tasks.predictors.retrieval import retrieval_predictions
from mechcausal.tasks.predictors.several_parents import context_prediction
from mechcausal.tasks.predictors.single_parent import (
    bigram_prediction,
    transition_counts,
    uniform_prediction,
)
from mechcausal.tasks.predictors.unigram import unigram_prediction
from mechcausal.tasks.protocol import PriorWithPosterior


def bayes_prediction(
    task: GraphTask,
    tokens: Int[Tensor, "batch pos"],
    *,
    generator: torch.Generator,
    n_draws: int = 256,
    max_elements: int = 4_000_000,
) -> Float[Tensor, "batch vocab"]:
    """The Bayes predictor: the posterior mean of the target given the sequence.

    Several parents: exact, `(alpha_s + N(s)) / sum_s (alpha_s + N(s))`, where N(s) counts how
    often s followed the query's context at positions with the same number of parents. Single
    parent: Monte Carlo over `pi`, see `single_parent.bayes_prediction` for the arguments.
    """
    if isinstance(task, SeveralParentsTask):
        return context_prediction(task, tokens, n_nearest=len(task.query_parents))
    return single_parent.bayes_prediction(
        task, tokens, generator=generator, n_draws=n_draws, max_elements=max_elements
    )


def strategies(
    task: GraphTask, tokens: Int[Tensor, "batch pos"]
) -> dict[str, Float[Tensor, "batch vocab"]]:
    """The predictions of every strategy by name, from the least to the most informed.

    Single parent: "uniform", "unigram" and, if the prior has a `posterior_mean`, "bigram"; with a
    `FinitePrior` see `retrieval_predictions`. If the
    query has k parents: "uniform", "unigram" and, for m = 1 ... k, the context of the query's last
    m parents ("bigram", "trigram", "4gram", ...); the last one is the Bayes predictor. Averaged
    over the prior, no strategy has a larger loss than "uniform".

    Example:
        >>> from mechcausal.graphs import two_parents
        >>> from mechcausal.tasks.priors import DirichletPrior
        >>> task = SeveralParentsTask(two_parents(4), DirichletPrior.symmetric(0.1, vocab_size=2))
        >>> list(strategies(task, torch.tensor([[0, 1, 1, 0]])))
        ['uniform', 'unigram', 'bigram', 'trigram']
    """
    predictions = {
        "uniform": uniform_prediction(task, tokens),
        "unigram": unigram_prediction(task, tokens),
    }
    if not isinstance(task, SeveralParentsTask):
        if isinstance(task.prior, FinitePrior):
            predictions |= retrieval_predictions(task, tokens)
        elif isinstance(task.prior, PriorWithPosterior):
            predictions["bigram"] = bigram_prediction(task, tokens)
        return predictions
    for m in range(1, len(task.query_parents) + 1):
        name = {1: "bigram", 2: "trigram"}.get(m, f"{m + 1}gram")
        predictions[name] = context_prediction(task, tokens, n_nearest=m)
    return predictions


__all__ = [
    "BayesLoss",
    "bayes_loss",
    "bayes_prediction",
    "bigram_prediction",
    "context_prediction",
    "strategies",
    "transition_counts",
    "uniform_prediction",
    "unigram_prediction",
]
