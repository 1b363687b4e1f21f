"""Tests of conditional independence: the interface, and partial correlations of attention."""

import math
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr

from probes.causal_discovery.linear_model import partial_correlation

_CACHE_BYTES = 64 * 2**20


@runtime_checkable
class IndependenceTest(Protocol):
    """Tests whether two variables are independent given others; variables are numbered from 0."""

    @property
    def n_variables(self) -> int:
        """The number of variables."""
        ...

    def p_value(self, i: int, j: int, given: tuple[int, ...]) -> float:
        """The p-value of independence; an oracle returns 0 or 1."""
        ...

    def independent(self, i: int, j: int, given: tuple[int, ...]) -> bool:
        """Whether the test accepts independence."""
        ...


def largest_given(n_eff: float | int) -> int:
    """The largest conditioning set that a test allows: the largest |S| with `n_eff > |S| + 3`.

    Args:
        n_eff: finite; if it is 3 or less, no test is possible and the result is negative.

    >>> largest_given(5), largest_given(64.5), largest_given(3)
    (1, 61, -1)
    """
    return math.ceil(n_eff) - 4


def p_value(rho: float, n_given: int, n_eff: float | int) -> float:
    """Two-sided p-value of a partial correlation by Fisher's z.

    `z = atanh ρ`, `p = 2 (1 − Φ(sqrt(n_eff − |S| − 3) |z|))`.

    Args:
        rho: the partial correlation.
        n_given: |S|, the size of the conditioning set.
        n_eff: effective number of samples. One forward pass has no samples: n_eff only sets the
            sparsity, and a larger one keeps more edges.

    Raises:
        ValueError: `n_eff <= |S| + 3`.

    >>> round(p_value(0.3, 1, 68.0), 4)
    0.0133
    """
    freedom = n_eff - n_given - 3
    if not freedom > 0:
        largest = largest_given(n_eff)
        allowed = f"conditioning on at most {largest} (max_cond)" if largest >= 0 else "no test"
        raise ValueError(
            f"n_eff is {n_eff:g}: a test given {n_given} tokens needs more than {n_given + 3}; "
            f"this n_eff allows {allowed}"
        )
    if abs(rho) >= 1:
        return 0.0
    return 2 * float(ndtr(-math.sqrt(freedom) * abs(math.atanh(rho))))


class PartialCorrelationTest:
    """Fisher's z on the partial correlations of a matrix's rows (see `linear_model`).

    Two variables count as independent if `p > alpha`. If the given variables determine one of the
    two, no test is possible: p is 0, so that the edge stays.

    Args:
        rows: one row per variable: rows of attention, or attention-weighted values.
        n_eff: see `p_value`.
        alpha: significance level of the test, above 0 and below 1.

    Raises:
        ValueError: `n_eff` is not above 3 and finite, or alpha is out of range.
    """

    def __init__(
        self, rows: Float[np.ndarray, "node source"], *, n_eff: float | int, alpha: float = 0.01
    ) -> None:
        if not (math.isfinite(n_eff) and n_eff > 3):
            raise ValueError(f"n_eff is {n_eff:g}; it must be above 3, and above |S| + 3")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha is {alpha:g}; it must be above 0 and below 1")
        self.n_eff = n_eff
        self.alpha = alpha
        self._rows = np.asarray(rows, dtype=np.float64)
        self._cache: dict[tuple[int, ...], np.ndarray] = {}
        self._cache_size = max(1, _CACHE_BYTES // max(1, 8 * len(rows) ** 2))

    @property
    def n_variables(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def partial_correlation(self, i: int, j: int, given: tuple[int, ...]) -> float:
        """ρ of two variables given others; NaN if the others determine one of the two."""
        given = tuple(sorted(given))
        matrix = self._cache.get(given)
        if matrix is None:
            # Searches go from one set size to the next, so old entries are not needed again.
            if len(self._cache) >= self._cache_size:
                self._cache.clear()
            matrix = self._cache[given] = partial_correlation(self._rows, given)
        return float(matrix[i, j])

    def p_value(self, i: int, j: int, given: tuple[int, ...]) -> float:
        """See the function `p_value`.

        Raises:
            ValueError: `n_eff <= |given| + 3`.
        """
        rho = self.partial_correlation(i, j, given)
        return p_value(1.0 if math.isnan(rho) else rho, len(given), self.n_eff)

    def independent(self, i: int, j: int, given: tuple[int, ...]) -> bool:
        """Whether `p > alpha`."""
        return self.p_value(i, j, given) > self.alpha
