"""The prior of finitely many matrices against Bayes' rule written out."""

import pytest
import torch

from mechcausal.graphs import CausalGraph
from mechcausal.tasks import SingleParentTask
from mechcausal.tasks.finite_prior import FinitePrior
from mechcausal.tasks.predictors import bayes_prediction
from mechcausal.tasks.priors import DirichletPrior, PriorError, stationary_distribution
from tests.oracles import seeded

BASE = DirichletPrior.symmetric(0.7, vocab_size=3)


def test_the_bayes_predictor_weighs_matrices_by_the_likelihood_of_every_token() -> None:
    graph = CausalGraph.from_parents([-1, 0, 0, -1, 3, 1])
    prior = FinitePrior(BASE, 4, seed=3)
    task = SingleParentTask(graph, prior)
    tokens = task.sample(40, generator=seeded(0)).tokens
    expected = torch.zeros(40, 3, dtype=torch.float64)
    mu = stationary_distribution(prior.matrices)
    for row, sequence in enumerate(tokens.tolist()):
        likelihoods = []
        for n, matrix in enumerate(prior.matrices):
            likelihood = 1.0
            for position, parents in enumerate(graph.parents):
                law = matrix[sequence[parents[0]]] if parents else mu[n]
                likelihood *= law[sequence[position]].item()
            likelihoods.append(likelihood)
        for likelihood, matrix in zip(likelihoods, prior.matrices, strict=True):
            expected[row] += likelihood / sum(likelihoods) * matrix[sequence[-1]]
    predicted = bayes_prediction(task, tokens, generator=seeded(1)).double()
    assert (predicted - expected).abs().max() < 1e-6  # float32 counts, float64 likelihoods


def test_samples_take_every_matrix_alike_and_the_seed_names_them() -> None:
    prior = FinitePrior(BASE, 5, seed=1)
    drawn = prior.sample(5000, generator=seeded(0), dtype=torch.float64)
    matches = (drawn.unsqueeze(1) == prior.matrices).flatten(2).all(-1)
    assert (matches.sum(1) == 1).all()
    counts = matches.sum(0).double()
    assert ((counts - 1000) / (5000 * 0.2 * 0.8) ** 0.5).abs().max() < 4
    assert torch.equal(FinitePrior(BASE, 5, seed=1).matrices, prior.matrices)
    assert not torch.equal(FinitePrior(BASE, 5, seed=2).matrices, prior.matrices)
    assert hash(prior) == hash(FinitePrior(BASE, 5, seed=1))


@pytest.mark.parametrize("n", [0, -1, 10_000_000])
def test_a_number_of_matrices_that_makes_no_sense(n: int) -> None:
    with pytest.raises(PriorError, match="allowed with 3 tokens: 1 to 2,222,222"):
        FinitePrior(BASE, n)
