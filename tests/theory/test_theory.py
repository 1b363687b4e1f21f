"""Theory against enumeration of every sequence, and against gradients measured on the model."""

import math

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechcausal.graphs import (
    CausalGraph,
    GraphError,
    binary_tree,
    chain,
    icl_pairs,
    interleaved_chains,
    k_gram,
    lag_chain,
    random_forest,
    random_tree,
    star,
    two_parents,
)
from mechcausal.measures.metrics import edge_f1
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.tasks import SeveralParentsTask, SingleParentTask, soft_cross_entropy
from mechcausal.tasks.priors import DirichletPrior, FixedTransition, stationary_distribution
from mechcausal.theory import (
    PairwiseTheory,
    named_edges,
    pair_distances,
    pairwise_theory,
    parent_information,
    predicted_gradient,
    theory_notes,
)
from tests.oracles import (
    forest,
    joint_distribution,
    pair_distribution,
    parent_lists,
    pattern_gradient,
    seeded,
    transition_rows,
)


def information_by_enumeration(
    graph: CausalGraph, pi: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """chi-squared and Shannon information and g, from the probability of every sequence."""
    n = graph.n_positions
    mu = stationary_distribution(torch.from_numpy(pi).unsqueeze(0))[0].numpy()
    mu = np.where(mu < 1e-20, 0.0, mu)  # the floor of stationary_distribution
    joint = joint_distribution(graph, pi, mu)
    chi2, shannon, g = np.zeros((n, n)), np.zeros((n, n)), np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            pair = pair_distribution(joint, i, j)
            independent = np.outer(pair.sum(1), pair.sum(0))
            for x in range(len(mu)):
                for y in range(len(mu)):
                    if pair[x, y] > 0:
                        ratio = pair[x, y] / independent[x, y]
                        chi2[i, j] += pair[x, y] * ratio
                        shannon[i, j] += pair[x, y] * math.log(ratio)
                        # s_i = x = s', s_j = y = s
                        g[i, j] += pi[y, x] / mu[x] * pair[x, y]
    return chi2 - 1, shannon, np.tril(g - 1)


def check_against_enumeration(graph: CausalGraph, rows: tuple[tuple[float, ...], ...]) -> None:
    theory = pairwise_theory(graph, FixedTransition(rows))
    chi2, shannon, g = information_by_enumeration(graph, np.array(rows))
    np.testing.assert_allclose(theory.chi2.numpy(), chi2, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(theory.shannon.numpy(), shannon, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(theory.g.numpy(), g, rtol=1e-10, atol=1e-10)


@settings(max_examples=50)
@given(parents=parent_lists(most=5), rows=transition_rows())
def test_information_and_g_equal_enumeration(
    parents: list[int], rows: tuple[tuple[float, ...], ...]
) -> None:
    check_against_enumeration(forest(*parents), rows)


@pytest.mark.parametrize(
    "rows",
    [
        ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)),  # periodic: a permutation
        ((0.0, 1.0), (0.5, 0.5)),
        ((0.999999, 0.000001), (0.000001, 0.999999)),
        ((0.2, 0.3, 0.5),) * 3,  # no memory: all information is 0
        # States that are never visited carry none.
        ((0.5, 0.5, 0.0), (0.2, 0.8, 0.0), (0.3, 0.3, 0.4)),
        ((0.3, 0.3, 0.4), (0.0, 0.5, 0.5), (0.0, 0.2, 0.8)),
        ((1.0, 0.0), (0.5, 0.5)),
    ],
)
def test_information_and_g_of_extreme_matrices(rows: tuple[tuple[float, ...], ...]) -> None:
    for graph in (chain(5), forest(-1, 0, 0, 1, 2), forest(-1, 0, -1, 2, 0)):
        check_against_enumeration(graph, rows)


def test_the_diagonal_counts_the_states_that_occur() -> None:
    """The definition sums over states of positive probability: not S - 1 once one absorbs."""
    absorbing = FixedTransition(((0.5, 0.5, 0.0), (0.5, 0.5, 0.0), (0.2, 0.3, 0.5)))
    theory = pairwise_theory(chain(4), absorbing)
    torch.testing.assert_close(theory.chi2.diagonal(), torch.ones(4, dtype=torch.float64))
    ergodic = FixedTransition(((0.5, 0.5, 0.0), (0.4, 0.5, 0.1), (0.2, 0.3, 0.5)))
    theory = pairwise_theory(chain(4), ergodic)
    torch.testing.assert_close(theory.chi2.diagonal(), torch.full((4,), 2.0, dtype=torch.float64))
    # Roots of the task with several parents are uniform: its first position takes every state.
    rooted = SeveralParentsTask(k_gram(4, 1), FixedTransition(((1.0, 0.0), (1.0, 0.0))))
    assert parent_information(rooted).chi2.diagonal().tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_self_and_independent_pairs() -> None:
    prior = DirichletPrior.symmetric(0.5, vocab_size=4)
    theory = pairwise_theory(forest(-1, -1, 0), prior, n_priors=50, generator=seeded())
    torch.testing.assert_close(theory.chi2.diagonal(), torch.full((3,), 3.0, dtype=torch.float64))
    for i, j in ((0, 1), (1, 2)):
        assert theory.chi2[i, j] == theory.shannon[i, j] == theory.g[max(i, j), min(i, j)] == 0
    assert torch.equal(theory.chi2, theory.chi2.T)
    assert torch.equal(theory.shannon, theory.shannon.T)
    assert torch.equal(theory.g, theory.g.tril())


def check_bounds(theory: PairwiseTheory) -> None:
    """g_ij <= E sqrt(I_ij I_i,parent(i)) <= E I_i,parent(i) in every row with a parent."""
    for i, parent in enumerate(theory.graph.parent_array()):
        if parent < 0:
            assert (theory.g[i, :i] == 0).all()
            continue
        direct = theory.chi2[i, parent]
        slack = 1e-9 * (1 + theory.chi2.max())
        assert (theory.g[i, : i + 1] <= theory.bound[i, : i + 1] + slack).all()
        assert (theory.bound[i, :i] <= direct + slack).all()
        assert abs(theory.g[i, parent] - direct) <= slack


@settings(max_examples=60)
@given(
    parents=parent_lists(most=12),
    alpha=st.sampled_from([0.05, 0.1, 0.5, 1.0, 3.0]),
    vocab_size=st.integers(2, 6),
    seed=st.integers(0, 10**6),
)
def test_g_stays_below_its_bound_and_that_below_the_direct_information(
    parents: list[int], alpha: float, vocab_size: int, seed: int
) -> None:
    graph = forest(*parents)
    prior = DirichletPrior.symmetric(alpha, vocab_size)
    check_bounds(pairwise_theory(graph, prior, n_priors=3, generator=seeded(seed)))
    matrix = prior.sample(1, generator=seeded(seed), dtype=torch.float64)[0]
    check_bounds(pairwise_theory(graph, FixedTransition.from_matrix(matrix)))


@settings(max_examples=50)
@given(parents=parent_lists(most=12))
def test_pair_distances_are_those_to_the_lowest_common_ancestor(parents: list[int]) -> None:
    graph = forest(*parents)
    distances = pair_distances(graph)
    digraph = graph.to_networkx()
    for i in range(graph.n_positions):
        for j in range(graph.n_positions):
            ancestor = nx.lowest_common_ancestor(digraph, i, j)
            if ancestor is None:
                assert distances.up[i, j] == distances.index[i, j] == -1
                continue
            m, n = (nx.shortest_path_length(digraph, ancestor, node) for node in (i, j))
            assert distances.up[i, j] == m
            assert tuple(distances.pairs[distances.index[i, j]]) == (min(m, n), max(m, n))


@pytest.mark.parametrize("graph", [chain(1000), random_tree(1000, generator=seeded(1))])
def test_a_thousand_positions_are_no_trouble(graph: CausalGraph) -> None:
    prior = DirichletPrior.symmetric(1.0, vocab_size=3)
    theory = pairwise_theory(graph, prior, n_priors=20, generator=seeded())
    assert theory.g.shape == (1000, 1000)
    assert theory.predicted_gradient.shape == (1001, 1001)
    for values in (theory.chi2, theory.shannon, theory.g, theory.bound, theory.chi2_stderr):
        assert values.isfinite().all()
    assert (theory.g.argmax(1)[1:] == torch.tensor(graph.parent_array()[1:])).all()


@pytest.mark.parametrize("alpha", [0.1, 1.0])
@pytest.mark.parametrize(
    "graph",
    [
        chain(12),
        lag_chain(12, 3),
        icl_pairs(12),
        random_tree(12, generator=seeded(1)),
        random_forest(12, edge_probability=0.5, generator=seeded(2)),
        star(12),
        binary_tree(12),
        interleaved_chains(12, 3, generator=seeded(3)),
        forest(-1, 0, 0, 1, 2),
        forest(-1, -1, -1),
    ],
)
def test_predicted_edges_are_the_true_edges(graph: CausalGraph, alpha: float) -> None:
    prior = DirichletPrior.symmetric(alpha, vocab_size=4)
    theory = pairwise_theory(graph, prior, n_priors=300, generator=seeded())
    assert theory.predicted_edges() == graph.edges


def test_standard_errors_are_those_of_repeated_runs() -> None:
    graph, prior = forest(-1, 0, 1, 0), DirichletPrior.symmetric(1.0, vocab_size=3)
    runs = [pairwise_theory(graph, prior, n_priors=100, generator=seeded(s)) for s in range(200)]
    related = torch.ones(4, 4, dtype=torch.bool).tril(-1)
    for name in ("chi2", "shannon", "g"):
        values = torch.stack([getattr(run, name)[related] for run in runs])
        stated = torch.stack([getattr(run, f"{name}_stderr")[related] for run in runs])
        # The spread of 200 values is known to 1/sqrt(400) = 5 %; heavy tails widen that.
        ratio = values.std(0) / stated.square().mean(0).sqrt()
        assert (ratio - 1).abs().max() < 0.2


def test_standard_errors_of_a_fixed_matrix_are_0_and_one_draw_has_none() -> None:
    theory = pairwise_theory(chain(3), FixedTransition(((0.9, 0.1), (0.2, 0.8))))
    assert theory.n_priors == 1
    assert not theory.chi2_stderr.any()
    assert not theory.g_stderr.any()
    with pytest.raises(ValueError, match="n_priors is 1"):
        pairwise_theory(chain(3), DirichletPrior.symmetric(1.0, vocab_size=2), n_priors=1)
    with pytest.raises(GraphError, match="2 parents"):
        pair_distances(two_parents(5))


def test_a_time_limit_is_counted_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechcausal.theory.pairwise._MAX_ELEMENTS", 40_000)  # 19 draws at a time
    graph, prior = chain(19), DirichletPrior.symmetric(0.1, vocab_size=10)
    limited = [
        pairwise_theory(graph, prior, n_priors=5000, generator=seeded(1), max_seconds=0.02)
        for _ in range(2)
    ]
    n_priors = limited[0].n_priors
    assert 2 <= n_priors == limited[1].n_priors < 5000 == limited[0].n_wanted
    assert torch.equal(limited[0].g, limited[1].g)
    told: list[tuple[int, int]] = []
    free = pairwise_theory(
        graph,
        prior,
        n_priors=n_priors,
        generator=seeded(1),
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert torch.equal(free.chi2, limited[0].chi2)
    assert told[-1] == (n_priors, n_priors)
    assert theory_notes(free, "this") == []
    (note,) = theory_notes(limited[0], "this")
    for part in (f"{n_priors:,} draws", "5,000", "raise this", "largest standard error"):
        assert part in note


@pytest.mark.parametrize("graph", [chain(900), forest(*[-1, 0, 0, *range(1, 300)])])
def test_distances_beyond_the_range_of_float64_carry_no_information(graph: CausalGraph) -> None:
    prior = DirichletPrior.symmetric(5.0, vocab_size=4)
    theory = pairwise_theory(graph, prior, n_priors=3, generator=seeded(2))
    distance = torch.from_numpy(pair_distances(graph).up)
    total = distance + distance.T
    for name in ("chi2", "shannon", "g"):
        values = getattr(theory, name)
        assert values.isfinite().all()
        assert not values[total > 800].any()
    near = (total <= 40) & (total >= 1)
    assert (theory.chi2[near] > 0).all()


def test_predicted_gradient_is_the_formula() -> None:
    g = torch.rand(4, 4, generator=seeded(), dtype=torch.float64).tril()
    S, T, beta0 = 3, 5, 0.7
    gradient = predicted_gradient(g, S, beta0=beta0)
    by_hand = torch.zeros(T, T, dtype=torch.float64)
    for i in range(1, T):
        mean = sum(g[i - 1, k - 1] for k in range(1, i + 1)) / i
        for j in range(1, i + 1):
            by_hand[i - 1, j - 1] = beta0 / (S * T * i) * (g[i - 1, j - 1] - mean)
    torch.testing.assert_close(gradient, by_hand)
    assert gradient.sum(1).abs().max() < 1e-15


def measured_gradient(
    graph: CausalGraph, *, vocab_size: int, beta0: float, alpha: float, n_batches: int
) -> Tensor:
    """`-dL/dA1` at A1 = 0, A2 = beta0 I, mean over batches of 4,096 sequences."""
    task = SingleParentTask(graph, DirichletPrior.symmetric(alpha, vocab_size))
    model = SimplifiedTransformer(vocab_size, task.sequence_length)
    model.initialise(beta0=beta0)
    parameter, generator = model.parameters_by_name["A1"], seeded(31)
    total = torch.zeros(parameter.shape, dtype=torch.float64)
    for _ in range(n_batches):
        batch = task.sample(4096, generator=generator)
        loss = soft_cross_entropy(model(batch.tokens), batch.target, epsilon=1e-3)
        (gradient,) = torch.autograd.grad(loss, parameter)
        total -= gradient.double()
    length = task.sequence_length
    return total[0, vocab_size : vocab_size + length, :length] / n_batches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "vocab_size", "length", "least", "n_batches"),
    [
        ("chain", 3, 60, 0.98, 40),
        ("random tree", 10, 60, 0.98, 40),
        ("chain", 10, 20, 0.92, 20),
        ("random tree", 3, 20, 0.92, 20),
    ],
)
def test_the_measured_gradient_is_the_predicted_one(
    shape: str, vocab_size: int, length: int, least: float, n_batches: int
) -> None:
    graph = chain(length - 1) if shape == "chain" else random_tree(length - 1, generator=seeded(2))
    measured = measured_gradient(
        graph, vocab_size=vocab_size, beta0=0.01, alpha=1.0, n_batches=n_batches
    )
    prior = DirichletPrior.symmetric(1.0, vocab_size)
    theory = pairwise_theory(graph, prior, n_priors=2000, generator=seeded(), beta0=0.01)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    pair = torch.stack([measured[visible], theory.predicted_gradient[visible]])
    pearson = torch.corrcoef(pair)[0, 1].item()
    print(f"\n{shape}, S={vocab_size}, T={length}: Pearson {pearson:.3f} (at least {least})")
    assert pearson >= least


