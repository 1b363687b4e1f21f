"""From attention to (partial) correlations of its tokens.

Attention is read as a linear structural equation model, Z = G Z + Λ U with A = (I − G)⁻¹ Λ, so that
Cov(Z) ∝ A Aᵀ: each token is a row of A, and covariances are inner products of rows. A partial
correlation is then the cosine between two rows after the rows of the conditioning set are
projected out. No covariance is ever inverted: beside an attention sink all rows are nearly
parallel, A Aᵀ is nearly singular, and an inverse loses what a projection keeps.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Shaped
from scipy.linalg import qr
from torch import Tensor

ROW_SUM_TOLERANCE = 1e-2
"""Half precision rounds every entry, and the matrix may have been widened since; more than this is
no softmax."""
LATER_TOLERANCE = 1e-6
"""Weight above the diagonal up to which no token attends to a later one: float32 rounding."""
RESIDUAL_TOLERANCE = 1e-12
"""Share of a row's length below which what is left of it counts as rounding."""


def checked_attention(
    attention: Shaped[np.ndarray, "..."] | Shaped[Tensor, "..."],
) -> Float[np.ndarray, "query key"]:
    """One attention pattern as float64, if it is one.

    What rounding put below zero becomes 0: see `negative_tolerance`.

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
    """How far rounding may put a weight below zero: `n ε`, at most `ROW_SUM_TOLERANCE`.

    ε is that of the coarsest type that holds every entry, so that widening changes nothing.

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
    """Partial correlations of all pairs of nodes given a set of others.

    With Q an orthonormal basis of the given rows, `E = A − A Q Qᵀ` and `ρ[i, j]` is the cosine
    between rows i and j of E: −K₀₁ / sqrt(K₀₀ K₁₁) for K the inverse of the correlation of
    {i, j} ∪ given.

    Args:
        rows: one row a node, of any length.
        given: the nodes to condition on.

    Returns:
        ρ; NaN for pairs with a node that the given ones determine, themselves among them.
    """
    unit = _unit_rows(residual_rows(_unit_rows(rows), given))
    unit[~unit.any(1)] = np.nan
    return np.asarray(np.clip(unit @ unit.T, -1.0, 1.0))


def residual_rows(
    rows: Float[np.ndarray, "node source"], given: Sequence[int]
) -> Float[np.ndarray, "node source"]:
    """What is left of every row when the given rows are projected out; zeros where they span it."""
    if not len(given):
        return rows
    # Pivots put rows that the others span last: they would add a direction of rounding alone.
    directions, lengths, _ = qr(_unit_rows(rows[list(given)]).T, mode="economic", pivoting=True)
    basis = directions[:, np.abs(lengths.diagonal()) > RESIDUAL_TOLERANCE]
    residual = rows - (rows @ basis) @ basis.T
    # A second pass takes out what rounding left of the first where little remains of a row.
    residual = residual - (residual @ basis) @ basis.T
    before, after = np.linalg.norm(rows, axis=1), np.linalg.norm(residual, axis=1)
    residual[after <= RESIDUAL_TOLERANCE * before] = 0.0
    return np.asarray(residual)


def _unit_rows(rows: Float[np.ndarray, "node source"]) -> Float[np.ndarray, "node source"]:
    """The rows with length 1; zeros stay."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0))


def without_sink(
    rows: Float[np.ndarray, "node source"], sink: int
) -> Float[np.ndarray, "node-1 source"]:
    """The rows of the other nodes, given the sink's: its row projected out, and left out.

    Where the sink attends to itself alone, as the first token under causal attention must, this
    equals dropping its row and its column from the attention.

    Raises:
        ValueError: the sink is no row.

    >>> without_sink(np.array([[1.0, 0.0, 0.0], [0.7, 0.3, 0.0], [0.8, 0.1, 0.1]]), 0).round(6)
    array([[0. , 0.3, 0. ],
           [0. , 0.1, 0.1]])
    """
    if not 0 <= sink < len(rows):
        raise ValueError(f"the sink is position {sink}; there are positions 0 to {len(rows) - 1}")
    return np.delete(residual_rows(rows, (sink,)), sink, axis=0)
