"""Compare a model with simpler strategies: with each one, and with their nearest mixture."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torch import Tensor

MAX_ITERATIONS = 100
TOLERANCE = 1e-8
"""Nats by which the divergence may exceed the smallest one."""


@dataclass(frozen=True)
class Mixture:
    """The mixture of strategies nearest to a model.

    Attributes:
        weights: by strategy; they sum to 1. Of strategies that predict the same, only the sum of
            the weights is determined.
        divergence: `KL(model || mixture)`, the mean over predictions, nats; infinite if every
            strategy excludes a token that the model predicts.
    """

    weights: dict[str, float]
    divergence: float


def strategy_figures(
    prediction: Float[Tensor, "*any vocab"],
    strategies: Mapping[str, Float[Tensor, "*any vocab"]],
    *,
    epsilon: float,
) -> dict[str, float]:
    """Compare a model's predictions with every strategy and with their nearest mixture.

    All distributions are smoothed by `epsilon`.

    Returns:
        `strategy/kl_NAME`, the mean `KL(prediction || strategy)` in nats: 0 if equal, infinite if
        `epsilon` is 0 and the strategy excludes a token that the model predicts. With several
        strategies also `strategy/weight_NAME` and `strategy/mixture_kl`, see `nearest_mixture`.
    """
    smoothed = _smoothed(prediction, epsilon)
    by_name = {name: _smoothed(strategy, epsilon) for name, strategy in strategies.items()}
    figures = {
        f"strategy/kl_{name}": divergence(smoothed, strategy).item()
        for name, strategy in by_name.items()
    }
    if len(by_name) > 1:
        mixture = nearest_mixture(smoothed, by_name)
        figures |= {f"strategy/weight_{name}": w for name, w in mixture.weights.items()}
        figures["strategy/mixture_kl"] = mixture.divergence
    return figures


def nearest_mixture(
    prediction: Float[Tensor, "*any vocab"], strategies: Mapping[str, Float[Tensor, "*any vocab"]]
) -> Mixture:
    """The weights w that minimise the mean `KL(prediction || Σ_k w_k strategy_k)`.

    The problem is convex. Newton steps solve it: the divergence plus `Σ_k w_k` has its minimum over
    all `w >= 0` at weights that sum to 1, and each step minimises its quadratic approximation there
    by non-negative least squares. With `g_k = mean Σ_s p_s q_ks / (Σ_j w_j q_js)`, the divergence
    is at most `max_k g_k - 1` above the smallest; the steps end when that is below `TOLERANCE`.

    Args:
        prediction: the model's distributions.
        strategies: at least one, by name, each of the same shape.

    Example:
        >>> strategies = {"a": torch.tensor([[0.9, 0.1]]), "b": torch.tensor([[0.1, 0.9]])}
        >>> mixture = nearest_mixture(torch.tensor([[0.3, 0.7]]), strategies)
        >>> {name: round(weight, 6) for name, weight in mixture.weights.items()}
        {'a': 0.25, 'b': 0.75}

    Source:
        Kim, Carbonetto, Stephens and Anitescu 2020 (arXiv 1806.01412) for the steps; Park et al.
        2024 (arXiv 2412.01003) describe models by such weights.
    """
    n_predictions = prediction.numel() // prediction.shape[-1]
    share = prediction.double().flatten().cpu() / n_predictions
    likelihood = torch.stack([q.double().flatten().cpu() for q in strategies.values()])
    # A token that every strategy excludes says nothing about the weights.
    scored = (share > 0) & (likelihood > 0).any(0)
    p, q = share[scored], likelihood[:, scored]
    w = torch.full((len(q),), 1 / len(q), dtype=torch.float64)
    for _ in range(MAX_ITERATIONS):
        mixed = w @ q
        slope = q @ (p / mixed)
        if slope.max() - p.sum() < TOLERANCE:
            break
        w = _newton_step(w, p, q, slope)
    w = w / w.sum()
    mixed = torch.einsum("k,k...s->...s", w, torch.stack(list(strategies.values())).double().cpu())
    smallest = divergence(prediction.double().cpu(), mixed).item()
    return Mixture(dict(zip(strategies, w.tolist(), strict=True)), max(smallest, 0.0))


def _newton_step(
    w: Float[Tensor, "k"], p: Float[Tensor, "n"], q: Float[Tensor, "k n"], slope: Float[Tensor, "k"]
) -> Float[Tensor, "k"]:
    """The weights after one step, shortened until the objective does not rise."""
    curvature = (q * (p / (w @ q).square())) @ q.T
    ridge = 1e-12 * curvature.diagonal().mean() * torch.eye(len(w), dtype=w.dtype)
    factor = torch.linalg.cholesky(curvature + ridge)
    right = torch.linalg.solve_triangular(factor, (2 * slope - p.sum()).unsqueeze(1), upper=False)
    target = torch.from_numpy(nnls(factor.T.numpy(), right.squeeze(1).numpy())[0])
    before = _objective(w, p, q)
    for halvings in range(40):
        new = w + 0.5**halvings * (target - w)
        if _objective(new, p, q) <= before:
            return new
    return w


def _objective(w: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return p.sum() * w.sum() - (p * (w @ q).log()).sum()


def _smoothed(distribution: Tensor, epsilon: float) -> Tensor:
    return (distribution.double() + epsilon) / (1 + distribution.shape[-1] * epsilon)


def divergence(
    prediction: Float[Tensor, "*any vocab"], strategy: Float[Tensor, "*any vocab"]
) -> Float[Tensor, ""]:
    """Mean `KL(prediction || strategy)` in nats, with 0 log 0 = 0."""
    ratio = torch.where(prediction > 0, prediction / strategy, 1.0)
    return (prediction * ratio.log()).sum(-1).mean()
