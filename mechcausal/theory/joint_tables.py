"""Information in joint tables of two variables."""

import torch
from jaxtyping import Float
from torch import Tensor


def table_information(
    joint: Float[Tensor, "*any row column"],
) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
    """chi-squared and Shannon information (nats) of joint distributions.

    `sum (P - P_x P_y)^2 / (P_x P_y)` and `sum P log(P / (P_x P_y))`; values of probability 0 add 0.

    Example:
        >>> chi2, shannon = table_information(torch.tensor([[0.5, 0.0], [0.0, 0.5]]))
        >>> round(chi2.item(), 4), round(shannon.item(), 4)  # S - 1, log 2
        (1.0, 0.6931)
    """
    independent = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    floored = independent.clamp(min=torch.finfo(joint.dtype).tiny)
    chi2 = ((joint - independent).square() / floored).sum((-2, -1))
    return chi2, torch.xlogy(joint, joint / floored).sum((-2, -1))
