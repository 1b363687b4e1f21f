"""The causal graph: a checked, immutable type with conversions to files, networkx and tensors.

Positions are numbered from 0 and every parent comes before its child, so position order is always a
topological order.
"""

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from mechcausal.graphs.edge_list import read_edge_list, write_edge_list
from mechcausal.graphs.faults import (
    MAX_EDGES,
    MAX_POSITIONS,
    QUERY,
    GraphError,
    not_before,
    order_fault,
)

if TYPE_CHECKING:
    import networkx as nx
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class CausalGraph:
    """The parents of every position of a sequence, and of the token to be predicted.

    Attributes:
        parents: For each of the n positions, its parents, all smaller than the position and sorted
            on construction; an empty tuple marks a root.
        query_parents: None for the single-parent task, where an extra query token, drawn uniformly,
            follows the n positions (T = n + 1). Otherwise the parents of the token to be predicted
            after the n positions (T = n).

    Raises:
        GraphError: The graph is empty or too large, has a cycle or an edge that points forward, or
            names a parent that is not an integer, negative or given twice.

    Source:
        Nichani, Damian and Lee, "How Transformers Learn Causal Structure with Gradient Descent",
        ICML 2024, arXiv 2402.14735.

    Example:
        >>> graph = CausalGraph(((), (0,), (0,), (1, 2)))
        >>> graph.roots, graph.depths, graph.max_parents
        ((0,), (0, 1, 1, 2), 2)
        >>> CausalGraph(((), (2,), (1,)))
        Traceback (most recent call last):
        mechcausal.graphs.faults.GraphError: cycle 1 → 2 → 1: every parent must come ...
    """

    parents: tuple[tuple[int, ...], ...]
    query_parents: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        n = len(self.parents)
        if n == 0:
            raise GraphError("the graph is empty: it needs at least one position")
        if n > MAX_POSITIONS:
            raise GraphError(f"the graph has more than {MAX_POSITIONS} positions, the most allowed")
        # With sorted parents, equal graphs compare and hash equal whatever the input order.
        rows = tuple(_ascending(row, f"position {i}") for i, row in enumerate(self.parents))
        object.__setattr__(self, "parents", rows)
        check_edges(sum(map(len, rows)))
        for edge in self.edges:
            if edge[0] >= edge[1]:
                raise GraphError(order_fault(edge, self.edges))
        if self.query_parents is not None:
            query_parents = _ascending(self.query_parents, "the query")
            if not query_parents:
                raise GraphError("the query has no parents: name at least one or pass None")
            if query_parents[-1] >= n:
                raise GraphError(not_before(query_parents[-1], "the query", n))
            object.__setattr__(self, "query_parents", query_parents)

    @classmethod
    def from_parents(
        cls,
        parents: Iterable[int | Iterable[int]],
        *,
        query_parents: Iterable[int] | None = None,
    ) -> "CausalGraph":
        """Build a graph from one entry per position: -1 for a root, a parent, or several parents.

        Raises:
            GraphError: An entry is none of these, or the graph is not valid.

        Example:
            >>> CausalGraph.from_parents([-1, 0, [1, 0]]).parents
            ((), (0,), (0, 1))
        """
        rows = []
        for child, entry in enumerate(_items(parents, "the graph")):
            if is_integer(entry):
                entry = () if entry == -1 else (entry,)
            rows.append(_ascending(entry, f"position {child}"))
        query = None if query_parents is None else _ascending(query_parents, "the query")
        return cls(tuple(rows), query)

    @classmethod
    def from_networkx(cls, digraph: "nx.DiGraph") -> "CausalGraph":
        """Build a graph from a networkx one whose nodes are 0..n-1 and, optionally, "query".

        Raises:
            GraphError: The argument is not directed, holds another node, or is not a valid graph.

        Example:
            >>> import networkx as nx
            >>> CausalGraph.from_networkx(nx.DiGraph([(0, 1), (1, 2)])).parents
            ((), (0,), (1,))
        """
        if not digraph.is_directed():
            raise GraphError(f"expected a networkx DiGraph, found a {type(digraph).__name__}")
        n = sum(node != QUERY for node in digraph)
        for node in digraph:
            if node != QUERY and not (is_integer(node) and 0 <= node < n):
                raise GraphError(
                    f"node {reprlib.repr(node)} is not a position: {n} positions are the"
                    f" integers 0 to {n - 1}, beside them only {QUERY!r} is allowed"
                )
        if QUERY in digraph and digraph.out_degree(QUERY):
            raise GraphError("the query cannot be a parent, found an edge that starts there")
        # Unlike predecessors, edges reveal the doubled edge of a multigraph.
        parents = [[int(parent) for parent, _ in digraph.in_edges(child)] for child in range(n)]
        query = [int(p) for p, _ in digraph.in_edges(QUERY)] if QUERY in digraph else None
        return cls.from_parents(parents, query_parents=query)

    @classmethod
    def from_edge_list(cls, path: str | Path) -> "CausalGraph":
        """Read a graph from a text file in the format of `mechcausal.graphs.edge_list`.

        Raises:
            GraphError: The file cannot be read or used; the message names the file and the line.
        """
        parents, query_parents = read_edge_list(path)
        return cls.from_parents(parents, query_parents=query_parents)

    def to_edge_list(self, path: str | Path) -> None:
        """Write a text file that `from_edge_list` reads back as an equal graph.

        Raises:
            GraphError: The file cannot be written.
        """
        write_edge_list(path, self.parents, self.query_parents)

    def to_networkx(self) -> "nx.DiGraph":
        """A networkx graph with the nodes 0..n-1 and, if the query has parents, "query".

        Example:
            >>> sorted(CausalGraph(((), (0,)), (1,)).to_networkx().edges(), key=str)
            [(0, 1), (1, 'query')]
        """
        import networkx as nx

        digraph = nx.DiGraph()
        digraph.add_nodes_from(range(self.n_positions))
        digraph.add_edges_from(self.edges)
        digraph.add_edges_from((parent, QUERY) for parent in self.query_parents or ())
        return digraph

    @property
    def n_positions(self) -> int:
        """The number n of graph positions, without the query token."""
        return len(self.parents)

    @property
    def sequence_length(self) -> int:
        """The number T of tokens the model sees: n + 1 with an extra query token, else n."""
        return self.n_positions + (self.query_parents is None)

    @property
    def roots(self) -> tuple[int, ...]:
        """The positions without a parent, ascending."""
        return tuple(child for child, row in enumerate(self.parents) if not row)

    @property
    def non_roots(self) -> tuple[int, ...]:
        """The positions with a parent, ascending."""
        return tuple(child for child, row in enumerate(self.parents) if row)

    @property
    def n_graph_rows(self) -> int:
        """Rows of layer 1's attention that belong to positions of the graph.

        If the query has parents, the last row serves the query instead.
        """
        return self.n_positions - (self.query_parents is not None)

    @property
    def child_rows(self) -> dict[int, tuple[int, ...]]:
        """The parents of each position whose row of layer 1's attention should show them.

        These are the positions with parents, except the last one if the query has parents: the
        last row then shows the query's parents.

        Example:
            >>> CausalGraph(((), (0,), (1,)), query_parents=(2,)).child_rows
            {1: (0,)}
        """
        return {child: row for child, row in enumerate(self.parents[: self.n_graph_rows]) if row}

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """All (parent, child) pairs, sorted by child, then parent; without the query's edges.

        Example:
            >>> CausalGraph(((), (0,), (0, 1))).edges
            ((0, 1), (0, 2), (1, 2))
        """
        return tuple((parent, child) for child, row in enumerate(self.parents) for parent in row)

    @property
    def max_parents(self) -> int:
        """The largest number of parents that a position or the query has."""
        return max(len(row) for row in (*self.parents, self.query_parents or ()))

    @property
    def is_single_parent(self) -> bool:
        """Whether this is a single-parent task: at most one parent each and a uniform query."""
        return self.query_parents is None and self.max_parents <= 1

    def parent_array(self) -> tuple[int, ...]:
        """The parent of each position, -1 for a root.

        Raises:
            GraphError: A position has several parents.

        Example:
            >>> CausalGraph(((), (0,), (), (2,))).parent_array()
            (-1, 0, -1, 2)
        """
        for child, row in enumerate(self.parents):
            if len(row) > 1:
                raise GraphError(
                    f"position {child} has {len(row)} parents, at most one is allowed here"
                )
        return tuple(row[0] if row else -1 for row in self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """The longest path from a root to each position, in edges: 0 for a root."""
        depths: list[int] = []
        for row in self.parents:
            depths.append(1 + max((depths[parent] for parent in row), default=-1))
        return tuple(depths)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The positions grouped by depth; all tokens of a level can be sampled at once.

        Example:
            >>> CausalGraph(((), (0,), (0,), (2,))).levels
            ((0,), (1, 2), (3,))
        """
        levels: list[list[int]] = [[] for _ in range(1 + max(self.depths))]
        for position, depth in enumerate(self.depths):
            levels[depth].append(position)
        return tuple(tuple(level) for level in levels)

    def adjacency(self) -> "Float[Tensor, 'n n']":
        """The n × n matrix with a one at [child, parent], like attention; without the query.

        Example:
            >>> CausalGraph(((), (0,), (1,))).adjacency().tolist()
            [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
        """
        import torch

        matrix = torch.zeros(self.n_positions, self.n_positions)
        for child, row in enumerate(self.parents):
            matrix[child, list(row)] = 1.0
        return matrix


def check_edges(n_edges: int) -> None:
    """Raise GraphError for more than `MAX_EDGES` edges."""
    if n_edges > MAX_EDGES:
        raise GraphError(f"the graph has {n_edges:,} edges: at most {MAX_EDGES:,} are allowed")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is a Python or numpy integer, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _items(value: Any, child: str) -> tuple[Any, ...]:
    try:
        # Stop after one item too many: the iterable may be endless.
        return tuple(islice(value, MAX_POSITIONS + 1))
    except TypeError as error:
        text = reprlib.repr(value)
        raise GraphError(f"the parents of {child} must be integers, got {text}") from error


def _ascending(row: object, child: str) -> tuple[int, ...]:
    """The parents of one child as sorted plain integers, without negatives and repeats."""
    parents = _items(row, child)
    for parent in parents:
        if not is_integer(parent):
            raise GraphError(f"parent {reprlib.repr(parent)} of {child} is not an integer")
        if parent < 0:
            raise GraphError(
                f"parent {parent} of {child} is out of range:"
                " positions start at 0, a root has no parents"
            )
    ascending = sorted(int(parent) for parent in parents)
    for parent, following in pairwise(ascending):
        if parent == following:
            raise GraphError(f"parent {parent} of {child} is given twice")
    return tuple(ascending)
