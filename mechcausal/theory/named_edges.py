"""The edges that a measured attention gradient names."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def named_edges(
    gradient: Float[Tensor, "pos pos"],
    stderr: Float[Tensor, "pos pos"],
    *,
    significance: float = 0.01,
    min_effect: float = 0.5,
) -> tuple[tuple[int, int], ...]:
    """The edges (parent, child) that a measured gradient names; rows of roots name none.

    The row's own key is biased, by the same amount in every row, because the prediction f contains
    the token itself; the bias is estimated from all rows and removed. A row then names its largest
    key if that lies before the query and passes two tests:

    1. its excess over the row's mean is significant at level `significance` (one-sided z test,
       Bonferroni correction over the row's keys);
    2. its contrast to the row's other keys is at least `min_effect` times that of a typical edge,
       defined as the upper quartile over the rows that pass the first test. Rows of roots have a
       bias of order 1/T, because f contains the tokens compared: with enough sequences it is
       significant, but it is small compared with an edge.

    Args:
        gradient: descent direction by [query, key] over the graph's positions, centred by row over
            keys j <= i, in a unit common to all rows: the gradient with respect to the pattern, or
            with respect to A1 at A1 = 0 with row i multiplied by its i keys.
        stderr: standard error of every entry.
        significance: probability that a row without any signal passes the first test.
        min_effect: share of a typical edge's contrast.
    """
    n = gradient.shape[0]
    gradient = _without_own_key_bias(gradient)
    hidden = torch.ones(n, n, dtype=torch.bool, device=gradient.device).triu(1)
    top, key = gradient.masked_fill(hidden, -torch.inf).max(1)
    score = (top / stderr.gather(1, key.unsqueeze(1)).squeeze(1)).tolist()
    # Among i + 1 keys the centred value of one is i / (i + 1) of its contrast to the others.
    contrast = [value * (i + 1) / max(i, 1) for i, value in enumerate(top.tolist())]
    critical = -torch.special.ndtri(significance / torch.arange(1, n + 1, dtype=torch.float64))
    passing = [i for i in range(1, n) if score[i] > critical[i]]  # row 0 has no other key
    if not passing:
        return ()
    typical = float(np.quantile([contrast[i] for i in passing], 0.75))
    keys = key.tolist()
    return tuple(
        (keys[i], i) for i in passing if keys[i] < i and contrast[i] >= min_effect * typical
    )


def _without_own_key_bias(gradient: Float[Tensor, "pos pos"]) -> Float[Tensor, "pos pos"]:
    """The row-centred gradient with the bias of its diagonal removed."""
    n = gradient.shape[0]
    rows = gradient.tolist()
    # Compare with the other keys except the largest, which may be an edge; so start at row 2.
    deficits = [np.mean(sorted(rows[i][:i])[:-1]) - rows[i][i] for i in range(2, n)]
    if not deficits:
        return gradient
    bias = max(0.0, float(np.quantile(deficits, 0.25)))
    raised = gradient + bias * torch.eye(n, device=gradient.device)
    n_keys = torch.arange(1, n + 1, device=gradient.device).unsqueeze(1)
    return (raised - raised.sum(1, keepdim=True) / n_keys).tril()