@pytest.mark.parametrize(
    ("graph", "vocab_size"),
    [
        *((graph, size) for graph in (chain(19), icl_pairs(19)) for size in (3, 10)),
        *(
            (random_forest(19, edge_probability=0.5, generator=seeded(seed)), size)
            for seed in (1, 2, 3, 5)  # 1 has a root at position 1, whose own key is its only rival
            for size in (3, 10)
        ),
        (lag_chain(19, 2), 3),
        (lag_chain(19, 2), 10),
    ],
)
def test_a_measured_gradient_names_the_edges_and_no_others(
    graph: CausalGraph, vocab_size: int
) -> None:
    task = SingleParentTask(graph, DirichletPrior.symmetric(0.1, vocab_size))
    gradient, stderr = pattern_gradient(task, 4096, beta0=1.0, epsilon=1e-3, seed=41)
    assert edge_f1(named_edges(gradient, stderr), graph) == 1.0


def test_noise_names_edges_no_more_often_than_the_significance() -> None:
    n, repeats, significance = 12, 400, 0.05
    visible, generator = torch.ones(n, n).tril(), seeded(51)
    named = 0
    for _ in range(repeats):
        noise = torch.randn(n, n, generator=generator) * visible
        centred = (noise - noise.sum(1, keepdim=True) / visible.sum(1, keepdim=True)) * visible
        keys = visible.sum(1, keepdim=True)
        stderr = ((1 - 1 / keys).sqrt() * visible).clamp(min=1e-9)
        named += len(named_edges(centred, stderr, significance=significance))
    rows = repeats * (n - 1)
    assert named / rows < significance + 4 * math.sqrt(significance / rows)


def test_named_edges_by_hand() -> None:
    assert named_edges(torch.zeros(4, 4), torch.ones(4, 4)) == ()
    gradient = torch.tensor(
        [
            [0.0, 0.0, 0.0, 0.0],
            [1.0, -1.0, 0.0, 0.0],
            [0.2, -0.1, -0.1, 0.0],  # a bias at a root: certain, but a fifth of an edge's contrast
            [-0.5, -0.5, 1.5, -0.5],
        ]
    )
    stderr = torch.full((4, 4), 1e-3)
    assert named_edges(gradient, stderr) == ((0, 1), (2, 3))
    assert named_edges(gradient, stderr, min_effect=0.1) == ((0, 1), (0, 2), (2, 3))
    own_is_largest = torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [-1.0, -1.0, 2.0]])
    assert named_edges(own_is_largest, stderr[:3, :3]) == ((0, 1),)
