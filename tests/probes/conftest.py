"""Models small enough to compute by hand."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mechcausal.models.adapter import HookedTransformer

Build = Callable[..., HookedTransformer]


@pytest.fixture(scope="session")
def build() -> Build:
    """Build a random attention-only HookedTransformer; sizes can be overridden."""

    def build(**sizes: Any) -> HookedTransformer:
        config = {
            "n_layers": 2,
            "n_heads": 2,
            "d_model": 8,
            "d_head": 4,
            "n_ctx": 12,
            "d_vocab": 7,
            "attn_only": True,
            "seed": 0,
            "device": "cpu",
        }
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            model = HookedTransformer({**config, **sizes})
        # The default initialisation is so small that every pattern is nearly uniform.
        for parameter in model.parameters():
            parameter.data.mul_(20)
        return model

    return build


@pytest.fixture
def model(build: Build) -> HookedTransformer:
    return build()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def by_hand(build: Build) -> HookedTransformer:
    """One head that attends by position alone and adds the attended tokens to the logits.

    The residual stream holds [token (2) | position (3)]. scores[i, j] = A[i, j], whose softmax is
    [1], [1/4, 3/4], [1/4, 1/2, 1/4]; logits[i] = onehot(t_i) + Σ_j pattern[i, j] onehot(t_j).
    """
    model = build(
        n_layers=1,
        n_heads=1,
        d_model=5,
        d_head=3,
        n_ctx=3,
        d_vocab=2,
        normalization_type=None,
        use_attn_scale=False,
    )
    for parameter in model.parameters():
        parameter.data.zero_()
    token, position = slice(0, 2), slice(2, 5)
    attention = model.blocks[0].attn
    model.embed.W_E.data[:, token] = torch.eye(2)
    model.pos_embed.W_pos.data[:, position] = torch.eye(3)
    attention.W_Q.data[0, position] = torch.tensor(
        [[0.0, 0.0, 0.0], [0.0, math.log(3), 0.0], [0.0, math.log(2), 0.0]]
    )
    attention.W_K.data[0, position] = torch.eye(3)
    attention.W_V.data[0, token, :2] = torch.eye(2)
    attention.W_O.data[0, :2, token] = torch.eye(2)
    model.unembed.W_U.data[token] = torch.eye(2)
    return model
