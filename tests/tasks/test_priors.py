"""Priors against exact arithmetic and against the moments of the distributions they claim."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from mechcausal.tasks.dirichlet import (
    PROBABILITY_FLOOR,
    _entries,
    sample_dirichlet,
    sample_log_gamma,
)
from mechcausal.tasks.priors import (
    DirichletPrior,
    FixedTransition,
    PriorError,
    stationary_distribution,
)
from tests.oracles import exact_stationary, seeded
from tests.refusals import raises_one_line

ALPHAS = (0.01, 0.1, 0.5, 1.0, 1.5, 7.0)
N = 200_000


def largest_relative_error(matrices: torch.Tensor) -> float:
    """Of the stationary distributions, entry by entry, against rational arithmetic."""
    worst = 0.0
    for matrix, mu in zip(matrices, stationary_distribution(matrices), strict=True):
        exact = exact_stationary(matrix, floor=PROBABILITY_FLOOR)
        for value, true in zip(mu.tolist(), exact, strict=True):
            worst = max(worst, abs(value / float(true) - 1))
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("alpha", "vocab_size"), [(0.1, 3), (0.01, 3), (0.01, 5), (1.0, 4)])
def test_stationary_distribution_is_accurate_in_every_entry(
    alpha: float, vocab_size: int, dtype: torch.dtype
) -> None:
    prior = DirichletPrior.symmetric(alpha, vocab_size)
    matrices = prior.sample(60, generator=seeded(), dtype=dtype)
    assert largest_relative_error(matrices) < 1e-13


@pytest.mark.parametrize(
    "rows",
    [
        [[1 - 1e-12, 1e-12], [3e-12, 1 - 3e-12]],  # nearly two separate chains
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],  # reducible
        [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]],  # absorbing first state
        [[0.5, 0.3, 0.2], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]],  # absorbing last state
        [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1e-15, 0.0, 1 - 1e-15]],  # transient, slowly left
        [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]],  # a cycle
    ],
)
def test_stationary_distribution_of_nearly_reducible_chains(rows: list[list[float]]) -> None:
    matrix = torch.tensor([rows], dtype=torch.float64)
    assert largest_relative_error(matrix) < 1e-13
    assert matrix[0].tolist() == rows  # left alone


def test_many_matrices_are_eliminated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = DirichletPrior.symmetric(0.1, 3).sample(300, generator=seeded())
    together = stationary_distribution(matrices)
    monkeypatch.setattr("mechcausal.tasks.priors._at_once", lambda _: 7)
    torch.testing.assert_close(stationary_distribution(matrices), together, rtol=1e-14, atol=0)


def test_single_precision_is_enough_to_draw_roots() -> None:
    matrices = DirichletPrior.symmetric(0.01, 5).sample(2000, generator=seeded())
    single = stationary_distribution(matrices, dtype=torch.float32)
    assert (single - stationary_distribution(matrices)).abs().max() < 1e-5


@pytest.mark.parametrize("alpha", ALPHAS)
def test_log_gamma_draws_have_the_moments_of_the_logarithm(alpha: float) -> None:
    draws = sample_log_gamma(torch.tensor(alpha), (N,), generator=seeded(1)).double()
    variance, fourth = special.polygamma(1, alpha), special.polygamma(3, alpha)
    mean_error = (draws.mean().item() - special.digamma(alpha)) / math.sqrt(variance / N)
    spread = math.sqrt((fourth + 2 * variance**2) / N)
    variance_error = (draws.var().item() - variance) / spread
    assert abs(mean_error) < 4
    assert abs(variance_error) < 4


@pytest.mark.parametrize("alpha", ALPHAS)
def test_log_gamma_draws_follow_the_distribution(alpha: float) -> None:
    concentration = torch.tensor(alpha, dtype=torch.float64)
    draws = sample_log_gamma(concentration, (20_000,), generator=seeded(3)).numpy()

    def cumulative(log_x: np.ndarray) -> np.ndarray:
        # x^a / Gamma(a + 1) near 0, where x itself underflows.
        small = np.exp(alpha * log_x - special.gammaln(alpha + 1))
        return np.asarray(np.where(log_x < -40, small, special.gammainc(alpha, np.exp(log_x))))

    assert stats.kstest(draws, cumulative).pvalue > 1e-3


def test_several_generators_draw_as_each_of_them_alone() -> None:
    alpha = torch.tensor([[0.05, 1.0, 30.0], [0.3, 0.7, 2.0]]).view(2, 1, 3)
    together = sample_log_gamma(alpha, (2, 5000, 3), generator=[seeded(1), seeded(2)])
    for number in range(2):
        alone = sample_log_gamma(alpha[number], (5000, 3), generator=seeded(1 + number))
        assert torch.equal(together[number], alone)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 2, 3)])
def test_entries_of_a_broadcast_tensor_by_number(shape: tuple[int, ...]) -> None:
    values = torch.rand(shape[-2:] if len(shape) > 2 else shape[-1:], generator=seeded(3))
    index = torch.arange(math.prod(shape))
    assert torch.equal(_entries(values, shape, index), values.expand(shape).reshape(-1))


def test_log_gamma_draws_broadcast_their_concentrations() -> None:
    concentration = torch.tensor([0.05, 1.0, 30.0])
    draws = sample_log_gamma(concentration, (N, 3), generator=seeded(4)).double()
    alpha = concentration.double().numpy()
    error = (draws.mean(0).numpy() - special.digamma(alpha)) / np.sqrt(
        special.polygamma(1, alpha) / N
    )
    assert np.abs(error).max() < 4
    assert np.abs(np.corrcoef(draws.numpy().T) - np.eye(3)).max() < 4 / math.sqrt(N)


@pytest.mark.parametrize("concentration", [(0.1, 0.1, 0.1), (0.2, 1.0, 3.0), (5.0, 0.02)])
def test_the_rows_of_a_prior_are_dirichlet_draws(concentration: tuple[float, ...]) -> None:
    """Their mean and covariance; two rows of a matrix have nothing to do with each other."""
    alpha = torch.tensor(concentration, dtype=torch.float64)
    matrices = DirichletPrior(concentration).sample(N, generator=seeded(5)).double()
    mean = alpha / alpha.sum()
    covariance = (torch.diag(mean) - torch.outer(mean, mean)) / (alpha.sum() + 1)
    centred = matrices[:, 0] - mean
    products = centred.unsqueeze(2) * centred.unsqueeze(1)
    mean_error = centred.mean(0) / (centred.std(0) / N**0.5)
    covariance_error = (products.mean(0) - covariance) / (products.std(0) / N**0.5)
    assert mean_error.abs().max() < 4
    assert covariance_error.abs().max() < 4
    rows = matrices[:, :2, 0].numpy().T
    assert abs(np.corrcoef(rows)[0, 1]) < 4 / math.sqrt(N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_concentrations_give_distributions_without_zeros(dtype: torch.dtype) -> None:
    prior = DirichletPrior.symmetric(1e-4, vocab_size=3)
    matrices = prior.sample(20_000, generator=seeded(6), dtype=dtype)
    assert matrices.isfinite().all()
    assert matrices.min() >= PROBABILITY_FLOOR * 0.999
    torch.testing.assert_close(matrices.sum(-1), torch.ones(20_000, 3, dtype=dtype))
    share = (matrices.argmax(-1) == 0).double().mean().item()
    assert abs(share - 1 / 3) < 4 * math.sqrt(2 / 9 / 60_000)
    assert stationary_distribution(matrices).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [1e-320, 1e-40, 1e-9])
def test_a_vanishing_concentration_gives_rows_with_one_token(
    alpha: float, dtype: torch.dtype
) -> None:
    matrices = DirichletPrior((alpha, 3 * alpha)).sample(20_000, generator=seeded(8), dtype=dtype)
    torch.testing.assert_close(matrices.sum(-1), torch.ones(20_000, 2, dtype=dtype))
    assert (matrices.amax(-1) > 1 - 1e-6).double().mean() > 1 - 1e-3
    share = matrices[..., 1].double().mean().item()
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 40_000)
    assert stationary_distribution(matrices).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [1e25, 1e40, 1.7e308])
def test_an_immense_concentration_gives_its_mean(alpha: float, dtype: torch.dtype) -> None:
    matrices = DirichletPrior((alpha, alpha, alpha / 2)).sample(5, generator=seeded(8), dtype=dtype)
    mean = torch.tensor([0.4, 0.4, 0.2], dtype=dtype)
    torch.testing.assert_close(matrices, mean.expand(5, 3, 3), rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [1e-44, 1e-40, 1e-30])
def test_log_gamma_draws_are_finite_for_any_concentration(alpha: float, dtype: torch.dtype) -> None:
    concentration = torch.tensor(alpha, dtype=dtype)
    rows = sample_dirichlet(concentration.expand(3), (10_000, 3), generator=seeded(1))
    assert sample_log_gamma(concentration, (10_000,), generator=seeded(1)).isfinite().all()
    assert abs(rows[:, 0].double().mean().item() - 1 / 3) < 4 * math.sqrt(2 / 9 / 10_000)


def test_concentrations_that_arithmetic_can_hold_stay_as_they_are() -> None:
    for concentration in ((0.1, 0.1), (1e-10, 5.0), (1e6, 1e6)):
        assert DirichletPrior(concentration).representable == concentration


def test_posterior_adds_counts_to_the_concentration() -> None:
    counts = torch.tensor([[[2.0, 0.0], [1.0, 5.0]]])
    posterior = DirichletPrior((0.5, 1.5)).posterior_concentration(counts)
    assert posterior.tolist() == [[[2.5, 1.5], [1.5, 6.5]]]


@pytest.mark.parametrize(
    ("concentration", "message"),
    [
        *(((1.0, alpha), "every concentration must be") for alpha in (0.0, -1.0, math.nan)),
        ((1.0, math.inf), r"^alpha is inf: every concentration must be"),
        ((), "at least 2 tokens"),
        ((1.0,), "at least 2 tokens"),
    ],
)
def test_a_concentration_that_makes_no_sense_is_refused_in_one_line(
    concentration: tuple[float, ...], message: str
) -> None:
    with raises_one_line(PriorError, match=message):
        DirichletPrior(concentration)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (((1.0,),), "square"),
        (((0.5, 0.5), (1.0,)), "square"),
        (((0.5, 0.5), (0.5, 0.4)), "row 1 .* sum 0.9"),
        (((1.5, -0.5), (0.5, 0.5)), "row 0 .* smallest entry -0.5"),
        (((0.5, 0.5), (math.nan, 0.5)), "row 1"),
    ],
)
def test_a_matrix_that_is_not_stochastic_is_refused(
    rows: tuple[tuple[float, ...], ...], message: str
) -> None:
    with raises_one_line(PriorError, match=message):
        FixedTransition(rows)


def test_a_fixed_matrix_is_drawn_as_it_is() -> None:
    matrix = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    prior = FixedTransition.from_matrix(matrix)
    assert prior == FixedTransition.from_matrix([[0.25, 0.75], [1.0, 0.0]])
    assert prior.vocab_size == 2
    assert torch.equal(prior.sample(3, generator=seeded()), matrix.expand(3, -1, -1))
