"""Which head serves which parent, row by row.

With several heads nothing says which head of layer 1 attends to which parent, and nothing keeps the
heads from swapping parents from one row to the next. So each row of the graph is matched on its
own: every parent gets another head, such that the matched heads' attention on their parents is
largest in total.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mechcausal.graphs import CausalGraph

Heads = tuple[int | None, ...]
"""The head that serves each parent, parents ascending; None: fewer heads than parents."""


@dataclass(frozen=True)
class Matching:
    """The heads that serve the parents of each row.

    Attributes:
        rows: the heads of each position with parents, by position; without the last
            position where the graph names the query's parents, whom its row serves.
        query: the heads that serve the query's parents in the last position's row; None where the
            graph gives the query no parents.
    """

    rows: Mapping[int, Heads]
    query: Heads | None = None


def match_heads(attention: Float[Tensor, "head query key"], graph: CausalGraph) -> Matching:
    """Match the heads of layer 1 to the parents of every row.

    Row i's matching is the one with the largest `sum_p attention[head(p), i, p]` over the parents p
    of i, in which no head serves two parents. In a graph that names the query's parents the last
    position's row is matched with those instead of its own.

    Args:
        attention: layer-1 patterns, averaged over inputs where they depend on them.
        graph: any number of parents.

    Raises:
        ValueError: the patterns are not of the graph's sequence length.

    Example:
        >>> import torch
        >>> from mechcausal.graphs import k_gram
        >>> rows = torch.eye(5)
        >>> attention = torch.stack([rows[[0, 0, 0, 2, 2]], rows[[0, 0, 1, 1, 3]]])
        >>> matching = match_heads(attention, k_gram(5, 2))
        >>> matching.rows  # from row 2 to row 3 the heads swap
        {2: (0, 1), 3: (1, 0)}
        >>> matching.query
        (1, 0)
    """
    length = graph.sequence_length
    if attention.shape[1:] != (length, length):
        raise ValueError(
            f"attention has the shape {list(attention.shape)}: "
            f"the graph needs [head, {length}, {length}]"
        )
    values = attention.detach().double().cpu()
    query = None
    if graph.query_parents is not None:
        query = _matched(values[:, -1], graph.query_parents)
    rows = {child: _matched(values[:, child], row) for child, row in _rows(graph).items()}
    return Matching(rows, query)


def matching_figures(
    attention: Float[Tensor, "head query key"], graph: CausalGraph
) -> dict[str, float]:
    """How well the heads together show the graph, each row matched on its own.

    Args:
        attention: layer-1 patterns, averaged over inputs where they depend on them.
        graph: any number of parents.

    Returns:
        Over the edges of the rows of `match_heads`, empty where there are none:
        `graph/recovered`: share whose parent gets the largest attention of its matched head's row;
        `graph/parent_attention`: mean attention of the matched head on the parent, 0 unmatched;
        `graph/rows_matched`: share of the rows with every parent recovered;
        `graph/identified_rows_matched`: only where there are any, the same without
        `contested_rows`;
        `graph/head_consistency`: only with several heads, share of the rows with most parents in
        which the n-th parent has the same head, for every n, as in the commonest such row;
        `graph/query_attention`: only where the query has parents, their mean attention from the
        last position.

    Raises:
        ValueError: the patterns are not of the graph's sequence length.

    Example:
        >>> import torch
        >>> from mechcausal.graphs import k_gram
        >>> rows = torch.eye(5)
        >>> attention = torch.stack([rows[[0, 0, 0, 2, 2]], rows[[0, 0, 1, 1, 0]]])
        >>> figures = matching_figures(attention, k_gram(5, 2))
        >>> figures["graph/recovered"], figures["graph/head_consistency"]
        (1.0, 0.5)
        >>> figures["graph/query_attention"]  # the query's parents are 3 and 4
        0.0
    """
    matching = match_heads(attention, graph)
    values = attention.detach().cpu()
    largest = values.argmax(-1)
    recovered, given, whole = [], [], []
    for child, parents in _rows(graph).items():
        pairs = list(zip(matching.rows[child], parents, strict=True))
        hits = [head is not None and int(largest[head, child]) == p for head, p in pairs]
        recovered += hits
        whole.append(all(hits))
        given += [_attention(values[:, child], head, p) for head, p in pairs]
    figures = {}
    if recovered:
        figures["graph/recovered"] = _mean(recovered)
        figures["graph/parent_attention"] = _mean(given)
        figures["graph/rows_matched"] = _mean(whole)
        contested = contested_rows(graph)
        rows = zip(_rows(graph), whole, strict=True)
        identified = [hit for child, hit in rows if child not in contested]
        if identified and contested:
            figures["graph/identified_rows_matched"] = _mean(identified)
        if len(attention) > 1:
            most = max(map(len, matching.rows.values()))
            fullest = Counter(heads for heads in matching.rows.values() if len(heads) == most)
            figures["graph/head_consistency"] = max(fullest.values()) / fullest.total()
    if matching.query is not None:
        served = zip(matching.query, graph.query_parents or (), strict=True)
        figures["graph/query_attention"] = _mean([_attention(values[:, -1], *s) for s in served])
    return figures


def contested_rows(graph: CausalGraph) -> frozenset[int]:
    """Rows in which other attention predicts as well as attention to the parents, or better.

    All of them owe it to tokens that the query shows anyway, when the query has parents:

    - Rows with a parent among the query's: that a context equals the query's then says something
      about tokens of the query alone. Where p(i) = (a, b) and the query's parents are (b, c), both
      agree if and only if s_a = s_b = s_c, which two heads on a tell as well.
    - The row n - 2, where n - 2 is the last parent of the last position n - 1, and that the
      query's last. The last position's own row copies the query's parents, so its transition is
      lost; but its context equals the query's only if s_{n-2} = s_{n-1}, so row n - 2 can stand in
      for it: it attends to the parents of n - 1 and shows, in s_{n-2}, the token s_{n-1} that
      follows them. (On the two-parent graph with S = 5, T = 32 that is worth 0.06 nats to the
      hand-built solution, and trained models do it.)

    Example:
        >>> from mechcausal.graphs import two_parents
        >>> sorted(contested_rows(two_parents(32)))
        [16, 30]
    """
    if graph.query_parents is None:
        return frozenset()
    query, n = graph.query_parents, graph.n_positions
    contested = {child for child, row in _rows(graph).items() if set(row) & set(query)}
    last = graph.parents[n - 1]
    if last and last[-1] == n - 2 and query[-1] == n - 1 and len(last) == len(query):
        contested.add(n - 2)
    return frozenset(contested)


def _rows(graph: CausalGraph) -> dict[int, tuple[int, ...]]:
    """The parents of every position with some, without the position that serves the query."""
    last = graph.n_positions - (graph.query_parents is not None)
    return {child: row for child, row in enumerate(graph.parents[:last]) if row}


def _matched(row: Float[Tensor, "head key"], parents: tuple[int, ...]) -> Heads:
    heads, slots = linear_sum_assignment(row[:, list(parents)].numpy(), maximize=True)
    serves = dict(zip(slots.tolist(), heads.tolist(), strict=True))
    return tuple(serves.get(slot) for slot in range(len(parents)))


def _attention(row: Float[Tensor, "head key"], head: int | None, parent: int) -> float:
    return 0.0 if head is None else float(row[head, parent])


def _mean(values: list[float] | list[bool]) -> float:
    return sum(values) / len(values)
