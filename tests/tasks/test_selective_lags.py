"""Sequences of an unknown lag, and the posterior of the lag against Bayes' rule written out."""

import pytest
import torch

from mechcausal.tasks.base import scored_rows
from mechcausal.tasks.checking import check_batch
from mechcausal.tasks.priors import DirichletPrior, FixedTransition, stationary_distribution
from mechcausal.tasks.protocol import PredictableTask
from mechcausal.tasks.selective_lags import SelectiveLagTask
from tests.oracles import seeded

MATRIX = FixedTransition.from_matrix(
    DirichletPrior.symmetric(0.5, 3).sample(1, generator=seeded(5), dtype=torch.float64)[0]
)
TASK = SelectiveLagTask(MATRIX, (1, 2, 4), length=12)


def test_the_posterior_of_the_lag_is_bayes_rule() -> None:
    batch = TASK.sample(6, generator=seeded(0))
    check_batch(TASK, batch, 6)
    assert isinstance(TASK, PredictableTask)
    matrix = torch.tensor(MATRIX.rows, dtype=torch.float64)
    predicted, posterior = TASK.predictions(batch), TASK.lag_posterior(batch.tokens)
    for row, x in enumerate(batch.tokens.tolist()):
        for t in range(3, 12):
            likelihoods = []
            for lag in TASK.lags:
                product = 1.0
                for j in range(4, t + 1):
                    product *= matrix[x[j - lag], x[j]].item()
                likelihoods.append(product)
            weights = torch.tensor(likelihoods, dtype=torch.float64) / sum(likelihoods)
            assert (posterior[row, t] - weights).abs().max() < 1e-12
            rows = torch.stack([matrix[x[t + 1 - lag]] for lag in TASK.lags])
            assert (predicted["bayes"][row, t] - weights @ rows).abs().max() < 1e-12
            assert (predicted["equal_lags"][row, t] - rows.mean(0)).abs().max() < 1e-12
    mu = stationary_distribution(matrix.unsqueeze(0))[0]
    assert torch.equal(predicted["stationary"][2, 7], mu)


def test_labels_are_the_law_of_the_next_token() -> None:
    batch = TASK.sample(30_000, generator=seeded(1))
    assert batch.lag is not None
    assert batch.scored is not None
    assert batch.scored[0].tolist() == [False] * 3 + [True] * 9
    following = torch.nn.functional.one_hot(batch.tokens[:, 1:], 3).double()
    scored = batch.scored[:, :-1]
    law, drawn = batch.target[:, :-1][scored].double(), following[scored]
    z = (drawn - law).sum(0) / (law * (1 - law)).sum(0).sqrt()
    assert z.abs().max() < 4
    for lag in TASK.lags:
        rows = (batch.lag == lag).nonzero().squeeze(1)
        assert abs(len(rows) - 10_000) < 4 * (30_000 * 2 / 9) ** 0.5
        expected = torch.tensor(MATRIX.rows)[batch.tokens[rows, 9 - lag]]
        assert torch.equal(batch.target[rows, 8], expected)


def test_no_predictor_is_better_than_bayes() -> None:
    batch = TASK.sample(4000, generator=seeded(2))
    target = scored_rows(batch.target, batch).double()
    losses = {
        name: -(target * scored_rows(value, batch).log()).sum(-1).mean().item()
        for name, value in TASK.predictions(batch).items()
    }
    assert losses["bayes"] < losses["equal_lags"] < losses["stationary"]


@pytest.mark.parametrize(
    ("lags", "message"),
    [
        ((), "distinct numbers from 1 on"),
        ((0, 1), "distinct numbers from 1 on"),
        ((2, 2), "distinct numbers from 1 on"),
        ((1, 12), "the longest lag is 12; a sequence of 12 tokens allows at most 11"),
    ],
)
def test_lags_that_make_no_sense(lags: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveLagTask(MATRIX, lags, length=12)
