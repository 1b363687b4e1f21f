"""Averages over sequences."""

from jaxtyping import Float
from torch import Tensor

from probes.heads.in_context import standard_error


def sequence_mean(values: Float[Tensor, "batch"]) -> tuple[float, float]:
    """The mean over sequences, and its standard error; NaN for one sequence.

    Example:
        >>> import torch
        >>> sequence_mean(torch.tensor([1.0, 3.0]))
        (2.0, 1.0)
    """
    return values.mean().item(), standard_error(values).item()
