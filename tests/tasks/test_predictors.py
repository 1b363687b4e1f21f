"""Predictors against counting by hand, exact posteriors by quadrature, and published figures."""

import itertools
import math

import numpy as np
import pytest
import torch

from mechcausal.graphs import (
    CausalGraph,
    chain,
    icl_pairs,
    k_gram,
    random_forest,
    star,
    two_parents,
)
from mechcausal.tasks import GraphTask, SeveralParentsTask, SingleParentTask, cross_entropies
from mechcausal.tasks.dirichlet import PROBABILITY_FLOOR
from mechcausal.tasks.predictors import (
    bayes_prediction,
    bigram_prediction,
    strategies,
    transition_counts,
    uniform_prediction,
    unigram_prediction,
)
from mechcausal.tasks.predictors.unigram import smoothing_total
from mechcausal.tasks.priors import (
    DirichletPrior,
    FixedTransition,
    stationary_distribution,
    stationary_with_first_row,
)
from mechcausal.tasks.protocol import Prior
from tests.oracles import forest, integrated_probability, seeded, z_score


def symmetric_task(graph: CausalGraph, alpha: float, vocab_size: int) -> SingleParentTask:
    return SingleParentTask(graph, DirichletPrior.symmetric(alpha, vocab_size))


@pytest.mark.parametrize("seed", range(3))
def test_transitions_are_counted_along_edges(seed: int) -> None:
    # Several roots: their parent's index, -1, must not wrap to the query.
    graph = random_forest(12, edge_probability=0.6, generator=seeded(seed))
    assert len(graph.levels[0]) > 1
    task = symmetric_task(graph, 1.0, 4)
    tokens = task.sample(20, generator=seeded(seed)).tokens
    by_hand = torch.zeros(20, 4, 4)
    for b in range(20):
        for child, row in enumerate(graph.parents):
            for parent in row:
                by_hand[b, tokens[b, parent], tokens[b, child]] += 1
    assert torch.equal(transition_counts(task, tokens), by_hand)


def test_a_graph_without_edges_counts_nothing() -> None:
    task = symmetric_task(forest(-1, -1, -1), 1.0, 3)
    tokens = task.sample(5, generator=seeded()).tokens
    assert torch.equal(transition_counts(task, tokens), torch.zeros(5, 3, 3))
    assert torch.equal(bigram_prediction(task, tokens), uniform_prediction(task, tokens))
    assert bayes_prediction(task, tokens, generator=seeded(), n_draws=8).isfinite().all()


def test_predictions_of_a_hand_computed_sequence() -> None:
    task = SingleParentTask(chain(4), DirichletPrior((0.5, 1.5)))
    tokens = torch.tensor([[0, 0, 1, 0, 0], [1, 1, 1, 1, 0]])
    # From 0 once to 0, once to 1; the second sequence never leaves 0.
    bigram = torch.tensor([[1.5 / 4, 2.5 / 4], [0.5 / 2, 1.5 / 2]])
    torch.testing.assert_close(bigram_prediction(task, tokens), bigram)
    total = smoothing_total(task)
    unigram = torch.tensor([[3.0, 1.0], [0.0, 4.0]]) + total * torch.tensor([0.25, 0.75])
    torch.testing.assert_close(unigram_prediction(task, tokens), unigram / (4 + total))
    assert torch.equal(uniform_prediction(task, tokens), torch.full((2, 2), 0.5))


def exact_posterior_mean(
    graph: CausalGraph, concentration: tuple[float, float], tokens: tuple[int, ...]
) -> float:
    """`E[pi(0 | query) | sequence]` by integrating over p = pi(0|0) and q = pi(0|1)."""
    node, weight = np.polynomial.legendre.leggauss(150)
    node, weight = (node + 1) / 2, weight / 2
    p, q = np.meshgrid(node, node, indexing="ij")
    rows = ((p, 1 - p), (q, 1 - q))
    mu = (q / (1 - p + q), (1 - p) / (1 - p + q))
    likelihood = np.multiply.outer(weight, weight)
    for row in rows:
        for probability, alpha in zip(row, concentration, strict=True):
            likelihood = likelihood * probability ** (alpha - 1)
    for child, parent in enumerate(graph.parent_array()):
        likelihood = likelihood * (
            mu[tokens[child]] if parent < 0 else rows[tokens[parent]][tokens[child]]
        )
    return float((likelihood * rows[tokens[-1]][0]).sum() / likelihood.sum())


