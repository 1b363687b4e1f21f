"""Attention changed by hand: exact rows, exact outputs, and models that are the same afterwards."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mechcausal.models.adapter import HookedTransformer
from probes import (
    AttentionPattern,
    attach,
    attention_effects,
    edit_attention,
    knock_out,
    make_uniform,
    redirect,
    replace_pattern,
)
from tests.oracles import seeded
from tests.probes.families import some_tokens, tiny

close = torch.testing.assert_close


TOKENS = torch.tensor([[0, 1, 1], [1, 0, 1]])


@pytest.fixture
def random_model(build: Any) -> HookedTransformer:
    model: HookedTransformer = build(n_heads=3, d_model=12, n_ctx=7, d_vocab=5)
    for parameter in model.parameters():  # less sharp attention, which takes gradients
        parameter.data.mul_(3 / 20)
    return model


def causal_pattern(*shape: int) -> Tensor:
    length = shape[-1]
    scores = torch.randn(*shape, generator=seeded())
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


EDITS = {
    "knock_out": knock_out([(0, 0), (2, 2), (4, 0), (4, 3), (6, 1)]),
    "knock_out in a head": knock_out([(5, 2)], head=1),
    "redirect": redirect([(3, 0, 2), (3, 2, 1), (6, 6, 0)]),
    "redirect in a head": redirect([(4, 1, 2)], head=2),
    "make_uniform": make_uniform([0, 3, 5]),
    "replace_pattern": replace_pattern(causal_pattern(3, 7, 7)),
}


# --- What the edits do to a row ---


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_stay_distributions_over_the_past(name: str, dtype: torch.dtype):
    pattern = causal_pattern(4, 3, 7, 7).to(dtype)
    before = pattern.clone()
    edited = EDITS[name](pattern)
    assert edited.dtype == dtype
    assert (edited >= 0).all()
    assert not edited.triu(1).any()
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-6
    close(edited.sum(-1), torch.ones(4, 3, 7, dtype=dtype), atol=tolerance, rtol=0.0)
    assert torch.equal(pattern, before)


def test_knocking_out_is_masking_the_score():
    scores = torch.randn(2, 3, 7, 7, generator=seeded())
    scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
    pairs = [(3, 1), (6, 0), (6, 5)]
    masked = scores.clone()
    for query, key in pairs:
        masked[:, 1, query, key] = -torch.inf
    close(knock_out(pairs, head=1)(scores.softmax(-1)), masked.softmax(-1))
    assert torch.equal(knock_out([])(scores), scores)


def test_a_row_that_had_everything_there_becomes_uniform():
    pattern = torch.eye(4)[[0, 0, 1, 1]].expand(1, 1, 4, 4)
    edited = knock_out([(2, 1), (3, 1), (3, 3)])(pattern)[0, 0]
    close(edited[2], torch.tensor([0.5, 0.0, 0.5, 0.0]))
    close(edited[3], torch.tensor([0.5, 0.0, 0.5, 0.0]))


def test_a_row_without_another_key_stays_as_it_is():
    pattern = causal_pattern(1, 1, 3, 3)
    assert torch.equal(knock_out([(0, 0), (1, 0), (1, 1)])(pattern), pattern)


def test_redirecting_swaps_two_weights_and_can_be_undone():
    pattern = causal_pattern(2, 3, 7, 7)
    edited = redirect([(5, 1, 4)], head=2)(pattern)
    assert torch.equal(edited[:, 2, 5, [1, 4]], pattern[:, 2, 5, [4, 1]])
    assert torch.equal(edited[:, :2], pattern[:, :2])
    assert torch.equal(redirect([(5, 4, 1)], head=2)(edited), pattern)


def test_other_rows_and_heads_keep_their_exact_numbers():
    pattern = causal_pattern(2, 3, 7, 7)
    for edit in (knock_out([(5, 2)], 1), redirect([(5, 2, 0)], 1), make_uniform([5], 1)):
        changed = (edit(pattern) != pattern).any(0)
        assert changed[1, 5].any()
        changed[1, 5] = False
        assert not changed.any()


@pytest.mark.parametrize("shape", [(7, 7), (3, 7, 7), (1, 7, 7), (2, 3, 7, 7), (2, 1, 7, 7)])
def test_a_replacement_is_repeated_over_heads_and_sequences(shape: tuple[int, ...]):
    pattern = causal_pattern(*shape)
    edited = replace_pattern(pattern)(torch.zeros(2, 3, 7, 7))
    close(edited, pattern.expand(2, 3, 7, 7))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_a_replacement_may_be_rounded_below_zero_and_no_more(kind: torch.dtype):
    pattern = causal_pattern(7, 7).to(kind)
    pattern[0, 4] = -torch.finfo(kind).eps / 8
    replace_pattern(pattern)
    pattern[0, 4] = -0.01
    with pytest.raises(ValueError, match=r"lowest weight of -0\.01"):
        replace_pattern(pattern)


def test_gradients_flow_through_every_edit():
    for name, edit in EDITS.items():
        pattern = causal_pattern(1, 3, 7, 7).double().requires_grad_()
        if name != "replace_pattern":
            assert torch.autograd.gradcheck(edit, (pattern,))
    given = causal_pattern(7, 7).requires_grad_()
    replace_pattern(given)(torch.zeros(2, 3, 7, 7)).sum().backward()
    close(given.grad, torch.full((7, 7), 6.0))


def test_gradients_are_finite_where_everything_was_on_the_pair():
    for rest in (0.0, 1e-38, 1e-30):
        pattern = torch.tensor([[1.0, 0.0], [1.0, rest]]).expand(1, 1, 2, 2).requires_grad_()
        edited = knock_out([(1, 0)])(pattern)
        close(edited[0, 0, 1], torch.tensor([0.0, 1.0]))
        edited.square().sum().backward()
        assert pattern.grad.isfinite().all()


# --- What they do to a model ---


def test_the_output_by_hand(by_hand: HookedTransformer):
    def last_logits(edit: Any) -> Any:
        with edit_attention(by_hand, {0: edit}):
            logits: Tensor = by_hand(TOKENS)[:, -1]
        return logits.tolist()

    def expected(weights: tuple[float, float, float]) -> list[Any]:
        a, b, c = weights
        return [pytest.approx([a, 1 + b + c]), pytest.approx([b, 1 + a + c])]

    assert by_hand(TOKENS)[:, -1].tolist() == expected((1 / 4, 1 / 2, 1 / 4))
    assert last_logits(knock_out([(2, 1)])) == expected((1 / 2, 0.0, 1 / 2))
    assert last_logits(knock_out([(2, 0)])) == expected((0.0, 2 / 3, 1 / 3))
    assert last_logits(redirect([(2, 1, 0)])) == expected((1 / 2, 1 / 4, 1 / 4))
    assert last_logits(make_uniform([2])) == expected((1 / 3, 1 / 3, 1 / 3))
    identity = replace_pattern(torch.eye(3))
    assert last_logits(identity) == expected((0.0, 0.0, 1.0))


def test_effects_by_hand(by_hand: HookedTransformer):
    def loss() -> Tensor:
        assert not torch.is_grad_enabled()
        first: Tensor = by_hand(TOKENS)[:, -1, 0]  # a, then b, for weights (a, b, c)
        return first

    edits = [("one", knock_out([(2, 1)])), ("zero", redirect([(2, 0, 2)]))]
    one, zero = attention_effects(by_hand, 0, edits, loss)
    assert (one.label, zero.label) == ("one", "zero")
    assert one.loss == zero.loss == pytest.approx(3 / 8)
    assert one.rise == pytest.approx((1 / 4 - 1 / 2) / 2)
    # The two rises are 1/4 and -1/2: half their distance is the error of their mean.
    assert one.stderr == pytest.approx(3 / 8)
    assert (zero.rise, zero.stderr) == (0.0, 0.0)
    assert attention_effects(by_hand, 0, [], loss) == ()


def test_layers_are_edited_together_and_blocks_nest(random_model: HookedTransformer):
    tokens = torch.randint(5, (4, 7), generator=seeded(1))
    outer, inner = knock_out([(5, 2), (6, 0)]), redirect([(5, 3, 1)], head=0)
    with attach(random_model, AttentionPattern(0)) as (pattern,):
        random_model(tokens)
    by_hand = inner(outer(pattern.reading().sel(layer=0).values))
    with edit_attention(random_model, {0: outer, 1: make_uniform([6])}):
        with (
            edit_attention(random_model, {0: inner}),
            attach(random_model, AttentionPattern()) as (seen,),
        ):
            nested = random_model(tokens)
        only_outer = random_model(tokens)
    close(seen.reading().sel(layer=0).values, by_hand)
    close(seen.reading().sel(layer=1).values[:, :, 6], torch.full((4, 3, 7), 1 / 7))
    with edit_attention(random_model, {0: replace_pattern(by_hand), 1: make_uniform([6])}):
        close(random_model(tokens), nested)
    assert not torch.allclose(only_outer, nested)


def test_the_edited_model_takes_gradients(random_model: HookedTransformer):
    tokens = torch.randint(5, (4, 7), generator=seeded(1))
    with edit_attention(random_model, {0: knock_out([(5, 2)]), 1: redirect([(6, 0, 1)])}):
        random_model(tokens, return_type="loss").backward()
    assert random_model.blocks[0].attn.W_Q.grad.any()


def test_through_a_bridge():
    bridge, tokens = tiny("GPT-2"), some_tokens(3, 8)
    before = bridge(tokens)
    with (
        edit_attention(bridge, {1: knock_out([(7, 2)], head=1)}),
        attach(bridge, AttentionPattern(1)) as (pattern,),
    ):
        edited = bridge(tokens)
    values = pattern.reading().sel(layer=1).values
    assert not values[:, 1, 7, 2].any()
    assert values[:, 0, 7, 2].all()
    close(edited[:, :-1], before[:, :-1])
    assert not torch.allclose(edited[:, -1], before[:, -1])
    assert torch.equal(bridge(tokens), before)
