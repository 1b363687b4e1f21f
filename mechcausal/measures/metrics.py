"""From readings of the probes and theory to the named figures of a probe step.

Figures of the gradient compare the descent direction `-dL/dA` with information theory; figures of
strategies compare predictions. (Those of a graph, attention against true parents: `matching`.)
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.theory import Information, PairwiseTheory

Matrix = Float[Tensor, "query key"]


def edge_hits(gradient: Matrix, graph: CausalGraph) -> float:
    """Share of rows with parents whose largest gradient entry, over keys j <= i, is a parent.

    NaN where there is no such row, or no gradient at all. In a task with several parents the last
    row, which serves the query, is left out.
    """
    rows = [i for i in graph.non_roots if i < _n_rows(graph)]
    if not rows or not bool(gradient.any()):
        return float("nan")
    largest = gradient.masked_fill(_future(gradient), -torch.inf).argmax(1).tolist()
    return sum(largest[i] in graph.parents[i] for i in rows) / len(rows)


def gradient_figures(
    gradient: Matrix, theory: Information, *, prefix: str = "gradient/"
) -> dict[str, float]:
    """The descent direction on layer-1 attention against what theory predicts.

    Rows are those of the graph; the row of the query (with several parents the last one, which
    serves it) is left out, since theory speaks of the graph. The prediction, which exists for
    single parents, is compared over all keys j <= i as it stands. Information is compared over keys
    j < i, because the information of a position with itself says nothing about edges; a row is
    scaled by its number of keys (the softmax's share) and both sides are centred by row.

    Args:
        gradient: `-dL/dscores` of layer 1, mean over sequences, [query, key].
        theory: for the same graph and prior.
        prefix: put before every name.

    Returns:
        `edge_hits`, and for `theory`, `chi2`, `shannon` a Pearson `_correlation` and a Spearman
        `_spearman`; NaN where one side is constant.
    """
    n = _n_rows(theory.graph)
    measured = gradient[:n, :n].double().cpu()
    figures = {}
    if theory.graph.edges:
        figures[f"{prefix}edge_hits"] = edge_hits(measured, theory.graph)
    visible = ~_future(measured)
    earlier = visible.tril(-1)
    pairs = {}
    if isinstance(theory, PairwiseTheory):
        pairs["theory"] = (measured[visible], theory.predicted_gradient[:n, :n][visible])
    n_keys = torch.arange(1, n + 1, dtype=measured.dtype).unsqueeze(1)
    scaled = _centred(measured * n_keys, earlier)[earlier]
    for name, information in (("chi2", theory.chi2), ("shannon", theory.shannon)):
        pairs[name] = (scaled, _centred(information[:n, :n], earlier)[earlier])
    for name, (left, right) in pairs.items():
        pearson, spearman = correlations(left, right)
        figures[f"{prefix}{name}_correlation"] = pearson
        figures[f"{prefix}{name}_spearman"] = spearman
    return figures


def edge_f1(named: tuple[tuple[int, int], ...], graph: CausalGraph) -> float:
    """F1 of named edges (parent, child) against the true ones; an edge at a root is false."""
    true = set(graph.edges)
    if not named and not true:
        return 1.0
    return 2 * len(true & set(named)) / (len(named) + len(true))


def strategy_figures(
    prediction: Float[Tensor, "batch vocab"],
    strategies: Mapping[str, Float[Tensor, "batch vocab"]],
    *,
    epsilon: float,
) -> dict[str, float]:
    """Mean `KL(prediction || strategy)` in nats, both smoothed by `epsilon`: 0 if they are equal.

    Without epsilon it is infinite where the model gives mass to a token that the strategy excludes.
    """
    normaliser = 1 + prediction.shape[1] * epsilon
    smoothed = (prediction.double() + epsilon) / normaliser
    figures = {}
    for name, strategy in strategies.items():
        ratio = smoothed / ((strategy.double() + epsilon) / normaliser)
        divergence = (smoothed * torch.where(smoothed > 0, ratio, 1.0).log()).sum(-1).mean()
        figures[f"strategy/kl_{name}"] = divergence.item()
    return figures


def induction_mask(
    tokens: Int[Tensor, "batch pos"], graph: CausalGraph
) -> Bool[Tensor, "batch query key"]:
    """Where layer 2's induction head should look on the task, as a mask for `AttentionTo`.

    In the row of the last position: the positions whose parents hold the query's token, or, with
    several parents, as many parents as the query has, holding the same tokens in the same order.
    """
    batch, length = tokens.shape
    mask = torch.zeros(batch, length, length, dtype=torch.bool, device=tokens.device)
    mask[:, -1] = induction_keys(tokens, graph)
    return mask


def induction_keys(
    tokens: Int[Tensor, "batch pos"], graph: CausalGraph
) -> Bool[Tensor, "batch key"]:
    """The last position's row of `induction_mask`, which is all of it."""
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
    """Pearson and Spearman correlation; NaN where a side is constant or has under two values."""
    if len(left) < 2 or bool((left == left[0]).all()) or bool((right == right[0]).all()):
        return float("nan"), float("nan")
    pair = np.stack([left.cpu().numpy(), right.cpu().numpy()])
    # Without scipy.stats, which loads for half a second and takes its time over p-values.
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


def _n_rows(graph: CausalGraph) -> int:
    """Rows of layer 1 that serve positions of the graph: all of them, or all but the last."""
    return graph.n_positions - (graph.query_parents is not None)


def _future(matrix: Tensor) -> Tensor:
    return torch.ones_like(matrix, dtype=torch.bool).triu(1)


def _centred(matrix: Tensor, where: Tensor) -> Tensor:
    """Minus the row's mean over `where`."""
    mean = (matrix * where).sum(1, keepdim=True) / where.sum(1, keepdim=True).clamp(min=1)
    return matrix - mean
