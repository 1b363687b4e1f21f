"""Limits of a graph, and messages about invalid graphs."""

from collections.abc import Sequence

MAX_POSITIONS = 10_000
"""The most positions that a graph may have: bounds the memory that a file or option can use."""

MAX_EDGES = 1_000_000
"""The most edges that a graph may have, without the query's."""

QUERY = "query"
"""The name of the predicted token in networkx graphs and edge-list files."""


class GraphError(ValueError):
    """An invalid causal graph, or an invalid description of one; the message is one line."""


def order_fault(edge: tuple[int, int], edges: Sequence[tuple[int, int]]) -> str:
    """The message about an edge whose parent does not come before its child."""
    import networkx as nx

    parent, child = edge
    digraph = nx.DiGraph(edges)
    if not nx.has_path(digraph, child, parent):
        return not_before(parent, f"position {child}", child)
    names = [str(node) for node in (*nx.shortest_path(digraph, child, parent), child)]
    if len(names) > 11:
        names[8:-2] = ["…"]
    return f"cycle {' → '.join(names)}: every parent must come before its child"


def not_before(parent: int, child: str, position: int) -> str:
    """The message about a parent that does not come before its child, which is at `position`."""
    return f"parent {parent} of {child} does not come before it: every parent must be < {position}"
