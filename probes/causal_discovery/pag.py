"""Partial ancestral graphs (PAGs): the result of causal discovery with hidden variables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    import networkx as nx


class Mark(IntEnum):
    """The mark at one end of an edge."""

    NONE = 0
    """No edge."""
    CIRCLE = 1
    """Unknown."""
    ARROW = 2
    """This node is not an ancestor of the other."""
    TAIL = 3
    """This node is an ancestor of the other (or, under selection bias, of the selection)."""


_LEFT = {Mark.CIRCLE: "o", Mark.ARROW: "<", Mark.TAIL: "-"}
_RIGHT = {Mark.CIRCLE: "o", Mark.ARROW: ">", Mark.TAIL: "-"}


class Edge(NamedTuple):
    """An edge between two token positions; `marks`, such as `o->`, read from `start` to `end`."""

    start: int
    end: int
    marks: str

    def __str__(self) -> str:
        return f"{self.start} {self.marks} {self.end}"


@dataclass(frozen=True, eq=False)
class PAG:
    """A partial ancestral graph over token positions.

    `x --> y`: x is a cause (an ancestor) of y. `x <-> y`: neither causes the other; they have a
    hidden common cause. `x o-> y`: y does not cause x; x may cause y. `x o-o y`: nothing is known
    about the direction. No edge: some set of the other tokens makes the two independent.

    Attributes:
        nodes: distinct token positions, in any order.
        marks: `marks[i, j]` is the mark AT `nodes[j]` of the edge between `nodes[i]` and
            `nodes[j]`, a `Mark` (0 none, 1 circle, 2 arrow, 3 tail); read-only.

    Raises:
        ValueError: the marks are not such a matrix, or an edge has a mark at one end only.

    Source: Zhang 2008, "On the completeness of orientation rules for causal discovery in the
    presence of latent confounders and selection bias".

    >>> graph = PAG((0, 3, 5), np.array([[0, 2, 0], [1, 0, 2], [0, 2, 0]]))
    >>> print(graph)
    0 o-> 3
    3 <-> 5
    >>> graph.distances(0)
    {0: 0, 3: 1, 5: 2}
    """

    nodes: tuple[int, ...]
    marks: Int[np.ndarray, "node node"]

    def __post_init__(self) -> None:
        marks = np.array(self.marks, dtype=np.int8)
        n_nodes = len(self.nodes)
        if len(set(self.nodes)) != n_nodes:
            raise ValueError(f"nodes are {self.nodes}: each may occur once")
        if marks.shape != (n_nodes, n_nodes):
            raise ValueError(f"marks have shape {marks.shape}, there are {n_nodes} nodes")
        if not np.isin(marks, list(Mark)).all():
            raise ValueError("marks are 0 (none), 1 (circle), 2 (arrow) or 3 (tail)")
        if marks.diagonal().any() or ((marks == 0) != (marks == 0).T).any():
            raise ValueError("an edge joins two nodes and has a mark at both ends")
        marks.flags.writeable = False
        object.__setattr__(self, "nodes", tuple(int(node) for node in self.nodes))
        object.__setattr__(self, "marks", marks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PAG):
            return NotImplemented
        return self.nodes == other.nodes and bool((self.marks == other.marks).all())

    def __hash__(self) -> int:
        return hash((self.nodes, self.marks.tobytes()))

    def __str__(self) -> str:
        return "\n".join(map(str, self.edges()))

    def index(self, node: int) -> int:
        """The row of a token position in `marks`.

        Raises:
            ValueError: the position is not a node.
        """
        if node not in self.nodes:
            raise ValueError(
                f"position {node} is not a node; nodes: {', '.join(map(str, self.nodes))}"
            )
        return self.nodes.index(node)

    def mark(self, start: int, end: int) -> Mark:
        """The mark at `end` of the edge between two positions; `Mark.NONE` without an edge."""
        return Mark(int(self.marks[self.index(start), self.index(end)]))

    def neighbours(self, node: int) -> tuple[int, ...]:
        """The token positions that share an edge with this one, in the order of `nodes`."""
        return tuple(self.nodes[j] for j in np.flatnonzero(self.marks[self.index(node)]))

    def edges(self) -> list[Edge]:
        """Every edge once, earlier node first unless that end has the only arrowhead."""
        edges = []
        for i, j in np.argwhere(np.triu(self.marks)):
            at_i, at_j = Mark(int(self.marks[j, i])), Mark(int(self.marks[i, j]))
            if at_i == Mark.ARROW != at_j:
                i, j, at_i, at_j = j, i, at_j, at_i
            edges.append(Edge(self.nodes[i], self.nodes[j], f"{_LEFT[at_i]}-{_RIGHT[at_j]}"))
        return edges

    def distances(self, node: int) -> dict[int, int]:
        """The length of a shortest path from a position to every reachable one, nearest first.

        Paths may follow edges with any marks; the node itself has distance 0.

        Raises:
            ValueError: the position is not a node.
        """
        distances = {node: 0}
        frontier = [node]
        self.index(node)
        while frontier:
            reached = dict.fromkeys(near for one in frontier for near in self.neighbours(one))
            frontier = [near for near in reached if near not in distances]
            distances |= dict.fromkeys(frontier, max(distances.values()) + 1)
        return distances

    def to_networkx(self) -> "nx.DiGraph[int]":
        """A networkx graph with two directed edges per edge; u → v has `mark`, the `Mark` at v."""
        import networkx as nx

        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from(self.nodes)
        for i, j in np.argwhere(self.marks):
            mark = Mark(int(self.marks[i, j]))
            graph.add_edge(self.nodes[i], self.nodes[j], mark=mark)
        return graph

    def to_text(self, tokens: Mapping[int, str] | Sequence[str] | None = None) -> str:
        """One line per edge, such as `0 o-> 3`, followed by the tokens' text if given.

        Args:
            tokens: text by token position.
        """
        if tokens is None:
            return str(self)
        return "\n".join(
            f"{edge}   {tokens[edge.start]!r} {edge.marks} {tokens[edge.end]!r}"
            for edge in self.edges()
        )

    def to_dict(self) -> dict[str, Any]:
        """`{"nodes": [...], "edges": [{"from": i, "to": j, "marks": "o->"}, ...]}`, for JSON."""
        edges = [{"from": e.start, "to": e.end, "marks": e.marks} for e in self.edges()]
        return {"nodes": list(self.nodes), "edges": edges}
