"""Matching heads to parents, against all ways to do so."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from mechcausal.graphs import CausalGraph, chain, k_gram, random_forest, two_parents
from mechcausal.measures.matching import Matching, contested_rows, match_heads, matching_figures
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.tasks import Batch, build_task
from mechcausal.tasks.priors import DirichletPrior
from tests.oracles import forest, random_patterns, seeded

UNEVEN = CausalGraph(((), (0,), (), (0, 2), (1, 2, 3), (4,), (1, 5)), (2, 4, 5))


def patterns_of(graph: CausalGraph, swapped: tuple[int, ...] = ()) -> Tensor:
    """Two heads that serve both parents, in swapped order in some rows."""
    patterns = torch.zeros(2, graph.sequence_length, graph.sequence_length)
    for child, row in enumerate((*graph.parents[:-1], graph.query_parents or ())):
        heads = (1, 0) if child in swapped else (0, 1)
        for head, parent in zip(heads, row, strict=False):
            patterns[head, child, parent] = 1.0
    return patterns


def all_assignments(n_heads: int, n_parents: int) -> list[tuple[int | None, ...]]:
    """Every way to give parents different heads, as few as possible without one."""
    unused: list[int | None] = [None] * max(0, n_parents - n_heads)
    ways = permutations([*range(n_heads), *unused], n_parents)
    return list({way for way in ways if way.count(None) == len(unused)})


def served(row: Tensor, heads: tuple[int | None, ...], parents: tuple[int, ...]) -> list[float]:
    pairs = zip(heads, parents, strict=True)
    return [0.0 if h is None else row[h, p].item() for h, p in pairs]


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4])
@pytest.mark.parametrize("graph", [UNEVEN, k_gram(7, 3), two_parents(7)])
def test_no_other_assignment_gives_more_attention(graph: CausalGraph, n_heads: int) -> None:
    attention = random_patterns(n_heads, 7, seed=n_heads)
    matching = match_heads(attention, graph)
    rows = {child: row for child, row in enumerate(graph.parents[:-1]) if row}
    assert set(matching.rows) == set(rows)
    columns = [(attention[:, c], matching.rows[c], row) for c, row in rows.items()]
    assert matching.query is not None
    columns.append((attention[:, -1], matching.query, graph.query_parents or ()))
    for row, heads, parents in columns:
        ways = all_assignments(n_heads, len(parents))
        assert heads in ways
        most = max(sum(served(row, way, parents)) for way in ways)
        assert sum(served(row, heads, parents)) == pytest.approx(most)


@pytest.mark.parametrize("n_heads", [1, 2, 3])
def test_figures_equal_loops(n_heads: int) -> None:
    attention = random_patterns(n_heads, 7, seed=5)
    best, hits, matched = [], [], []
    for child, parents in enumerate(UNEVEN.parents[:-1]):
        row = attention[:, child]
        ways = all_assignments(n_heads, len(parents))
        heads = max(ways, key=lambda way: sum(served(row, way, parents)))
        best += served(row, heads, parents)
        hit = [
            h is not None and all(row[h, p] >= row[h, k] for k in range(7))
            for h, p in zip(heads, parents, strict=True)
        ]
        hits += hit
        matched += [all(hit)] if parents else []
    figures = matching_figures(attention, UNEVEN)
    assert figures["graph/parent_attention"] == pytest.approx(sum(best) / 7, rel=1e-6)
    assert figures["graph/recovered"] == pytest.approx(sum(hits) / 7)
    assert figures["graph/rows_matched"] == pytest.approx(sum(matched) / 4)
    assert ("graph/head_consistency" in figures) == (n_heads > 1)


@pytest.mark.parametrize("seed", range(3))
def test_one_head_and_single_parents_need_no_matching(seed: int) -> None:
    graph = random_forest(9, edge_probability=0.7, generator=seeded(seed))
    attention = random_patterns(1, 10, seed)
    hits = [int(attention[0, child].argmax()) == parent for parent, child in graph.edges]
    given = [attention[0, child, parent].item() for parent, child in graph.edges]
    figures = matching_figures(attention, graph)
    assert figures == {
        "graph/recovered": pytest.approx(sum(hits) / len(hits)),
        "graph/parent_attention": pytest.approx(sum(given) / len(given)),
        "graph/rows_matched": pytest.approx(sum(hits) / len(hits)),
    }


def test_heads_that_swap_parents_still_recover_the_graph() -> None:
    graph = k_gram(9, 2)  # rows 2 to 7 have two parents, row 8 serves the query
    matching = match_heads(patterns_of(graph, swapped=(3, 6)), graph)
    assert matching.rows == {c: (1, 0) if c in (3, 6) else (0, 1) for c in range(2, 8)}
    figures = matching_figures(patterns_of(graph, swapped=(3, 6)), graph)
    assert figures.pop("graph/head_consistency") == pytest.approx(4 / 6)
    assert set(figures.values()) == {1.0}
    assert len(figures) == 5


def test_consistency_counts_the_rows_with_most_parents_alone() -> None:
    graph = two_parents(8)  # row 1 has one parent, rows 2 to 6 two
    figures = matching_figures(patterns_of(graph, swapped=(1, 2)), graph)
    assert figures["graph/head_consistency"] == pytest.approx(4 / 5)


def test_parents_without_a_head_are_not_recovered() -> None:
    graph = k_gram(6, 2)
    attention = patterns_of(graph)[:1]
    figures = matching_figures(attention, graph)
    assert figures == {
        "graph/recovered": 0.5,
        "graph/parent_attention": 0.5,
        "graph/rows_matched": 0.0,
        "graph/identified_rows_matched": 0.0,
        "graph/query_attention": 0.5,
    }
    assert match_heads(attention, graph).query == (0, None)


def test_the_last_row_serves_the_query_and_not_its_own_parents() -> None:
    graph = CausalGraph(((), (0,), (1,)), (0,))
    attention = torch.eye(3)[[0, 0, 0]].unsqueeze(0)
    assert match_heads(attention, graph) == Matching({1: (0,)}, (0,))
    figures = matching_figures(attention, graph)
    assert (figures["graph/recovered"], figures["graph/query_attention"]) == (1.0, 1.0)


def test_a_graph_without_edges_has_no_figures() -> None:
    assert matching_figures(torch.eye(3).expand(2, 3, 3), forest(-1, -1)) == {}


def test_patterns_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 5, 5\]: the graph needs \[head, 6, 6\]"):
        match_heads(torch.rand(2, 5, 5), chain(5))


def ideal_losses(rows: dict[int, tuple[int, int]], batch: Batch) -> Tensor:
    """Losses of the hand-built solution of two_parents(32), two heads of some rows redirected."""
    graph = two_parents(32)
    model = DisentangledTransformer(5, 32, (2, 1))
    model.set_ideal(graph, beta=4.0, gain=4.0)
    with torch.no_grad():
        for row, keys in rows.items():
            for head, key in enumerate(keys):
                block = model.block(0, head, "position", "position")
                block[row] = 0.0
                block[row, key] = 50.0
        return -(batch.target * (model(batch.tokens) + 1e-9).log()).sum(-1)


@pytest.mark.parametrize(
    ("rows", "helps"), [({30: (15, 30)}, True), ({16: (7, 7)}, None), ({20: (9, 9)}, False)]
)
def test_contested_rows_need_not_attend_to_their_parents(
    rows: dict[int, tuple[int, int]], helps: bool | None
) -> None:
    task = build_task(two_parents(32), DirichletPrior.symmetric(0.1, 5))
    batch = task.sample(4000, generator=seeded(5))
    change = ideal_losses(rows, batch) - ideal_losses({}, batch)
    mean, stderr = change.mean().item(), change.std().item() / 4000**0.5
    assert (set(rows) <= contested_rows(two_parents(32))) == (helps is not False)
    if helps is None:
        assert abs(mean) < 0.005
    else:
        assert (mean < -4 * stderr) if helps else (mean > 4 * stderr)
