"""Strategies for sequences whose matrix is one of finitely many: retrieve one, or infer it anew."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.tasks import SingleParentTask
from mechcausal.tasks.dirichlet import PROBABILITY_FLOOR
from mechcausal.tasks.finite_prior import FinitePrior
from mechcausal.tasks.predictors.single_parent import bigram_prediction
from mechcausal.tasks.priors import stationary_distribution


def retrieval_predictions(
    task: SingleParentTask, tokens: Int[Tensor, "batch pos"]
) -> dict[str, Float[Tensor, "batch vocab"]]:
    """The strategies that count transitions, and those that retrieve a matrix.

    - "bigram" infers the matrix from the transitions alone, as if every matrix were a new draw.
    - "unigram_retrieval" weighs the prior's matrices by the likelihood of the context's tokens
      under their stationary distributions, and averages their rows of the query.
    - "bigram_retrieval" weighs them by the likelihood of the context: the Bayes predictor.

    Source: Park, Lubana, Pres and Tanaka 2024 (arXiv 2412.01003).
    """
    prior = task.prior
    assert isinstance(prior, FinitePrior)
    context, query = tokens[:, :-1], tokens[:, -1]
    pi = prior.matrices.to(tokens.device)
    log_mu = stationary_distribution(pi).clamp(min=PROBABILITY_FLOOR).log()
    counts = torch.nn.functional.one_hot(context, prior.vocab_size).sum(1).double()
    weights = (counts @ log_mu.T).softmax(-1)
    retrieved = torch.einsum("bn,nij->bij", weights, pi)[torch.arange(len(query)), query]
    return {
        "bigram": bigram_prediction(replace(task, prior=prior.base), tokens),
        "unigram_retrieval": retrieved.to(torch.get_default_dtype()),
        "bigram_retrieval": bigram_prediction(task, tokens),
    }
