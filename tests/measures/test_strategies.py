"""Divergences to strategies, and the weights of the nearest mixture."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

from mechcausal.measures.strategies import nearest_mixture, strategy_figures
from tests.oracles import seeded


def rows(n: int, vocab: int, *, seed: int, sharpness: float = 2.0) -> Tensor:
    scores = sharpness * torch.randn(n, vocab, generator=seeded(seed), dtype=torch.float64)
    return scores.softmax(-1)


def test_strategy_figures_equal_loops() -> None:
    prediction = torch.rand(4, 3, generator=seeded(7)).softmax(1)
    prediction[0] = torch.tensor([1.0, 0.0, 0.0])
    strategy = torch.rand(4, 3, generator=seeded(8)).softmax(1)
    epsilon, total = 0.01, 0.0
    for b in range(4):
        for s in range(3):
            p = (prediction[b, s].item() + epsilon) / (1 + 3 * epsilon)
            q = (strategy[b, s].item() + epsilon) / (1 + 3 * epsilon)
            total += p * math.log(p / q) / 4
    figures = strategy_figures(prediction, {"mine": strategy}, epsilon=epsilon)
    assert figures == {"strategy/kl_mine": pytest.approx(total, rel=1e-5)}


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_who_follows_a_strategy_is_no_distance_from_it(epsilon: float) -> None:
    """With tokens that it excludes, too."""
    prediction = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.25, 0.75]])
    figures = strategy_figures(prediction, {"mine": prediction}, epsilon=epsilon)
    assert figures["strategy/kl_mine"] == 0.0


def test_a_token_that_a_strategy_excludes_is_infinitely_far_only_without_smoothing() -> None:
    prediction, strategy = torch.tensor([[0.9, 0.1]]), torch.tensor([[1.0, 0.0]])
    unsmoothed = strategy_figures(prediction, {"mine": strategy}, epsilon=0.0)
    assert unsmoothed["strategy/kl_mine"] == math.inf
    smoothed = strategy_figures(prediction, {"mine": strategy}, epsilon=0.01)
    by_hand = (0.91 * math.log(0.91 / 1.01) + 0.11 * math.log(0.11 / 0.01)) / 1.02
    assert smoothed["strategy/kl_mine"] == pytest.approx(by_hand, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0, 3.0]), min_size=2, max_size=5).filter(any),
    st.integers(0, 2**16),
)
def test_a_mixture_of_strategies_returns_its_weights(raw: list[float], seed: int) -> None:
    weights = [value / sum(raw) for value in raw]
    by_name = {str(k): rows(50, 6, seed=seed + k) for k in range(len(weights))}
    mixed = sum(w * q for w, q in zip(weights, by_name.values(), strict=True))
    assert isinstance(mixed, Tensor)
    mixture = nearest_mixture(mixed, by_name)
    assert list(mixture.weights.values()) == pytest.approx(weights, abs=1e-3)
    assert mixture.divergence == pytest.approx(0.0, abs=1e-7)
    assert sum(mixture.weights.values()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_no_weights_come_nearer(seed: int) -> None:
    """Against a bounded search over two weights, for a model that is no mixture."""
    model, first, second = (rows(30, 5, seed=10 * seed + k) for k in range(3))

    def divergence(weight: float) -> float:
        mixed = weight * first + (1 - weight) * second
        return float((model * (model / mixed).log()).sum(-1).mean())

    best = minimize_scalar(divergence, bounds=(0, 1), method="bounded", options={"xatol": 1e-10})
    mixture = nearest_mixture(model, {"first": first, "second": second})
    assert mixture.divergence == pytest.approx(divergence(mixture.weights["first"]), abs=1e-12)
    assert mixture.divergence <= best.fun + 1e-7
    assert mixture.weights["first"] == pytest.approx(best.x, abs=1e-3)


def test_excluded_tokens_and_equal_strategies() -> None:
    model = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
    first = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    second = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    mixture = nearest_mixture(model, {"first": first, "second": second})
    assert mixture.divergence == math.inf  # the second row's token 1
    assert all(np.isfinite(list(mixture.weights.values())))
    twice = nearest_mixture(model, {"a": model, "b": model, "c": first})
    assert twice.weights["a"] + twice.weights["b"] == pytest.approx(1.0, abs=1e-3)
    assert twice.divergence == pytest.approx(0.0, abs=1e-7)


def test_labels_at_every_position() -> None:
    first, second = rows(12, 4, seed=1), rows(12, 4, seed=2)
    model = 0.3 * first + 0.7 * second
    flat = strategy_figures(model, {"a": first, "b": second}, epsilon=1e-3)
    by_position = strategy_figures(
        model.view(3, 4, 4), {"a": first.view(3, 4, 4), "b": second.view(3, 4, 4)}, epsilon=1e-3
    )
    assert by_position == pytest.approx(flat, rel=1e-9)
    assert flat["strategy/weight_a"] == pytest.approx(0.3, abs=1e-3)
    assert set(flat) == {
        *("strategy/kl_a", "strategy/kl_b", "strategy/weight_a", "strategy/weight_b"),
        "strategy/mixture_kl",
    }
