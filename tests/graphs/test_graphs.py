"""The graph type, its presets and its files: round trips, known small cases, one-line refusals."""

import os
import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from hypothesis import given
from hypothesis import strategies as st

from mechcausal.graphs import (
    PRESETS,
    CausalGraph,
    GraphError,
    binary_tree,
    build_preset,
    chain,
    interleaved_chains,
    k_gram,
    lag_chain,
    manual,
    random_forest,
    random_parents,
    random_tree,
    star,
    two_parents,
)
from mechcausal.graphs.edge_list import MAX_FILE_BYTES
from mechcausal.graphs.faults import MAX_POSITIONS
from tests.oracles import seeded
from tests.refusals import raises_one_line

PRESET_OPTIONS: dict[str, dict[str, object]] = {
    "lag_chain": {"lag": 2},
    "random_forest": {"edge_probability": 0.5},
    "interleaved_chains": {"n_chains": 3},
    "k_gram": {"k": 1},
}


def preset(name: str, n: int, seed: int = 0) -> CausalGraph:
    return build_preset(name, n, generator=seeded(seed), **PRESET_OPTIONS.get(name, {}))


def refusal(make: Callable[[], object]) -> str:
    """The message with which a graph is refused, which must be a single line."""
    with raises_one_line(GraphError) as caught:
        make()
    return str(caught.value)


@st.composite
def parent_rows(draw: st.DrawFn, most: int = 3) -> list[list[int]]:
    n = draw(st.integers(1, 12))
    rows: list[list[int]] = [[]]
    for child in range(1, n):
        rows.append(draw(st.lists(st.integers(0, child - 1), max_size=most, unique=True)))
    return rows


@st.composite
def descriptions(draw: st.DrawFn) -> dict[str, Any]:
    """The arguments of `manual` for a graph with or without parents of the query."""
    rows = draw(parent_rows())
    positions = st.integers(0, len(rows) - 1)
    query = draw(st.none() | st.lists(positions, min_size=1, max_size=3, unique=True))
    return {"parents": rows, "query_parents": query}


# --- The graph itself --------------------------------------------------------------------------


def test_a_small_graph_reads_as_drawn_on_paper() -> None:
    graph = manual([-1, 0, 0, 1, 2])
    assert graph.parents == ((), (0,), (0,), (1,), (2,))
    assert graph.parent_array() == (-1, 0, 0, 1, 2)
    assert graph.n_positions == 5
    assert graph.sequence_length == 6
    assert graph.roots == (0,)
    assert graph.non_roots == (1, 2, 3, 4)
    assert graph.edges == ((0, 1), (0, 2), (1, 3), (2, 4))
    assert graph.depths == (0, 1, 1, 2, 2)
    assert graph.levels == ((0,), (1, 2), (3, 4))
    assert graph.max_parents == 1
    assert graph.is_single_parent


def test_several_parents_take_the_longest_path_and_the_query_from_the_graph() -> None:
    graph = CausalGraph(((), (0,), (1, 0), ()), query_parents=(3, 0, 2))
    assert graph.parents[2] == (0, 1)
    assert graph.query_parents == (0, 2, 3)
    assert graph.sequence_length == 4
    assert graph.depths == (0, 1, 2, 0)
    assert graph.max_parents == 3
    assert not graph.is_single_parent
    assert "position 2 has 2 parents" in refusal(graph.parent_array)


def test_equal_graphs_compare_and_hash_equal_and_hold_plain_integers() -> None:
    first = CausalGraph(((), (), (0, 1)), query_parents=(0, 2))
    assert {first} == {CausalGraph(((), (), (1, 0)), query_parents=(2, 0))}
    graph = CausalGraph.from_networkx(nx.DiGraph([(np.int64(0), np.int64(1))]))
    assert graph == chain(2)
    assert all(type(end) is int for edge in graph.edges for end in edge)


@given(descriptions())
def test_depths_levels_rows_and_adjacency_agree(description: dict[str, Any]) -> None:
    graph = manual(**description)
    longest = {node: 0 for node in range(graph.n_positions)}
    for child in range(graph.n_positions):
        for parent in graph.parents[child]:
            longest[child] = max(longest[child], longest[parent] + 1)
    assert graph.depths == tuple(longest.values())
    assert graph.levels[0] == graph.roots
    assert sorted(position for level in graph.levels for position in level) == list(longest)
    assert all(graph.depths[i] == depth for depth, row in enumerate(graph.levels) for i in row)
    assert sorted((*graph.roots, *graph.non_roots)) == list(longest)
    last = graph.n_positions - 1
    serving = {i for i in graph.non_roots if graph.query_parents is None or i != last}
    assert graph.child_rows == {i: graph.parents[i] for i in serving}
    single = graph.query_parents is None and max(map(len, graph.parents)) <= 1
    assert graph.is_single_parent == single
    digraph = graph.to_networkx().subgraph(range(graph.n_positions))
    oracle = nx.to_numpy_array(digraph, nodelist=range(graph.n_positions)).T
    assert graph.adjacency().dtype == torch.float32
    assert np.array_equal(graph.adjacency().numpy(), oracle)
    assert not graph.adjacency().triu().any()


