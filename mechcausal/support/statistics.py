"""Means and their standard errors."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import torch
from jaxtyping import Float
from torch import Tensor

from probes.reading.labelled import standard_error


def sequence_mean(values: Float[Tensor, "batch"]) -> tuple[float, float]:
    """The mean over sequences, and its standard error; NaN for one sequence.

    Example:
        >>> sequence_mean(torch.tensor([1.0, 3.0]))
        (2.0, 1.0)
    """
    return values.mean().item(), standard_error(values).item()


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, which is None for a single value.

    Example:
        >>> mean_and_stderr([1.0, 3.0]), mean_and_stderr([2.0])
        ((2.0, 1.0), (2.0, None))
    """
    if len(values) < 2:
        return values[0], None
    return fmean(values), stdev(values) / math.sqrt(len(values))


def mean_of_moments(
    moments: Float[Tensor, "2 *any"], count: int
) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
    """The mean and its standard error from the sums of values and of squares; 0 for one value."""
    mean = moments[0] / count
    if count == 1:
        return mean, torch.zeros_like(mean)
    variance = (moments[1] / count - mean.square()).clamp(min=0) * count / (count - 1)
    return mean, (variance / count).sqrt()
