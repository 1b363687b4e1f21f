"""Compute the figures of a probe step from the readings of the probes and theory.

Gradient figures compare the descent direction `-dL/dA` with information theory. (`matching`
compares attention with the true parents, `strategies` compares predictions.)
"""

from statistics import fmean

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.theory import Information, PairwiseTheory
from probes.watching.agreement import row_by_row

Matrix = Float[Tensor, "query key"]


def edge_hits(gradient: Matrix, graph: CausalGraph) -> float:
    """Share of rows with parents whose largest gradient entry, over keys j <= i, is a parent.

    NaN if there is no such row or the gradient is 0. For several parents, the last row is excluded,
    because it serves the query.
    """
    rows = graph.child_rows
    if not rows or not bool(gradient.any()):
        return float("nan")
    largest = gradient.masked_fill(_future(gradient), -torch.inf).argmax(1).tolist()
    return fmean(largest[child] in parents for child, parents in rows.items())


def gradient_figures(
    gradient: Matrix, theory: Information, *, prefix: str = "gradient/"
) -> dict[str, float]:
    """Compare the descent direction on layer-1 attention with theory.

    Only rows of the graph are compared, not the row that serves the query. The predicted gradient
    (single parents only) is compared over all keys j <= i without scaling. Information is compared
    over keys j < i, because the information of a position with itself is unrelated to edges; each
    row of the gradient is multiplied by its number of keys, which undoes the softmax's factor at
    uniform attention, and both sides are centred by row.

    Args:
        gradient: `-dL/dscores` of layer 1, mean over sequences, [query, key].
        theory: for the same graph and prior.
        prefix: prefix of every name.

    Returns:
        `edge_hits`, and for `theory`, `chi2`, `shannon` a Pearson `_correlation` and a Spearman
        `_spearman`; NaN if one side is constant.
    """
    n = theory.graph.n_graph_rows
    measured = gradient[:n, :n].double().cpu()
    figures = {}
    if theory.graph.edges:
        figures[f"{prefix}edge_hits"] = edge_hits(measured, theory.graph)
    visible = ~_future(measured)
    pairs = {}
    if isinstance(theory, PairwiseTheory):
        pairs["theory"] = (measured[visible], theory.predicted_gradient[:n, :n][visible])
    n_keys = torch.arange(1, n + 1, dtype=measured.dtype).unsqueeze(1)
    for name, information in (("chi2", theory.chi2), ("shannon", theory.shannon)):
        left, right, compared = row_by_row(measured * n_keys, information[:n, :n], shift=0)
        pairs[name] = (left[compared], right[compared])
    for name, (left, right) in pairs.items():
        pearson, spearman = correlations(left, right)
        figures[f"{prefix}{name}_correlation"] = pearson
        figures[f"{prefix}{name}_spearman"] = spearman
    return figures


def edge_f1(named: tuple[tuple[int, int], ...], graph: CausalGraph) -> float:
    """F1 score of named edges (parent, child) against the true ones; 1 if both are empty."""
    true = set(graph.edges)
    if not named and not true:
        return 1.0
    return 2 * len(true & set(named)) / (len(named) + len(true))


def induction_mask(
    tokens: Int[Tensor, "batch pos"], graph: CausalGraph
) -> Bool[Tensor, "batch query key"]:
    """The keys that layer 2's induction head should attend to, as a mask for `AttentionTo`.

    Only the last position's row has targets: the positions whose parent holds the query's token.
    For several parents: the positions whose parents hold the same tokens, in the same order, as
    the query's parents.
    """
    batch, length = tokens.shape
    mask = torch.zeros(batch, length, length, dtype=torch.bool, device=tokens.device)
    mask[:, -1] = induction_keys(tokens, graph)
    return mask


def induction_keys(
    tokens: Int[Tensor, "batch pos"], graph: CausalGraph
) -> Bool[Tensor, "batch key"]:
    """The last position's row of `induction_mask`; all other rows are empty."""
    batch, length = tokens.shape
    keys = torch.zeros(batch, length, dtype=torch.bool, device=tokens.device)
    context = (length - 1,) if graph.query_parents is None else graph.query_parents
    children = [i for i in graph.non_roots if i < length - 1]
    children = [i for i in children if len(graph.parents[i]) == len(context)]
    parents = torch.tensor([graph.parents[i] for i in children], device=tokens.device)
    if children:
        same = tokens[:, parents] == tokens[:, None, list(context)]
        keys[:, children] = same.all(-1)
    return keys


def correlations(left: Float[Tensor, "n"], right: Float[Tensor, "n"]) -> tuple[float, float]:
    """Pearson and Spearman correlation; NaN if a side is constant or has one value."""
    if len(left) < 2 or bool((left == left[0]).all()) or bool((right == right[0]).all()):
        return float("nan"), float("nan")
    pair = np.stack([left.cpu().numpy(), right.cpu().numpy()])
    # scipy.stats takes half a second to import.
    ranks = np.stack([_ranks(values) for values in pair])
    return float(np.corrcoef(pair)[0, 1]), float(np.corrcoef(ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    order = np.argsort(values)
    ordered = values[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sizes = np.diff(first, append=len(values))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(first + (sizes + 1) / 2, sizes)
    return ranks


def _future(matrix: Tensor) -> Tensor:
    return torch.ones_like(matrix, dtype=torch.bool).triu(1)