@given(descriptions(), parent_rows(most=1))
def test_round_trips(
    tmp_path_factory: pytest.TempPathFactory, description: dict[str, Any], single: list[list[int]]
) -> None:
    graph = manual(**description)
    assert CausalGraph.from_networkx(graph.to_networkx()) == graph
    path = tmp_path_factory.getbasetemp() / "graph.txt"
    graph.to_edge_list(path)
    assert CausalGraph.from_edge_list(path) == graph
    forest = CausalGraph.from_parents(single)
    assert CausalGraph.from_parents(forest.parent_array()) == forest


# --- Refused graphs ----------------------------------------------------------------------------

TOO_LOW = "is out of range: positions start at 0, a root has no parents"
FROM_PARENTS: list[tuple[list[Any], str]] = [
    ([], "the graph is empty: it needs at least one position"),
    ([-1, 2, 1], "cycle 1 → 2 → 1: every parent must come before its child"),
    ([-1, 1], "cycle 1 → 1: every parent must come before its child"),
    ([-1, 3, 1, 2], "cycle 1 → 2 → 3 → 1: every parent must come before its child"),
    (
        [-1, 0, 1, 5, -1, -1],
        "parent 5 of position 3 does not come before it: every parent must be < 3",
    ),
    ([-1, 9], "parent 9 of position 1 does not come before it: every parent must be < 1"),
    ([-1, [0, 0]], "parent 0 of position 1 is given twice"),
    ([-1, -2], f"parent -2 of position 1 {TOO_LOW}"),
    ([-1, [0, -1]], f"parent -1 of position 1 {TOO_LOW}"),
]
QUERY_PARENTS: list[tuple[list[int], str]] = [
    ([2], "parent 2 of the query does not come before it: every parent must be < 2"),
    ([0, 0], "parent 0 of the query is given twice"),
    ([], "the query has no parents: name at least one or pass None"),
]


def test_a_graph_that_cannot_be_is_refused_by_name() -> None:
    for parents, message in FROM_PARENTS:
        assert refusal(partial(CausalGraph.from_parents, parents)) == message
    for query_parents, message in QUERY_PARENTS:
        assert refusal(partial(manual, [-1, 0], query_parents=query_parents)) == message
    endless = range(-1, 10**12)
    message = refusal(lambda: CausalGraph.from_parents(endless))
    assert f"more than {MAX_POSITIONS} positions" in message
    n = MAX_POSITIONS
    message = refusal(lambda: CausalGraph.from_parents([n - 1, *range(n - 1)]))
    assert message.startswith(f"cycle 0 → 1 → 2 → 3 → 4 → 5 → 6 → 7 → … → {n - 1} → 0:")


@pytest.mark.parametrize(
    "parents",
    [5, None, "-1,0", [-1, True], [-1, 0.0], [-1, "0"], [-1, [0.5]], [-1, [False]], [-1, None]],
)
def test_anything_but_integers_is_refused(parents: Any) -> None:
    # Where annotations are checked at run time, the checker may speak before the graph does.
    with pytest.raises((GraphError, BeartypeCallHintViolation)):
        CausalGraph.from_parents(parents)


@given(parent_rows(), st.data())
def test_an_edge_that_closes_a_loop_names_a_true_cycle(
    rows: list[list[int]], data: st.DataObject
) -> None:
    graph = CausalGraph.from_parents(rows)
    digraph = graph.to_networkx()
    child = data.draw(st.sampled_from(range(graph.n_positions)))
    parent = data.draw(st.sampled_from(sorted(nx.descendants(digraph, child) | {child})))
    digraph.add_edge(parent, child)
    message = refusal(lambda: CausalGraph.from_networkx(digraph))
    named = re.match(r"cycle ([\d →]+):", message)
    assert named is not None
    nodes = [int(node) for node in named[1].split(" → ")]
    assert nodes[0] == nodes[-1] == min(nodes)
    assert all(digraph.has_edge(*edge) for edge in pairwise(nodes))


