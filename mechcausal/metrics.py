"""From readings of the probes and theory to the named figures of a probe step.

Figures of a graph compare attention with the true parents; figures of the gradient compare the
descent direction `-dL/dA` with information theory; figures of strategies compare predictions.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.theory import PairwiseTheory

Matrix = Float[Tensor, "query key"]


def graph_figures(attention: Matrix, graph: CausalGraph) -> dict[str, float]:
    """How well an attention pattern shows the graph.

    Args:
        attention: layer-1 pattern, averaged over inputs where it depends on them.
        graph: single-parent graph.

    Returns:
        `graph/recovered`: share of edges whose parent gets the row's largest attention;
        `graph/parent_attention`: mean attention on the true parent. Empty without edges.
    """
    if not graph.edges:
        return {}
    parents, children = _edge_index(graph)
    rows = attention[children]
    return {
        "graph/recovered": (rows.argmax(1) == parents).double().mean().item(),
        "graph/parent_attention": rows.gather(1, parents.unsqueeze(1)).mean().item(),
    }


def edge_hits(gradient: Matrix, graph: CausalGraph) -> float:
    """Share of non-root rows whose largest gradient entry, over keys j <= i, is the parent."""
    parents, children = _edge_index(graph)
    visible = gradient.masked_fill(_future(gradient), -torch.inf)
    return (visible[children].argmax(1) == parents).double().mean().item()


def gradient_figures(
    gradient: Matrix, theory: PairwiseTheory, *, prefix: str = "gradient/"
) -> dict[str, float]:
    """The descent direction on layer-1 attention against what theory predicts.

    Rows are those of the graph; the query's row is left out, since theory speaks of the graph. The
    prediction is compared over all keys j <= i as it stands. Information is compared over keys
    j < i, because the information of a position with itself, S - 1, says nothing about edges; a
    row is scaled by its number of keys (the softmax's share) and both sides are centred by row.

    Args:
        gradient: `-dL/dscores` of layer 1, mean over sequences, [query, key].
        theory: for the same graph and prior.
        prefix: put before every name.

    Returns:
        `edge_hits`, and for `theory`, `chi2`, `shannon` a Pearson `_correlation` and a Spearman
        `_spearman`; NaN where one side is constant.
    """
    n = theory.graph.n_positions
    measured = gradient[:n, :n].double().cpu()
    figures = {}
    if theory.graph.edges:
        figures[f"{prefix}edge_hits"] = edge_hits(measured, theory.graph)
    visible = ~_future(measured)
    earlier = visible.tril(-1)
    pairs = {"theory": (measured[visible], theory.predicted_gradient[:n, :n][visible])}
    n_keys = torch.arange(1, n + 1, dtype=measured.dtype).unsqueeze(1)
    scaled = _centred(measured * n_keys, earlier)[earlier]
    for name, information in (("chi2", theory.chi2), ("shannon", theory.shannon)):
        pairs[name] = (scaled, _centred(information, earlier)[earlier])
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
    """Mean `KL(prediction || strategy)` in nats, for predictions smoothed by `epsilon`."""
    smoothed = (prediction + epsilon) / (1 + prediction.shape[1] * epsilon)
    figures = {}
    for name, strategy in strategies.items():
        divergence = torch.special.xlogy(smoothed, smoothed / strategy).sum(-1).mean()
        figures[f"strategy/kl_{name}"] = divergence.item()
    return figures


def induction_mask(
    tokens: Int[Tensor, "batch pos"], graph: CausalGraph
) -> Bool[Tensor, "batch query key"]:
    """Where layer 2's induction head should look on the task, as a mask for `AttentionTo`.

    In the row of the final query: the positions whose parent holds the query's token.
    """
    batch, length = tokens.shape
    mask = torch.zeros(batch, length, length, dtype=torch.bool, device=tokens.device)
    parents, children = (index.to(tokens.device) for index in _edge_index(graph))
    mask[:, -1, children] = tokens[:, parents] == tokens[:, -1:]
    return mask


def correlations(left: Float[Tensor, "n"], right: Float[Tensor, "n"]) -> tuple[float, float]:
    """Pearson and Spearman correlation; NaN where a side is constant or has under two values."""
    if len(left) < 2 or bool((left == left[0]).all()) or bool((right == right[0]).all()):
        return float("nan"), float("nan")
    pair = np.stack([left.cpu().numpy(), right.cpu().numpy()])
    # Without scipy's p-values, which would take longer than everything else in a probe step.
    ranks = stats.rankdata(pair, axis=1)
    return float(np.corrcoef(pair)[0, 1]), float(np.corrcoef(ranks)[0, 1])


def _edge_index(graph: CausalGraph) -> tuple[Tensor, Tensor]:
    edges = torch.tensor(graph.edges, dtype=torch.int64).view(-1, 2)
    return edges[:, 0], edges[:, 1]


def _future(matrix: Tensor) -> Tensor:
    return torch.ones_like(matrix, dtype=torch.bool).triu(1)


def _centred(matrix: Tensor, where: Tensor) -> Tensor:
    """Minus the row's mean over `where`."""
    mean = (matrix * where).sum(1, keepdim=True) / where.sum(1, keepdim=True).clamp(min=1)
    return matrix - mean
