"""Attention A as a linear structural equation model: correlations of tokens, and direct effects.

With Z = G Z + Λ U and A = (I − G)⁻¹ Λ the covariance of the tokens is Cov(Z) ∝ A Aᵀ: each token is
a row of A, and covariances are inner products of rows. A partial correlation is the cosine between
two rows after projecting out the rows of the conditioning set. A projection is more accurate than
an inverse of A Aᵀ, which is nearly singular where an attention sink makes all rows nearly parallel.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Shaped
from scipy.linalg import qr
from torch import Tensor

ROW_SUM_TOLERANCE = 1e-2
"""Largest deviation of a row's sum from 1; allows for rows computed in half precision."""
LATER_TOLERANCE = 1e-6
"""Largest weight on a later token that counts as float32 rounding."""
RESIDUAL_TOLERANCE = 1e-12
"""A residual shorter than this share of its row counts as rounding."""
_LARGEST_CONDITION = 1e12


def checked_attention(
    attention: Shaped[np.ndarray, "..."] | Shaped[Tensor, "..."],
) -> Float[np.ndarray, "query key"]:
    """Check one attention pattern and return it as float64.

    Negative weights within `negative_tolerance` become 0.

    Args:
        attention: `[query key]`, rows that sum to 1 within `ROW_SUM_TOLERANCE`.

    Raises:
        ValueError: not a square matrix of numbers, NaN or infinite entries, entries that are
            negative beyond rounding, or rows that do not sum to 1.

    >>> checked_attention(np.array([[1.0, 0.0], [0.5, 0.4]]))
    Traceback (most recent call last):
    ValueError: row 1 of the attention sums to 0.9; each must sum to 1
    """
    if isinstance(attention, Tensor):
        attention = attention.detach().cpu()
        # NumPy has no bfloat16.
        attention = (attention.double() if attention.is_floating_point() else attention).numpy()
    if attention.dtype.kind not in "fiub":
        raise ValueError(f"the attention has type {attention.dtype}; real numbers are needed")
    if attention.ndim != 2 or attention.shape[0] != attention.shape[1] or not attention.size:
        raise ValueError(
            f"the attention has shape {tuple(attention.shape)}; one square matrix is needed, "
            "[query key]"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        matrix = attention.astype(np.float64)
    broken = ~np.isfinite(matrix)
    if broken.any():
        query, key = np.argwhere(broken)[0]
        raise ValueError(f"the attention has {matrix[query, key]} at [{query}, {key}]")
    tolerance = negative_tolerance(matrix)
    if (matrix < -tolerance).any():
        query, key = np.argwhere(matrix < -tolerance)[0]
        raise ValueError(
            f"the attention has {matrix[query, key]:g} at [{query}, {key}]; none may be negative "
            f"beyond rounding, {tolerance:.1g}"
        )
    matrix = matrix.clip(min=0.0)
    with np.errstate(over="ignore"):
        sums = matrix.sum(1)
    wrong = np.flatnonzero(np.abs(sums - 1) > ROW_SUM_TOLERANCE)
    if wrong.size:
        raise ValueError(
            f"row {wrong[0]} of the attention sums to {sums[wrong[0]]:.6g}; each must sum to 1"
        )
    return matrix


def negative_tolerance(matrix: Float[np.ndarray, "query key"]) -> float:
    """How far below 0 rounding may put a weight: `n ε`, at most `ROW_SUM_TOLERANCE`.

    ε belongs to the coarsest float type that holds every entry, so that a cast to a wider type does
    not change the tolerance.

    >>> f"{negative_tolerance(np.array([[1.0, 0.0], [0.3, 0.7]])):.1e}"
    '4.4e-16'
    """
    values = torch.from_numpy(matrix)
    kinds = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    kind = next(kind for kind in kinds if torch.equal(values.to(kind).double(), values))
    return min(len(matrix) * torch.finfo(kind).eps, ROW_SUM_TOLERANCE)


def correlation(rows: Float[np.ndarray, "node source"]) -> Float[np.ndarray, "node node"]:
    """The correlation matrix of C = A Aᵀ, `R[i, j] = C[i, j] / sqrt(C[i, i] C[j, j])`.

    It does not change when a row of A is scaled. A row of zeros gives NaN.

    >>> correlation(np.array([[1.0, 0.0], [0.5, 0.5]])).round(3)
    array([[1.   , 0.707],
           [0.707, 1.   ]])
    """
    return partial_correlation(rows, ())


def partial_correlation(
    rows: Float[np.ndarray, "node source"], given: Sequence[int]
) -> Float[np.ndarray, "node node"]:
    """Partial correlations of all pairs of nodes given a set of nodes.

    With Q an orthonormal basis of the given rows, `E = A − A Q Qᵀ` and `ρ[i, j]` is the cosine
    between rows i and j of E. This equals −K₀₁ / sqrt(K₀₀ K₁₁), where K is the inverse of the
    correlation matrix of {i, j} ∪ given.

    Args:
        rows: one row per node, of any length.
        given: the nodes to condition on.

    Returns:
        ρ; NaN for pairs with a given node or one that the given nodes determine.
    """
    unit = _unit_rows(residual_rows(_unit_rows(rows), given))
    unit[~unit.any(1)] = np.nan
    return np.asarray(np.clip(unit @ unit.T, -1.0, 1.0))


def residual_rows(
    rows: Float[np.ndarray, "node source"], given: Sequence[int]
) -> Float[np.ndarray, "node source"]:
    """Every row with the given rows projected out; zeros if they span it."""
    if not len(given):
        return rows
    # Pivoting puts linearly dependent rows last; their directions are rounding errors, and dropped.
    directions, lengths, _ = qr(_unit_rows(rows[list(given)]).T, mode="economic", pivoting=True)
    basis = directions[:, np.abs(lengths.diagonal()) > RESIDUAL_TOLERANCE]
    residual = rows - (rows @ basis) @ basis.T
    # The second pass removes the rounding errors of the first in very short residuals.
    residual = residual - (residual @ basis) @ basis.T
    before, after = np.linalg.norm(rows, axis=1), np.linalg.norm(residual, axis=1)
    residual[after <= RESIDUAL_TOLERANCE * before] = 0.0
    return np.asarray(residual)


def _unit_rows(rows: Float[np.ndarray, "node source"]) -> Float[np.ndarray, "node source"]:
    """The rows scaled to length 1; rows of zeros stay."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0))


def without_sink(
    rows: Float[np.ndarray, "node source"], sink: int
) -> Float[np.ndarray, "node-1 source"]:
    """The rows of the other nodes, with the sink's row projected out.

    If the sink attends only to itself, like the first token under causal attention, this equals
    dropping its row and its column from the attention.

    Raises:
        ValueError: there is no row `sink`.

    >>> without_sink(np.array([[1.0, 0.0, 0.0], [0.7, 0.3, 0.0], [0.8, 0.1, 0.1]]), 0).round(6)
    array([[0. , 0.3, 0. ],
           [0. , 0.1, 0.1]])
    """
    if not 0 <= sink < len(rows):
        raise ValueError(f"the sink is position {sink}; there are positions 0 to {len(rows) - 1}")
    return np.delete(residual_rows(rows, (sink,)), sink, axis=0)


def linear_effects(
    attention: Shaped[np.ndarray, "..."] | Shaped[Tensor, "..."],
) -> Float[np.ndarray, "query key"]:
    """The direct effects G of Z = G Z + Λ U, `G = I − diag(A) A⁻¹`.

    The formula follows from A = (I − G)⁻¹ Λ. `G[i, j]` is the effect of token j on token i. It is
    exact if there are no hidden variables; a hidden common cause gives a false effect.

    Args:
        attention: an invertible pattern `[query key]`, such as a causal one with a positive
            diagonal.

    Raises:
        ValueError: an invalid attention pattern, or one that cannot be inverted in float64.

    >>> linear_effects(np.array([[1.0, 0.0], [0.25, 0.75]])).round(6) + 0.0
    array([[0.  , 0.  ],
           [0.25, 0.  ]])
    """
    matrix = checked_attention(attention)
    condition = float(np.linalg.cond(matrix))
    if not condition < _LARGEST_CONDITION:
        raise ValueError(
            f"the attention cannot be inverted (condition number {condition:.1g}): "
            "linear effects need every token to attend to itself"
        )
    return np.asarray(np.eye(len(matrix)) - np.diag(matrix)[:, None] * np.linalg.inv(matrix))


def linear_edges(
    attention: Shaped[np.ndarray, "..."] | Shaped[Tensor, "..."], threshold: float = 1e-6
) -> tuple[tuple[int, int], ...]:
    """Pairs (cause, effect) of positions with a direct effect above a threshold.

    Args:
        attention: see `linear_effects`.
        threshold: lower bound on `|G[effect, cause]|`, in units of attention.

    Raises:
        ValueError: as `linear_effects`, or a threshold below 0.

    >>> linear_edges(np.array([[1.0, 0.0], [0.25, 0.75]]), threshold=0.1)
    ((0, 1),)
    """
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold:g}; it must be at least 0")
    effects = np.abs(linear_effects(attention))
    np.fill_diagonal(effects, 0.0)
    return tuple((int(j), int(i)) for i, j in np.argwhere(effects > threshold))
