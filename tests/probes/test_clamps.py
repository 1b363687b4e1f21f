"""Attention that is held fixed while a model trains: patterns, gradients, and nothing left over."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from mechcausal.models.adapter import HookedTransformer
from probes import (
    AttentionGradient,
    AttentionPattern,
    ProbeError,
    attach,
    clamp,
    fixed_to,
    forbid,
    frozen_pattern,
    make_uniform,
    previous_token,
)
from probes.intervening.clamps import checked_clamps
from tests.left_as_found import left_as_found
from tests.oracles import seeded
from tests.probes.families import some_tokens, tiny
from tests.refusals import raises_one_line

close = torch.testing.assert_close
PARENTS = [-1, 0, 0, 2, -1, 3, (1, 4)]


@pytest.fixture
def model(build: Any) -> HookedTransformer:
    """Two layers of three heads over seven positions, in float64."""
    model: HookedTransformer = build(n_heads=3, d_model=12, n_ctx=7, d_vocab=5).double()
    for parameter in model.parameters():  # less sharp attention, which takes gradients
        parameter.data.mul_(3 / 20)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(5, (4, 7), generator=seeded(1))


def pattern_of(model: Any, tokens: Tensor, layer: int = 0) -> Tensor:
    with torch.no_grad(), attach(model, AttentionPattern(layer)) as (pattern,):
        model(tokens)
    values: Tensor = pattern.reading().sel(layer=layer).values
    return values


def one_hot_rows() -> dict[int, Tensor]:
    """The rows that PARENTS holds, written out."""
    rows = {q: torch.eye(7)[key].double() for q, key in ((1, 0), (2, 0), (3, 2), (5, 3))}
    return rows | {6: torch.tensor([0, 0.5, 0, 0, 0.5, 0, 0]).double()}


# --- What a clamp holds ---


def test_rows_of_a_graph_are_held_and_roots_stay_free(model: Any, tokens: Tensor):
    free = pattern_of(model, tokens)
    with clamp(model, {0: fixed_to(PARENTS)}):
        held = pattern_of(model, tokens)
    for query, row in one_hot_rows().items():
        close(held[:, :, query], row.expand(4, 3, 7))
    assert torch.equal(held[:, :, [0, 4]], free[:, :, [0, 4]])


def test_one_head_is_held_and_the_others_stay_free(model: Any, tokens: Tensor):
    free = pattern_of(model, tokens)
    with clamp(model, {0: [previous_token(head=2), forbid([(6, 1), (6, 3)], head=0)]}):
        held = pattern_of(model, tokens)
    before = torch.stack([torch.eye(7)[q - 1] for q in range(1, 7)]).double()
    close(held[:, 2, 1:], before.expand(4, 6, 7))
    assert torch.equal(held[:, 1], free[:, 1])
    kept = free[:, 0, 6].clone()
    kept[:, [1, 3]] = 0
    close(held[:, 0, 6], kept / kept.sum(-1, keepdim=True))
    assert torch.equal(held[:, 0, :6], free[:, 0, :6])


def test_a_pattern_for_every_head_holds_its_rows_that_are_not_zero(model: Any, tokens: Tensor):
    given = torch.zeros(2, 7, 7)  # the third head is free
    given[0, 3, 1], given[1, 6] = 1.0, 1 / 7
    free = pattern_of(model, tokens)
    with clamp(model, {0: fixed_to(given)}):
        given.zero_()  # a clamp has its own copy
        held = pattern_of(model, tokens)
    close(held[:, 0, 3], torch.eye(7)[1].double().expand(4, 7))
    close(held[:, 1, 6], torch.full((4, 7), 1 / 7).double(), atol=1e-7, rtol=0)
    changed = (held != free).any(-1).any(0)
    assert changed.nonzero().tolist() == [[0, 3], [1, 6]]


def test_a_frozen_pattern_is_the_mean_over_the_batch(model: Any, tokens: Tensor):
    mean = pattern_of(model, tokens).mean(0)
    whole = frozen_pattern(model, 0, tokens)
    for bound in (1, 2**20):
        one = frozen_pattern(model, 0, tokens, head=1, max_batch_bytes=bound)
        with clamp(model, {0: one}):
            held = pattern_of(model, tokens)
        close(held[:, 1], mean[1].expand(4, 7, 7))
    with torch.no_grad():
        model.blocks[0].attn.W_Q.mul_(-2)  # later, attention would be another one
    with clamp(model, {0: whole}):
        close(pattern_of(model, tokens.flip(1)), mean.expand(4, 3, 7, 7))


def test_shorter_passes_hold_what_they_have(model: Any, tokens: Tensor):
    clamps = {0: [fixed_to(PARENTS), forbid([(2, 0), (6, 1)])], 1: previous_token()}
    with clamp(model, clamps):
        short = pattern_of(model, tokens[:, :4])
        assert pattern_of(model, tokens[:, :1]).tolist() == [[[[1.0]]] * 3] * 4
    close(short[:, :, 3], torch.eye(4)[2].double().expand(4, 3, 4))
    close(short[:, :, 2], torch.tensor([0, 0.5, 0.5, 0]).double().expand(4, 3, 4))
    with clamp(model, {0: fixed_to([-1, 0])}):  # and longer ones have free rows
        long = pattern_of(model, tokens)
    close(long[:, :, 1], torch.eye(7)[0].double().expand(4, 3, 7))
    close(long[:, :, 2:], pattern_of(model, tokens)[:, :, 2:])


def test_clamps_nest_and_edits_stand_among_them(model: Any, tokens: Tensor):
    with clamp(model, {0: fixed_to(PARENTS)}), clamp(model, {0: make_uniform([3])}):
        held = pattern_of(model, tokens)
    with clamp(model, {0: [fixed_to(PARENTS), make_uniform([3])]}):
        close(pattern_of(model, tokens), held)
    close(held[:, :, 3, :4], torch.full((4, 3, 4), 0.25).double())


def test_a_model_that_attends_ahead_may_be_held_there(build: Any, tokens: Tensor):
    ahead = torch.zeros(7, 7)
    ahead[2, 5] = 1
    both_ways = build(n_heads=3, d_model=12, n_ctx=7, d_vocab=5, attention_dir="bidirectional")
    with clamp(both_ways, {1: fixed_to(ahead)}):
        assert pattern_of(both_ways, tokens, 1)[0, 0, 2].tolist() == [0, 0, 0, 0, 0, 1, 0]
        with pytest.raises(ProbeError, match="attend beyond the 4 positions"):
            both_ways(tokens[:, :4])


# --- Training ---


class ByHand:
    """One layer, one head, written out with the weights of a HookedTransformer."""

    def __init__(self, model: Any) -> None:
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        for weight in self.weights.values():
            weight.requires_grad_()

    def __call__(self, tokens: Tensor, fixed: dict[int, Tensor], forbidden: list[Any]) -> Tensor:
        w, length = self.weights, tokens.shape[1]
        x = w["embed.W_E"][tokens] + w["pos_embed.W_pos"][:length]
        q, k, v = (
            x @ w[f"blocks.0.attn.W_{n}"][0] + w[f"blocks.0.attn.b_{n}"][0] for n in ("Q", "K", "V")
        )
        scores = q @ k.mT / q.shape[-1] ** 0.5
        masked = torch.ones(length, length, dtype=torch.bool).triu(1)
        for query, key in forbidden:
            masked[query, key] = True
        pattern = scores.masked_fill(masked, -torch.inf).softmax(-1)
        rows = [
            fixed[i].expand(len(tokens), -1) if i in fixed else pattern[:, i] for i in range(length)
        ]
        z = torch.stack(rows, 1) @ v
        x = x + z @ w["blocks.0.attn.W_O"][0] + w["blocks.0.attn.b_O"]
        logits: Tensor = x @ w["unembed.W_U"] + w["unembed.b_U"]
        return logits


def test_gradients_equal_those_of_a_model_written_out(build: Any, tokens: Tensor):
    sizes = {"n_layers": 1, "n_heads": 1, "d_model": 8, "d_head": 4, "n_ctx": 7, "d_vocab": 5}
    model = build(**sizes, normalization_type=None).double()
    for parameter in model.parameters():
        parameter.data.mul_(3 / 20)
    by_hand = ByHand(model)
    target = torch.randint(5, (4, 7), generator=seeded(2))
    forbidden = [(4, 1), (4, 4)]
    with clamp(model, {0: [fixed_to(PARENTS), forbid(forbidden)]}):
        logits = model(tokens)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
    expected = by_hand(tokens, one_hot_rows(), forbidden)
    close(logits, expected)
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), target.flatten()).backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, by_hand.weights[name].grad, msg=name)
    assert model.blocks[0].attn.W_Q.grad.any()  # of the free row


def test_rows_that_are_held_get_no_gradient(model: Any, tokens: Tensor):
    with (
        clamp(model, {0: fixed_to(PARENTS), 1: previous_token(head=1)}),
        attach(model, AttentionGradient("scores", 0)) as (scores,),
    ):
        model(tokens, return_type="loss").backward()
    by_query = scores.reading().sel(layer=0).values.abs().sum(-1)
    assert not by_query[:, [1, 2, 3, 5]].any()
    assert by_query[:, 4].any()
    second = model.blocks[1].attn
    assert not second.W_Q.grad[1].any()
    assert not second.W_K.grad[1].any()
    assert second.W_V.grad[1].any()  # what it copies is trained
    assert second.W_Q.grad[0].any()


def test_training_inside_moves_the_rest_and_leaves_the_model_free(model: Any, tokens: Tensor):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    with clamp(model, {0: previous_token()}):
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(tokens, return_type="loss")
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert losses == sorted(losses, reverse=True)
    assert "blocks.1.attn.W_Q" in moved
    assert not {"blocks.0.attn.W_Q", "blocks.0.attn.W_K"} & moved
    assert not torch.equal(pattern_of(model, tokens)[0, 0, 3], torch.eye(7)[2].double())


def test_nothing_is_left(model: Any, tokens: Tensor):
    clamps = {0: [fixed_to(PARENTS), previous_token(head=1)], 1: forbid([(3, 2)])}
    with left_as_found(model):
        frozen_pattern(model, 0, tokens)
        with clamp(model, clamps), torch.no_grad():
            model(tokens)
        with pytest.raises(KeyError, match="mine"), clamp(model, clamps):
            raise KeyError("mine")
        with pytest.raises(ValueError, match="layer 2"), clamp(model, clamps | {2: clamps[0]}):
            pass


def test_through_a_bridge():
    bridge, tokens = tiny("GPT-2"), some_tokens(3, 8)
    before = bridge(tokens)
    with clamp(bridge, {1: previous_token(head=1)}):
        held = pattern_of(bridge, tokens, 1)
        bridge(tokens, return_type="loss").backward()
    assert held[0, 1, 5].tolist() == torch.eye(8)[4].tolist()
    close(held[:, 0], pattern_of(bridge, tokens, 1)[:, 0])
    assert torch.equal(bridge(tokens), before)
    assert any(p.grad is not None and bool(p.grad.any()) for p in bridge.parameters())


# --- What is refused ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {2: previous_token()}, "layer 2 does not exist: the model has 2 layers, 0 to 1"),
        (lambda: {-1: previous_token()}, "layer -1 does not exist"),
        (lambda: {0: previous_token(head=3)}, "head 3 does not exist: layer 0 has 3 heads"),
        (lambda: {1: fixed_to([-1] * 8)}, "layer 1 has position 7, the model's context 0 to 6"),
        (lambda: {0: forbid([(7, 1)])}, "layer 0 has position 7, the model's context 0 to 6"),
        (lambda: {0: forbid([(1, 2)])}, r"\(query 1, key 2\) is not allowed"),
        (lambda: {0: forbid([(1, 0), (1, 1)])}, "every key of query 1 is forbidden"),
        (lambda: {0: fixed_to([-1, 0, 3, 1])}, "query 2 cannot attend to key 3"),
        (lambda: {0: fixed_to([-1, 4])}, "position 1: parent 4 does not exist: 0 to 1, or -1"),
        (lambda: {0: fixed_to([])}, "no positions"),
        (lambda: {0: fixed_to(torch.full((2, 2), 0.4))}, "row 0 of the pattern sums to 0.8"),
        (lambda: {0: fixed_to(torch.tensor([[2.0, -1.0], [0, 1]]))}, "its lowest weight is -1"),
        (lambda: {0: fixed_to(torch.full((2, 2), torch.nan))}, "sums to nan"),
        (lambda: {0: fixed_to(torch.eye(3)[:2])}, r"shape \(2, 3\); expected \(query, key\)"),
        (lambda: {0: fixed_to(torch.eye(3).expand(4, 3, 3))}, "for 4 heads, the layer 3"),
        (lambda: {0: fixed_to(torch.eye(3).expand(3, 3, 3), head=1)}, "slice it"),
    ],
)
def test_mistakes_are_named_in_one_line(model: Any, make: Any, message: str):
    with raises_one_line(ValueError, match=message), clamp(model, make()):
        pass


@pytest.mark.parametrize("given", [torch.eye(7), [previous_token(), "graph"]])
def test_what_is_no_clamp_is_refused(model: Any, given: Any):
    untyped = inspect.unwrap(checked_clamps)  # the tests' type checks would come first
    with raises_one_line(ValueError, match="layer 0: a (Tensor|str) is no clamp: pass fixed_to"):
        untyped(model, {0: given})


def test_frozen_patterns_name_mistakes(model: Any, tokens: Tensor):
    with pytest.raises(ValueError, match="layer 5 does not exist"):
        frozen_pattern(model, 5, tokens)
    with pytest.raises(ValueError, match="head 3 does not exist: layer 0 has heads 0 to 2"):
        frozen_pattern(model, 0, tokens, head=3)
    with pytest.raises(ProbeError, match="tokens run from"):
        frozen_pattern(model, 0, tokens + 9)
