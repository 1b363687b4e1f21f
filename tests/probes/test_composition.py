from typing import Any

import pytest
import torch

from mechcausal.models.adapter import HookedTransformer
from probes import k_composition
from tests.probes.wired import planted

close = torch.testing.assert_close


@pytest.mark.parametrize("seed", range(20))
def test_the_planted_partner_is_named(seed: int):
    wiring = planted(seed)
    composition = k_composition(wiring.model, [wiring.induction, wiring.useless])
    for head in (wiring.induction, wiring.useless):
        (best, score), (_, second) = composition.partners(head, 2)
        assert best == wiring.partner
        assert score > 0.08 > 2 * second


def test_the_formula_on_full_matrices(build: Any):
    model = build(n_layers=3, n_heads=2)
    composition = k_composition(model, [(1, 1), (2, 0)])
    assert composition.earlier == ((0, 0), (0, 1), (1, 0), (1, 1))
    for row, (layer, head) in enumerate(composition.later):
        later = model.blocks[layer].attn
        qk = later.W_Q[head] @ later.W_K[head].T
        for column, (before, writer) in enumerate(composition.earlier):
            value = composition.excess[row, column]
            if before >= layer:
                assert value.isnan()
                continue
            earlier = model.blocks[before].attn
            ov = earlier.W_V[writer] @ earlier.W_O[writer]
            # Row vectors: the key of x is x · ov · W_K, so ov meets the transpose of qk.
            expected = (ov @ qk.T).norm() / (ov.norm() * qk.norm()) - 8**-0.5
            close(value, expected.detach())


def test_the_earlier_head_enters_the_key_side(model: HookedTransformer):
    """Keys read the first two dimensions, queries the others; the writer writes the first two."""
    first, second = model.blocks[0].attn, model.blocks[1].attn
    with torch.no_grad():
        first.W_O[:, :, 2:] = 0
        second.W_K[:, 2:] = 0
        second.W_Q[:, :2] = 0
    reads = k_composition(model, [(1, 0)])
    assert (reads.excess > 0.1).all()
    with torch.no_grad():
        second.W_K[0], second.W_Q[0] = second.W_Q[0].clone(), second.W_K[0].clone()
    close(k_composition(model, [(1, 0)]).excess, torch.full((1, 2), -(8**-0.5)))


def test_random_matrices_score_zero(build: Any):
    model = build(n_layers=2, n_heads=12, d_model=64, d_head=8, init_mode="gpt2")
    composition = k_composition(model, [(1, head) for head in range(12)])
    assert composition.random == 1 / 8
    # 144 nearly independent values of spread about 0.01.
    assert abs(composition.excess.mean()) < 0.01


def test_chosen_earlier_heads(model: HookedTransformer):
    composition = k_composition(model, [(1, 0)], [(0, 1)])
    assert composition.partners((1, 0), 5) == [((0, 1), composition.excess.item())]
    assert k_composition(model, [(0, 0)]).partners((0, 0)) == []
    with pytest.raises(ValueError, match="no scores for head"):
        composition.partners((1, 1))
