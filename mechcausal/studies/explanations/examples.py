"""Examples of an application: inputs, the classes to predict, and the known causes."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PAD = 0
"""The token that replaces others, in every application."""


@dataclass(frozen=True)
class Examples:
    """Sequences with the classes to predict.

    Attributes:
        tokens: one sequence per row.
        target: the class of each.
        causes: True at the tokens that determine the class by the known rule; None without a rule.
    """

    tokens: Int[Tensor, "batch pos"]
    target: Int[Tensor, "batch"]
    causes: Bool[Tensor, "batch pos"] | None = None


def hidden_mask(
    tokens: Int[Tensor, "batch pos"], most: float, generator: torch.Generator
) -> Bool[Tensor, "batch pos"]:
    """Random mask of the tokens to replace by PAD in a training step.

    Explanations replace tokens by PAD; after such training these inputs are in distribution.

    Args:
        tokens: one sequence per row.
        most: largest share of hidden tokens; the share is drawn for each sequence.
        generator: generator on the tokens' device.
    """
    share = most * torch.rand(len(tokens), 1, generator=generator, device=tokens.device)
    return torch.rand(tokens.shape, generator=generator, device=tokens.device) < share