@pytest.mark.parametrize("concentration", [(1.0, 1.0), (2.0, 1.0)])
@pytest.mark.parametrize(
    "graph",
    [forest(-1), chain(4), forest(-1, -1, 0, 1), forest(-1, -1, -1, -1), forest(-1, 0, 0, -1)],
)
def test_bayes_is_the_exact_posterior_mean_of_every_sequence(
    graph: CausalGraph, concentration: tuple[float, float]
) -> None:
    task, repeats = SingleParentTask(graph, DirichletPrior(concentration)), 12
    sequences = list(itertools.product(range(2), repeat=task.sequence_length))
    exact = torch.tensor([exact_posterior_mean(graph, concentration, s) for s in sequences])
    generator = seeded(21)
    runs = torch.stack(
        [
            bayes_prediction(task, torch.tensor(sequences), generator=generator, n_draws=2000)
            for _ in range(repeats)
        ]
    ).double()
    torch.testing.assert_close(runs.sum(2), torch.ones(runs.shape[:2], dtype=torch.float64))
    first = runs[:, :, 0]
    stderr = (first.std(0) / repeats**0.5).clamp(min=1e-6)
    assert stderr.max() < 5e-3
    z = (first.mean(0) - exact) / stderr
    # Student's t with 11 degrees of freedom, of up to 32 sequences.
    assert z.abs().max() < 5.5
    assert z.square().mean() < 2.5


def test_roots_matter_to_bayes() -> None:
    """Else the comparison with the exact posterior would not see what it is meant to see."""
    graph = forest(-1, -1, -1, -1)
    assert abs(exact_posterior_mean(graph, (1.0, 1.0), (0, 0, 0, 0, 0)) - 0.5) > 0.1


def test_bayes_takes_the_sequences_in_parts() -> None:
    task = symmetric_task(icl_pairs(7), 0.5, 3)
    tokens = task.sample(10, generator=seeded(1)).tokens
    together, parts = (
        bayes_prediction(task, tokens, generator=seeded(2), n_draws=20_000, max_elements=elements)
        for elements in (10**7, 3 * 20_000 * 9)
    )
    assert (together - parts).abs().max() < 0.02


def test_bayes_needs_few_draws_where_roots_say_nothing() -> None:
    """Under an almost certain prior all weights are equal."""
    task = symmetric_task(icl_pairs(9), 1e6, 3)
    tokens = task.sample(200, generator=seeded(3)).tokens
    bayes = bayes_prediction(task, tokens, generator=seeded(4), n_draws=2)
    # An average of draws would be off by sqrt(2/9 / 3e6 / 2) = 2e-4.
    assert (bayes - bigram_prediction(task, tokens)).abs().max() < 1e-5


def test_few_draws_do_not_make_bayes_worse_than_counting() -> None:
    """Ten roots over ten tokens: weights of whole matrices would degenerate at 64 draws."""
    task = symmetric_task(icl_pairs(19), 0.1, 10)
    batch = task.sample(1000, generator=seeded(5))
    bayes = bayes_prediction(task, batch.tokens, generator=seeded(6), n_draws=64)
    bigram = bigram_prediction(task, batch.tokens)
    gain = cross_entropies(bigram, batch.target) - cross_entropies(bayes, batch.target)
    assert z_score(gain, 0.0) > 3


def test_roots_alone_teach_bayes_more_than_counting() -> None:
    task = symmetric_task(forest(*[-1] * 10), 0.1, 3)
    batch = task.sample(2000, generator=seeded(7))
    bayes = bayes_prediction(task, batch.tokens, generator=seeded(8), n_draws=128)
    gain = math.log(3) - cross_entropies(bayes, batch.target)
    assert z_score(gain, 0.0) > 4


@pytest.mark.parametrize(("graph", "figure"), [(chain(19), 1.763), (icl_pairs(19), 1.928)])
def test_counting_reaches_the_published_losses(graph: CausalGraph, figure: float) -> None:
    """theory.md: the authors' "Bayes" with roots counted right, which ignores what roots say."""
    task = symmetric_task(graph, 0.1, 10)
    batch = task.sample(50_000, generator=seeded(9))
    losses = cross_entropies(bigram_prediction(task, batch.tokens), batch.target)
    assert abs(z_score(losses, figure)) < 4


def test_stationary_distributions_with_another_first_row() -> None:
    prior = DirichletPrior.symmetric(0.1, 4)
    matrices = prior.sample(10, generator=seeded(10), dtype=torch.float64)
    rows = prior.sample(10, generator=seeded(11), dtype=torch.float64)
    variants = stationary_with_first_row(matrices, rows)
    for variant in range(4):
        changed = matrices.clone()
        changed[:, 0] = rows[:, variant]
        expected = stationary_distribution(changed)
        torch.testing.assert_close(variants[:, variant], expected, rtol=1e-12, atol=0.0)


def test_a_fixed_matrix_is_predicted_exactly() -> None:
    matrix = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    task = SingleParentTask(chain(3), FixedTransition.from_matrix(matrix))
    tokens = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1]])
    assert torch.equal(bigram_prediction(task, tokens), matrix)
    assert torch.equal(bayes_prediction(task, tokens, generator=seeded()), matrix)
    mean = torch.tensor([[0.375, 0.625]])  # of the row of a uniform query, which is not mu
    torch.testing.assert_close(unigram_prediction(task, tokens), mean.expand(2, -1))


