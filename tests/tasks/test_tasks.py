"""Sampled sequences against exact enumeration, and the loss against hand computation."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from mechcausal.graphs import CausalGraph, GraphError, chain, k_gram, random_forest, two_parents
from mechcausal.tasks import SingleParentTask, build_task, cross_entropies, soft_cross_entropy
from mechcausal.tasks.priors import DirichletPrior, FixedTransition, stationary_distribution
from tests.oracles import forest, joint_distribution, seeded
from tests.refusals import raises_one_line

TWO = ((0.9, 0.1), (0.35, 0.65))
THREE = ((0.1, 0.6, 0.3), (0.0, 0.2, 0.8), (0.5, 0.5, 0.0))


@pytest.mark.parametrize(
    ("graph", "rows"),
    [
        (chain(4), TWO),
        (forest(-1, 0, 0, 1, 1), TWO),
        (forest(-1, -1, 0, 1, -1), TWO),
        (forest(-1, -1, -1), THREE),
        (forest(-1, 0, -1, 0), THREE),
    ],
)
def test_sequences_have_the_probabilities_of_the_graph(
    graph: CausalGraph, rows: tuple[tuple[float, ...], ...]
) -> None:
    task, n = SingleParentTask(graph, FixedTransition(rows)), 60_000
    tokens = task.sample(n, generator=seeded(11)).tokens.numpy()
    pi = np.array(rows)
    mu = stationary_distribution(torch.from_numpy(pi).unsqueeze(0))[0].numpy()
    # The query is uniform and independent of everything before it.
    exact = np.multiply.outer(joint_distribution(graph, pi, mu), np.full(len(mu), 1 / len(mu)))
    observed = np.zeros_like(exact)
    np.add.at(observed, tuple(tokens.T), 1)
    possible = exact > 0
    assert observed[~possible].sum() == 0
    expected = n * exact[possible]
    statistic = ((observed[possible] - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(statistic, possible.sum() - 1) > 1e-3


def test_sequences_follow_their_own_matrix() -> None:
    """Every sequence of a batch has another deterministic matrix, which fixes all of it."""
    matrices = torch.stack(
        [torch.eye(3)[list(order)] for order in itertools.product(range(3), repeat=3)]
    )
    graph = forest(-1, 0, 1, 0, -1, 4)
    task = SingleParentTask(graph, DirichletPrior.symmetric(1.0, vocab_size=3))
    batch = task.sample_given(matrices, generator=seeded(12))
    for matrix, tokens in zip(matrices, batch.tokens, strict=True):
        for parent, child in graph.edges:
            assert tokens[child] == matrix[tokens[parent]].argmax()


def test_impossible_tokens_are_never_drawn() -> None:
    # From 0 never to 0, from 1 never to 2; state 3 is never entered, so no root is 3 either.
    rows = ((0.0, 0.7, 0.3, 0.0), (0.6, 0.4, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.4, 0.3, 0.2, 0.1))
    prior = FixedTransition(rows)
    task = SingleParentTask(forest(-1, 0, 1, -1, 3, -1), prior)
    tokens = task.sample(50_000, generator=seeded(13)).tokens
    pi = torch.tensor(rows)
    for parent, child in task.graph.edges:
        assert (pi[tokens[:, parent], tokens[:, child]] > 0).all()
    assert (tokens[:, :-1] != 3).all()
    assert (tokens[:, -1] == 3).any()


def test_the_target_is_the_row_of_the_query() -> None:
    task = SingleParentTask(chain(5), DirichletPrior.symmetric(0.5, vocab_size=4))
    batch = task.sample(50, generator=seeded(14))
    assert len(batch) == 50
    assert batch.tokens.shape == (50, 6)
    assert batch.transition is not None
    for b in range(50):
        assert torch.equal(batch.target[b], batch.transition[b, batch.tokens[b, -1]])
        assert batch.query[b] == batch.tokens[b, 5]


@pytest.mark.parametrize(
    "graph",
    [random_forest(30, edge_probability=0.6, generator=seeded(1)), two_parents(12)],
    ids=["single", "several"],
)
def test_batches_depend_on_the_generator_alone(graph: CausalGraph) -> None:
    task = build_task(graph, DirichletPrior.symmetric(0.1, vocab_size=5))
    state, generator = torch.get_rng_state(), seeded(3)
    first, second = (task.sample(20, generator=generator) for _ in range(2))
    again = task.sample(20, generator=seeded(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.target, again.target)
    assert not torch.equal(first.tokens, second.tokens)
    assert not torch.equal(first.tokens, task.sample(20, generator=seeded(4)).tokens)


@pytest.mark.parametrize("graph", [two_parents(6), k_gram(6, 3), k_gram(6, 1)])
def test_graphs_with_several_parents_or_a_query_with_parents_are_refused(
    graph: CausalGraph,
) -> None:
    with raises_one_line(GraphError, match="at most one parent"):
        SingleParentTask(graph, DirichletPrior.symmetric(1.0, vocab_size=2))


def test_soft_cross_entropy_of_a_hand_computed_case() -> None:
    prediction = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    target = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    by_hand = (math.log(2) + 0.5 * math.log(4) + 0.5 * math.log(4 / 3)) / 2
    assert soft_cross_entropy(prediction, target).item() == pytest.approx(by_hand, rel=1e-12)
    smoothed = -(math.log(0.6 / 1.2) + 0.5 * math.log(0.35 / 1.2) + 0.5 * math.log(0.85 / 1.2)) / 2
    assert soft_cross_entropy(prediction, target, epsilon=0.1).item() == pytest.approx(
        smoothed, rel=1e-12
    )
    # Along a run axis each run has its own smoothing.
    runs = soft_cross_entropy(
        prediction.expand(2, 2, 2), target.expand(2, 2, 2), epsilon=torch.tensor([0.0, 0.1])
    )
    assert runs.tolist() == pytest.approx([by_hand, smoothed], rel=1e-7)


def test_soft_cross_entropy_has_the_gradient_of_the_papers_loss() -> None:
    prediction = torch.rand(5, 4, generator=seeded(1), dtype=torch.float64).softmax(1)
    target = torch.rand(5, 4, generator=seeded(2), dtype=torch.float64).softmax(1)
    ours, papers = prediction.clone().requires_grad_(), prediction.clone().requires_grad_()
    soft_cross_entropy(ours, target, epsilon=1e-2).backward()
    (-(target * (papers + 1e-2).log()).sum(1).mean()).backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, papers.grad)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_what_never_comes_costs_nothing_and_pulls_nowhere(epsilon: float) -> None:
    """0 log 0 = 0: in the loss, in that of each sequence, and in the gradient."""
    target = torch.tensor([[0.25, 0.75, 0.0], [0.0, 1.0, 0.0]])
    prediction = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0]], requires_grad=True)
    loss = soft_cross_entropy(prediction, target, epsilon=epsilon)
    loss.backward()
    by_hand = [
        -sum(
            y * math.log((f + epsilon) / (1 + 3 * epsilon))
            for y, f in zip(label, row, strict=True)
            if y
        )
        for label, row in zip(target.tolist(), prediction.tolist(), strict=True)
    ]
    assert loss.item() == pytest.approx(np.mean(by_hand), rel=1e-6)
    each = cross_entropies(prediction.detach(), target, epsilon=epsilon)
    assert each.tolist() == pytest.approx(by_hand, rel=1e-6)
    assert prediction.grad is not None
    expected = -target / (prediction.detach() + epsilon).clamp(min=1e-9) / 2
    torch.testing.assert_close(prediction.grad, expected)


def test_excluding_what_can_come_costs_infinitely_much() -> None:
    target, prediction = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    assert soft_cross_entropy(prediction, target).item() == math.inf
    assert cross_entropies(prediction, target).tolist() == [math.inf]
    assert soft_cross_entropy(prediction, target, epsilon=1e-3).isfinite()


@pytest.mark.parametrize("graph", [chain(5), two_parents(6)], ids=["single", "several"])
def test_one_sequence_of_a_batch_is_a_batch(graph: CausalGraph) -> None:
    batch = build_task(graph, DirichletPrior.symmetric(0.5, 3)).sample(4, generator=seeded())
    for index in (3, -1):
        one = batch[index]
        assert len(one) == 1
        assert torch.equal(one.tokens, batch.tokens[3:])
        assert torch.equal(one.target, batch.target[3:])
        if batch.transition is not None:
            assert one.transition is not None
            assert torch.equal(one.transition, batch.transition[3:])
    assert [int(batch[row].query) for row in range(4)] == batch.query.tolist()
    for beyond in (4, -5):
        with pytest.raises(IndexError, match=f"sequence {beyond}: the batch has 4"):
            batch[beyond]
