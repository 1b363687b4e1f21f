"""Figures against loops over the same entries and against cases computed by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from mechcausal.graphs import CausalGraph, chain, k_gram, random_forest
from mechcausal.measures.metrics import (
    correlations,
    edge_f1,
    edge_hits,
    gradient_figures,
    induction_mask,
)
from mechcausal.tasks.priors import DirichletPrior
from mechcausal.theory import PairwiseTheory, pairwise_theory
from tests.oracles import forest, seeded

GRAPHS = [chain(9), *(random_forest(9, edge_probability=0.6, generator=seeded(s)) for s in (1, 2))]


def theory_of(graph: CausalGraph) -> PairwiseTheory:
    prior = DirichletPrior.symmetric(0.5, vocab_size=3)
    return pairwise_theory(graph, prior, n_priors=50, generator=seeded())


def test_a_graph_without_edges_has_no_edge_hits() -> None:
    graph = forest(-1, -1)
    assert "gradient/edge_hits" not in gradient_figures(torch.eye(3), theory_of(graph))


@pytest.mark.parametrize("graph", GRAPHS)
def test_edge_hits_equal_loops_and_ignore_what_is_masked(graph: CausalGraph) -> None:
    gradient = torch.randn(10, 10, generator=seeded(4))
    gradient += 100 * torch.ones(10, 10).triu(1)
    hits = [
        max(range(child + 1), key=lambda k: gradient[child, k].item()) == parent
        for parent, child in graph.edges
    ]
    assert edge_hits(gradient, graph) == pytest.approx(np.mean(hits))


def test_edge_f1_by_hand() -> None:
    graph = forest(-1, 0, 1, -1)  # edges (0, 1), (1, 2)
    assert edge_f1(((0, 1), (1, 2)), graph) == 1.0
    assert edge_f1(((0, 1),), graph) == pytest.approx(2 / 3)  # precision 1, recall 1/2
    assert edge_f1(((0, 1), (0, 2)), graph) == pytest.approx(0.5)
    assert edge_f1(((0, 1), (1, 2), (0, 3)), graph) == pytest.approx(0.8)  # an edge at a root
    assert edge_f1((), graph) == 0.0
    assert edge_f1((), forest(-1, -1)) == 1.0
    assert edge_f1(((0, 1),), forest(-1, -1)) == 0.0


def test_correlations_are_those_of_numpy_and_of_ranks() -> None:
    x, y = torch.randn(2, 50, generator=seeded(5), dtype=torch.float64)
    y = y + x
    pearson, spearman = correlations(x, y.exp())
    assert pearson == pytest.approx(np.corrcoef(x, y.exp())[0, 1])
    ranks = [stats.rankdata(side) for side in (x, y)]
    assert spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize(
    ("left", "right"), [([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0], [2.0]), ([], [])]
)
def test_correlations_without_variation_are_not_a_number(
    left: list[float], right: list[float]
) -> None:
    for pair in ((left, right), (right, left)):
        values = correlations(*(torch.tensor(side, dtype=torch.float64) for side in pair))
        assert all(math.isnan(value) for value in values)


@pytest.mark.parametrize("graph", GRAPHS)
def test_gradient_figures_equal_loops(graph: CausalGraph) -> None:
    theory, n = theory_of(graph), graph.n_positions
    gradient = torch.randn(n + 1, n + 1, generator=seeded(6)).tril()
    figures = gradient_figures(gradient, theory)
    below = [(i, j) for i in range(n) for j in range(i + 1)]
    pearson = np.corrcoef(
        [gradient[i, j].item() for i, j in below],
        [theory.predicted_gradient[i, j].item() for i, j in below],
    )[0, 1]
    assert figures["gradient/theory_correlation"] == pytest.approx(pearson)
    for name, information in (("chi2", theory.chi2), ("shannon", theory.shannon)):
        left, right = [], []
        for i in range(1, n):
            scaled = (gradient[i, :i] * (i + 1)).double()
            left += (scaled - scaled.mean()).tolist()
            right += (information[i, :i] - information[i, :i].mean()).tolist()
        value = figures[f"gradient/{name}_correlation"]
        assert value == pytest.approx(np.corrcoef(left, right)[0, 1])
        value = figures[f"gradient/{name}_spearman"]
        assert value == pytest.approx(stats.spearmanr(left, right)[0], abs=0.02)
    assert figures["gradient/edge_hits"] == edge_hits(gradient, graph)


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_predicted_gradient_itself_scores_1(graph: CausalGraph) -> None:
    theory = theory_of(graph)
    figures = gradient_figures(theory.predicted_gradient, theory, prefix="x/")
    assert figures["x/theory_correlation"] == pytest.approx(1.0)
    assert figures["x/theory_spearman"] == pytest.approx(1.0)
    assert figures["x/edge_hits"] == 1.0


@pytest.mark.parametrize("graph", [*GRAPHS, forest(*[-1] * 9)])
def test_induction_mask_equals_loops(graph: CausalGraph) -> None:
    tokens = torch.randint(3, (6, 10), generator=seeded(9))
    mask = induction_mask(tokens, graph)
    expected = torch.zeros(6, 10, 10, dtype=torch.bool)
    for b in range(6):
        for parent, child in graph.edges:
            expected[b, 9, child] = tokens[b, parent] == tokens[b, 9]
    assert torch.equal(mask.bool(), expected)


def test_edge_hits_of_no_gradient_at_all_are_not_defined() -> None:
    assert math.isnan(edge_hits(torch.zeros(5, 5), forest(-1, 0, 0, 2)))


def test_edge_hits_of_several_parents_leave_out_the_row_of_the_query() -> None:
    graph = k_gram(4, 2)
    gradient = torch.zeros(4, 4)
    gradient[2, 1] = 1.0  # a parent; row 3, the last, serves the query
    gradient[3, 3] = 1.0
    assert edge_hits(gradient, graph) == 1.0
    gradient[2, 2] = 2.0
    assert edge_hits(gradient, graph) == 0.0


def test_the_induction_mask_of_several_parents_compares_whole_contexts_in_order() -> None:
    graph = k_gram(6, 2)
    tokens = torch.tensor([[0, 1, 2, 1, 0, 1], [1, 0, 2, 1, 1, 0]])
    mask = induction_mask(tokens, graph)
    assert mask[:, :-1].sum() == 0
    # Contexts (0, 1) and (1, 0): position 2 follows the same in both; 5 itself is never a key.
    assert mask[0, -1].nonzero().flatten().tolist() == [2]
    assert mask[1, -1].nonzero().flatten().tolist() == [2]
