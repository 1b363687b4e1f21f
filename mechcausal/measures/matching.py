"""Match heads to parents, row by row.

Nothing determines which head of layer 1 attends to which parent, and heads may swap parents between
rows. So each row of the graph is matched separately: every parent gets a different head, such that
the total attention of the matched heads on their parents is largest.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mechcausal.graphs import CausalGraph

Heads = tuple[int | None, ...]
"""The head matched to each parent, parents ascending; None if there are too few heads."""


@dataclass(frozen=True)
class Matching:
    """The heads matched to the parents of each row.

    Attributes:
        rows: heads by position, for positions with parents; without the last position if the graph
            has query parents, because its row then serves the query.
        query: the heads matched to the query's parents in the last position's row; None if the
            graph has no query parents.
    """

    rows: Mapping[int, Heads]
    query: Heads | None = None


def match_heads(attention: Float[Tensor, "head query key"], graph: CausalGraph) -> Matching:
    """Match the heads of layer 1 to the parents of every row.

    Row i's matching maximises `sum_p attention[head(p), i, p]` over the parents p of i, with
    different heads for different parents. If the graph has query parents, the last position's row
    is matched to these instead of its own parents.

    Args:
        attention: layer-1 patterns, averaged over inputs if they depend on them.
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
    rows = {child: _matched(values[:, child], row) for child, row in graph.child_rows.items()}
    return Matching(rows, query)


def matching_figures(
    attention: Float[Tensor, "head query key"], graph: CausalGraph
) -> dict[str, float]:
    """How well all heads together show the graph, with each row matched separately.

    Args:
        attention: layer-1 patterns, averaged over inputs if they depend on them.
        graph: any number of parents.

    Returns:
        Figures over the rows of `match_heads` and their edges; empty without edges:
        `graph/recovered`: share of edges whose parent has the largest attention in its matched
        head's row;
        `graph/parent_attention`: mean attention of the matched head on the parent, 0 if unmatched;
        `graph/rows_matched`: share of rows in which every parent is recovered;
        `graph/identified_rows_matched`: the same without `contested_rows`, only if there are any;
        `graph/head_consistency`: only for several heads; among the rows with the most parents, the
        share that has the most common assignment of heads to parents;
        `graph/query_attention`: only if the query has parents; mean attention on these from the
        last position.

    Raises:
        ValueError: the patterns do not have the graph's sequence length.

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
    recovered, parent_attention, rows_matched = [], [], []
    for child, parents in graph.child_rows.items():
        pairs = list(zip(matching.rows[child], parents, strict=True))
        hits = [head is not None and int(largest[head, child]) == p for head, p in pairs]
        recovered += hits
        rows_matched.append(all(hits))
        parent_attention += [_attention(values[:, child], head, p) for head, p in pairs]
    figures = {}
    if recovered:
        figures["graph/recovered"] = fmean(recovered)
        figures["graph/parent_attention"] = fmean(parent_attention)
        figures["graph/rows_matched"] = fmean(rows_matched)
        contested = contested_rows(graph)
        rows = zip(graph.child_rows, rows_matched, strict=True)
        identified = [hit for child, hit in rows if child not in contested]
        if identified and contested:
            figures["graph/identified_rows_matched"] = fmean(identified)
        if len(attention) > 1:
            most = max(map(len, matching.rows.values()))
            fullest = Counter(heads for heads in matching.rows.values() if len(heads) == most)
            figures["graph/head_consistency"] = max(fullest.values()) / fullest.total()
    if matching.query is not None:
        served = zip(matching.query, graph.query_parents or (), strict=True)
        figures["graph/query_attention"] = fmean([_attention(values[:, -1], *s) for s in served])
    return figures


def contested_rows(graph: CausalGraph) -> frozenset[int]:
    """Rows in which attention elsewhere predicts at least as well as attention to the parents.

    Only graphs with query parents have such rows:

    - Rows that share a parent with the query. If p(i) = (a, b) and the query's parents are (b, c),
      the contexts are equal exactly if s_a = s_b = s_c, which two heads on a detect as well.
    - Row n - 2, if n - 2 is the last parent of the last position n - 1, and n - 1 the query's last
      parent. Row n - 1 copies the query's parents, so layer 1 loses the context of n - 1. This
      context equals the query's only if s_{n-2} = s_{n-1}; so row n - 2 can attend to the parents
      of n - 1, and its token s_{n-2} is the token that follows them.

    Example:
        >>> from mechcausal.graphs import two_parents
        >>> sorted(contested_rows(two_parents(32)))
        [16, 30]
    """
    if graph.query_parents is None:
        return frozenset()
    query, n = graph.query_parents, graph.n_positions
    contested = {child for child, row in graph.child_rows.items() if set(row) & set(query)}
    last = graph.parents[n - 1]
    if last and last[-1] == n - 2 and query[-1] == n - 1 and len(last) == len(query):
        contested.add(n - 2)
    return frozenset(contested)


def _matched(row: Float[Tensor, "head key"], parents: tuple[int, ...]) -> Heads:
    heads, slots = linear_sum_assignment(row[:, list(parents)].numpy(), maximize=True)
    serves = dict(zip(slots.tolist(), heads.tolist(), strict=True))
    return tuple(serves.get(slot) for slot in range(len(parents)))


def _attention(row: Float[Tensor, "head key"], head: int | None, parent: int) -> float:
    return 0.0 if head is None else float(row[head, parent])
