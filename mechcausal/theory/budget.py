"""How many draws of the prior fit into a time limit.

The cost of a draw is counted in operations, not timed, so that a recipe averages over the same
draws on every machine and after a resume.
"""

from collections.abc import Callable

Report = Callable[[int, int], None]
"""Called with the number of draws done and their total."""

# Speed of one core of a busy machine: multiplications in products of float64 matrices, and entries
# of joint tables whose information is summed.
PRODUCTS_PER_SECOND = 5e9
TABLE_ENTRIES_PER_SECOND = 2e7


def affordable(n_priors: int, *, max_seconds: float | None, seconds_each: float) -> int:
    """The number of draws that fit into the time: at most `n_priors`, at least two.

    Example:
        >>> affordable(1000, max_seconds=60.0, seconds_each=0.5)
        120
    """
    if max_seconds is None or n_priors * seconds_each <= max_seconds:
        return n_priors
    return max(2, int(max_seconds / seconds_each))