@pytest.mark.parametrize(
    ("digraph", "message"),
    [
        (nx.Graph([(0, 1)]), "expected a networkx DiGraph, found a Graph"),
        (nx.DiGraph([("a", 0)]), "node 'a' is not a position"),
        (nx.DiGraph([(0, 2)]), "node 2 is not a position: 2 positions are the integers 0 to 1"),
        (nx.DiGraph([(0, True)]), "node True is not a position"),
        (nx.DiGraph([(0, 1.0)]), "node 1.0 is not a position"),
        (nx.DiGraph([(0, 1), ("query", 1)]), "the query cannot be a parent"),
        (nx.DiGraph([(0, 1), (2, 1)]), "parent 2 of position 1 does not come before it"),
        (nx.DiGraph([(0, 1), (1, 0)]), "cycle 0 → 1 → 0"),
        (nx.MultiDiGraph([(0, 1), (0, 1)]), "parent 0 of position 1 is given twice"),
        (nx.DiGraph(), "the graph is empty"),
    ],
)
def test_networkx_graphs_of_another_kind_are_refused(digraph: Any, message: str) -> None:
    assert message in refusal(lambda: CausalGraph.from_networkx(digraph))


# --- Edge-list files ---------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "graph.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_an_edge_list_may_be_written_in_many_ways(
    written: Callable[[str | bytes], Path],
) -> None:
    text = "\ufeff# a graph\r\n0 1\r\n0,2 # comma\n\n 1 ->3\n2\t, 4\n007\n4->query\n0\tquery\n"
    graph = CausalGraph.from_edge_list(written(text))
    assert graph == manual([-1, 0, 0, 1, 2, -1, -1, -1], query_parents=[0, 4])


def test_an_edge_list_names_isolated_positions(tmp_path: Path) -> None:
    path = tmp_path / "graph.txt"
    manual([-1, 0, -1]).to_edge_list(path)
    assert path.read_text().splitlines()[1:] == ["2", "0 1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0 1\n0 1 2\n", ":2: found 3 fields, '0 1 2': allowed are 'parent child' or a lone"),
        ("0 x\n", ":1: found 'x': allowed are positions from 0 to 9999 or 'query'"),
        ("x\n", ":1: found 'x': allowed are positions from 0 to 9999"),
        ("# no\n\n-1 0\n", ":3: found '-1': allowed are positions from 0 to 9999"),
        ("0,\n", ":1: found '': allowed are positions"),
        ("0,1 2\n", ":1: found '1 2': allowed are positions"),
        ("0 1.0\n", ":1: found '1.0': allowed are positions"),
        ("0 ²\n", ":1: found '²': allowed are positions"),
        ("query 1\n", ":1: found 'query': allowed are positions"),
        ("0 Query\n", ":1: found 'Query': allowed are positions"),
        (f"0 {MAX_POSITIONS}\n", ":1: found '10000': allowed are positions from 0 to 9999"),
        ("9" * 100_000, ":1: found '99"),
        ("0 1\n1 2\n0->1\n", ":3: edge 0 → 1 is given twice, first on line 1"),
        ("0 query\n0 query\n", ":2: edge 0 → query is given twice, first on line 1"),
        ("0 1\n5 3\n", ":2: parent 5 of position 3 does not come before it: every parent must"),
        ("0 1\n2 1\n1 2\n", ":2: cycle 1 → 2 → 1: every parent must come before its child"),
        ("", ": found no edge: write one 'parent child' pair per line"),
        ("# only a comment\n", ": found no edge"),
        (b"0 1\0", ": not a text file"),
        (b"\xff\xfe\x80", ": not a text file"),
        (b"0 1\n" * (MAX_FILE_BYTES // 4 + 1), f": more than {MAX_FILE_BYTES} bytes"),
    ],
)
def test_a_bad_edge_list_is_refused_with_file_and_line(
    written: Callable[[str | bytes], Path], content: str | bytes, message: str
) -> None:
    path = written(content)
    text = refusal(lambda: CausalGraph.from_edge_list(path))
    assert text.startswith(f"{path}{message}")
    assert len(text) < len(str(path)) + 160


def test_files_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    missing, pipe, locked = tmp_path / "missing.txt", tmp_path / "pipe", tmp_path / "no" / "graph"
    os.mkfifo(pipe)
    read = CausalGraph.from_edge_list
    assert refusal(lambda: read(missing)) == f"{missing}: cannot be read: No such file or directory"
    assert refusal(lambda: read(tmp_path)) == f"{tmp_path}: cannot be read: not a plain file"
    assert refusal(lambda: read(pipe)) == f"{pipe}: cannot be read: not a plain file"
    assert "cannot be read" in refusal(lambda: read("a\0b"))
    assert "cannot be read" in refusal(lambda: read("x" * 5_000))
    assert "cannot be written" in refusal(lambda: chain(2).to_edge_list(locked))


# --- Presets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_at_every_size(name: str) -> None:
    for n in range(1, 41):
        graph = preset(name, n, seed=n)
        assert graph.n_positions == n
        assert graph.sequence_length == n + (graph.query_parents is None)
        assert graph == CausalGraph(graph.parents, graph.query_parents)
        assert graph.is_single_parent == (name not in {"two_parents", "k_gram"})


