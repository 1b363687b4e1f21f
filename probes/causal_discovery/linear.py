"""Direct causal effects from attention as a linear structural equation model."""

import numpy as np
from jaxtyping import Float, Shaped
from torch import Tensor

from probes.causal_discovery.correlation import checked_attention

_LARGEST_CONDITION = 1e12


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