def test_smoothing_of_a_single_token_is_that_of_the_exact_posterior_mean() -> None:
    """One token x ~ mu: `E[mean row | x]` is linear in its frequency, by integrating over pi."""
    node, weight = np.polynomial.legendre.leggauss(200)
    node, weight = (node + 1) / 2, weight / 2
    p, q = np.meshgrid(node, node, indexing="ij")
    mu, mean_row = q / (1 - p + q), (p + q) / 2
    agree = np.multiply.outer(weight, weight) * (mu * mean_row + (1 - mu) * (1 - mean_row))
    share = 2 * agree.sum() - 1
    total = smoothing_total(symmetric_task(forest(-1), 1.0, 2))
    assert 1 / (1 + total) == pytest.approx(share, abs=0.04)  # 1,000 draws: 4 standard errors


@pytest.mark.parametrize("concentration", [(0.3, 0.9), (0.05, 0.05)])
def test_smoothing_is_the_best_one_by_enumeration(concentration: tuple[float, ...]) -> None:
    task = SeveralParentsTask(k_gram(7, 2), DirichletPrior(concentration))
    sequences = list(itertools.product(range(2), repeat=7))
    weight = torch.tensor([integrated_probability(task, s) for s in sequences])
    target = bayes_prediction(task, torch.tensor(sequences), generator=seeded())
    counts = torch.tensor([[s.count(0), s.count(1)] for s in sequences])
    mean = torch.tensor(concentration) / sum(concentration)

    def loss(total: float) -> float:
        prediction = (counts + total * mean) / (7 + total)
        return float((weight * cross_entropies(prediction, target)).sum())

    assert float(weight.sum()) == pytest.approx(1.0)
    best = min(map(loss, np.geomspace(1e-3, 1e4, 400)))
    assert loss(smoothing_total(task)) == pytest.approx(best, abs=1e-3)


NOT_ERGODIC = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.0, 0.5, 0.5))
PRIORS = [
    *(
        (DirichletPrior.symmetric(alpha, size), length)
        for size, alpha, length in [
            *((10, 0.1, 20), (10, 1e-3, 20), (10, 3.0, 20), (2, 0.1, 3), (2, 1e-3, 20)),
            *((3, 0.01, 6), (3, 0.1, 100), (50, 0.1, 20), (20, 0.02, 60), (5, 0.1, 2)),
            *((4, 1e-40, 20), (10, 1e3, 10), (5, 1e40, 10)),
        ]
    ),
    (DirichletPrior((1.0, 0.1)), 16),
    (DirichletPrior((0.05, 0.5, 2.0)), 16),
    (DirichletPrior((1e-40, 1e-39, 1e-40)), 16),
    (DirichletPrior((1e-3, 1.0, 1.0, 5.0)), 16),
    (FixedTransition(((0.9, 0.1), (0.2, 0.8))), 12),
    (FixedTransition(NOT_ERGODIC), 12),
    (FixedTransition(((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0))), 12),
]


def tasks_of(prior: Prior, length: int) -> list[GraphTask]:
    """Graphs of every kind; with several parents as far as the prior and the length allow."""
    n = length - 1
    tasks: list[GraphTask] = [
        SingleParentTask(graph, prior)
        for graph in (chain(n), icl_pairs(n), star(n), forest(*[-1] * n))
    ]
    if length > 4:
        graphs = [k_gram(length, 1)]
        if isinstance(prior, DirichletPrior):
            graphs += [two_parents(length), k_gram(length, 2), k_gram(length, 3)]
        tasks += [SeveralParentsTask(graph, prior) for graph in graphs]
    return tasks


@pytest.mark.parametrize(("prior", "length"), PRIORS)
def test_no_strategy_loses_to_uniform(prior: Prior, length: int) -> None:
    for task in tasks_of(prior, length):
        batch = task.sample(max(300, 3000 // prior.vocab_size), generator=seeded(77))
        losses = {
            name: cross_entropies(prediction, batch.target)
            for name, prediction in strategies(task, batch.tokens).items()
        }
        for name, loss in losses.items():
            excess = loss - losses["uniform"]
            assert loss.isfinite().all(), (name, task)
            # Rounding in float32; then four standard errors.
            bound = 1e-5 + 4 * excess.std().item() / len(excess) ** 0.5
            assert excess.mean().item() < bound, (name, task)


@pytest.mark.parametrize("alpha", [1e-40, 1e-3])
def test_bayes_excludes_nothing_that_a_drawn_matrix_holds(alpha: float) -> None:
    """Entries are kept above a floor, so their mean lies above it: else a label costs infinity."""
    task = symmetric_task(icl_pairs(9), alpha, 3)
    batch = task.sample(300, generator=seeded(13))
    bayes = bayes_prediction(task, batch.tokens, generator=seeded(14), n_draws=8)
    assert bayes.min() >= PROBABILITY_FLOOR * 0.999
    assert cross_entropies(bayes, batch.target).isfinite().all()