def test_presets_follow_their_formulas() -> None:
    # Small cases of each stand in the docstrings, which run as tests too.
    assert lag_chain(2, 5).parent_array() == (-1, -1)
    assert two_parents(1) == CausalGraph(((),), (0,))
    assert two_parents(6).parents == ((), (0,), (0, 1), (1, 2), (1, 3), (2, 4))
    assert two_parents(6).query_parents == (2, 5)
    assert k_gram(5, 3).parents == ((), (), (), (0, 1, 2), (1, 2, 3))
    assert k_gram(5, 3).query_parents == (2, 3, 4)
    assert k_gram(4, 1) == manual([-1, 0, 1, 2], query_parents=[3])


@given(st.integers(1, 60), st.integers(0, 2**31))
def test_a_random_tree_has_one_root_and_a_forest_is_part_of_it(n: int, seed: int) -> None:
    tree = random_tree(n, generator=seeded(seed))
    forest = random_forest(n, edge_probability=0.5, generator=seeded(seed))
    assert tree.roots == (0,)
    assert set(forest.edges) <= set(tree.edges)
    assert random_forest(n, edge_probability=1.0, generator=seeded(seed)) == tree
    assert random_forest(n, edge_probability=0.0, generator=seeded(seed)).edges == ()


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31))
def test_interleaved_chains_are_chains_and_none_is_empty(n: int, n_chains: int, seed: int) -> None:
    graph = interleaved_chains(n, n_chains, generator=seeded(seed))
    assert len(graph.roots) == min(n, n_chains)
    parents = [parent for parent, _ in graph.edges]
    assert len(parents) == len(set(parents))
    if n_chains == 1:
        assert graph == chain(n)


@pytest.mark.parametrize(("draw", "lowest"), [(random_tree, 0), (random_parents, -1)])
def test_random_parents_are_uniform(draw: Callable[..., CausalGraph], lowest: int) -> None:
    generator, draws = seeded(), 1_000
    last = [draw(6, generator=generator).parent_array()[-1] for _ in range(draws)]
    support = range(lowest, 5)
    assert set(last) == set(support)
    share = 1 / len(support)
    standard_error = (share * (1 - share) / draws) ** 0.5
    assert all(abs(last.count(p) / draws - share) < 5 * standard_error for p in support)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_depend_on_nothing_but_the_generator(name: str) -> None:
    assert preset(name, 30, seed=1) == preset(name, 30, seed=1)
    differs = preset(name, 30, seed=1) != preset(name, 30, seed=2)
    assert differs == ("random" in name or name == "interleaved_chains")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: chain(0), "the number of positions must be a whole number from 1 to 10000, got 0"),
        (lambda: star(MAX_POSITIONS + 1), "from 1 to 10000, got 10001"),
        (lambda: binary_tree(True), "got True"),
        (lambda: lag_chain(5, 0), "lag must be a whole number from 1 to 10000, got 0"),
        (lambda: k_gram(3, 4), "k must be a whole number from 1 to 3, got 4"),
        (lambda: interleaved_chains(3, 0, generator=seeded()), "n_chains must be a whole number"),
        *(
            (
                lambda p=p: random_forest(3, edge_probability=p, generator=seeded()),
                f"edge_probability must be a number from 0 to 1, got {p}",
            )
            for p in (1.5, float("nan"))
        ),
        (
            lambda: build_preset("chian", 5),
            "unknown graph preset 'chian' (did you mean 'chain'?): allowed are chain, ",
        ),
        (
            lambda: build_preset("zzz", 5),
            "unknown graph preset 'zzz': allowed are chain, lag_chain, ",
        ),
        (lambda: build_preset("lag_chain", 5), "preset 'lag_chain' needs the option 'lag'"),
        (lambda: build_preset("lag_chain", 5, lag=0), "lag must be a whole number from 1 to"),
        (
            lambda: build_preset("chain", 5, lag=2),
            "option 'lag' does not apply to preset 'chain': it takes no options",
        ),
        (
            lambda: build_preset("k_gram", 5, lag=2, k=2),
            "option 'lag' does not apply to preset 'k_gram': it takes k",
        ),
        (
            lambda: build_preset("k_gram", 5, **{"n": 2, "k": 2}),
            "option 'n' does not apply to preset 'k_gram': it takes k",
        ),
        (
            lambda: build_preset("random_tree", 5),
            "preset 'random_tree' is random: it needs a generator",
        ),
    ],
)
def test_bad_arguments_of_presets_are_refused(make: Callable[[], object], message: str) -> None:
    assert message in refusal(make)


def test_build_preset_leaves_the_generator_alone_where_nothing_is_random() -> None:
    generator = seeded()
    before = generator.get_state()
    assert build_preset("chain", 5, generator=generator) == chain(5)
    assert torch.equal(generator.get_state(), before)
