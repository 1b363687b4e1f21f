"""What a model of a tree's leaves has not used yet: residual χ² of a leaf with its siblings.

The leaf at position i is hidden; y is its exact posterior given all other leaves, p the model's
prediction. At height h the leaf's sibling block is the other half of the subtree of 2^h leaves that
holds it: 2^(h-1) leaves, which count as one symbol b. With d = y - p, its mean d̄ over N trees, and
the residual covariance

    R[b,a] = mean of 1{block = b} (d(a) - d̄(a))

the residual χ² is

    ρ = Σ_ab (R[b,a]² - N⁻² Σ 1{block = b} (d(a) - d̄(a))²) / (P(b) P(a))

where the second term takes off each tree's product with itself. It is the χ²-information of leaf
and block while the prediction ignores the block, however wrong it is about the shares of symbols,
and 0 once the model has used everything that the block says about the leaf.
`probes.residual_information` is the same for causal models, by lag (`centred_chi2`).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Residual(NamedTuple):
    """Residual χ² at one height, the mean over hidden leaves.

    Attributes:
        block: with the sibling block as one symbol.
        pair: with single leaves of the block, the mean over them.
    """

    block: float
    pair: float


def residuals_by_height(
    leaves: Int[Tensor, "tree leaf"],
    exact: Float[Tensor, "tree leaf symbol"],
    predicted: Float[Tensor, "tree leaf symbol"],
) -> dict[int, Residual]:
    """Residual χ² by height, from 1 (neighbouring leaves) up.

    Args:
        leaves: symbols of independent trees; the number of leaves is a power of two.
        exact: the posterior of each leaf given all others.
        predicted: the model's prediction of each leaf, when that leaf is hidden.

    Returns:
        One entry for every height whose blocks have at most as many values as there are trees:
        with more, hardly two trees share a block.

    Example:
        >>> leaves = torch.tensor([[0, 0], [1, 1]] * 50)
        >>> exact = torch.nn.functional.one_hot(leaves.flip(1), 2).double()
        >>> residuals = residuals_by_height(leaves, exact, torch.full_like(exact, 0.5))
        >>> round(residuals[1].block, 2)  # a copy of a fair coin
        0.98
    """
    n_trees, n_leaves, n_symbols = exact.shape
    difference = exact.double() - predicted.double()
    difference -= difference.mean(0)
    share = exact.double().mean(0)
    by_height = {}
    for height in range(1, n_leaves.bit_length()):
        width = 2 ** (height - 1)
        if n_symbols**width > n_trees:
            break
        weights = n_symbols ** torch.arange(width, device=leaves.device)
        block, pair = [], []
        for position in range(n_leaves):
            start = (position // width ^ 1) * width
            siblings = leaves[:, start : start + width]
            residual, shares = difference[:, position], share[position]
            block.append(_chi2((siblings * weights).sum(1), residual, shares))
            pair += [_chi2(leaf, residual, shares) for leaf in siblings.unbind(1)]
        by_height[height] = Residual(sum(block) / len(block), sum(pair) / len(pair))
    return by_height


def _chi2(
    code: Int[Tensor, "tree"],
    residual: Float[Tensor, "tree symbol"],
    share: Float[Tensor, "symbol"],
) -> float:
    present, index = code.unique(return_inverse=True)
    joint = residual.new_zeros(len(present), residual.shape[1])
    squares = joint.clone().index_add_(0, index, residual.square())
    joint.index_add_(0, index, residual)
    count = index.bincount(minlength=len(present)).to(residual)
    expected = count.unsqueeze(1) * share * len(code)
    terms = torch.where(expected > 0, (joint.square() - squares) / expected, 0.0)
    return terms.sum().item()
