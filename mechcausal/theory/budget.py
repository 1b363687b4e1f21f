"""How many draws of the prior an average can afford.

The cost of a draw is counted in operations. Nothing is timed, so that a recipe averages over the
same draws on every machine, and again when a run is resumed.
"""

from collections.abc import Callable

Report = Callable[[int, int], None]
"""Told how many draws have been averaged over, and of how many."""

# What one core of a busy machine does in a second: multiplications in products of float64
# matrices, and entries of joint tables from which information is summed.
PRODUCTS_PER_SECOND = 5e9
TABLE_ENTRIES_PER_SECOND = 2e7


def affordable(n_priors: int, *, max_seconds: float | None, seconds_each: float) -> int:
    """That many draws, or as many as fit into the time, but at least two.

    Example:
        >>> affordable(1000, max_seconds=60.0, seconds_each=0.5)
        120
    """
    if max_seconds is None or n_priors * seconds_each <= max_seconds:
        return n_priors
    return max(2, int(max_seconds / seconds_each))
