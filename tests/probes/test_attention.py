"""Patterns and gradients against numbers worked out by hand, and against autograd."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mechcausal.models.adapter import HookedTransformer
from probes import (
    AttentionGradient,
    AttentionPattern,
    ProbeError,
    ProbeWarning,
    attach,
    check_attention,
)
from probes.reading.records import Moments

close = torch.testing.assert_close
TOKENS = torch.tensor([[0, 1, 0], [1, 1, 0]])


def first_logit(model: HookedTransformer, tokens: Tensor = TOKENS) -> Tensor:
    """The sum over sequences of token 0's logit at the last position."""
    loss: Tensor = model(tokens)[:, -1, 0].sum()
    return loss


def test_pattern_of_the_hand_made_model(by_hand: HookedTransformer):
    with attach(by_hand, AttentionPattern()) as (pattern,):
        by_hand(TOKENS)
    reading = pattern.reading()
    assert reading.shape == {"layer": 1, "batch": 2, "head": 1, "query": 3, "key": 3}
    expected = torch.tensor([[1, 0, 0], [0.25, 0.75, 0], [0.25, 0.5, 0.25]])
    close(reading.sel(layer=0, batch=1, head=0).values, expected)


def test_gradients_of_the_hand_made_model(by_hand: HookedTransformer):
    # Last row: the logit is Σ_j p_j [t_j = 0], so ∂/∂p_j = [t_j = 0] =: g_j and, with
    # p = (1/4, 1/2, 1/4), ∂/∂score_j = p_j (g_j - Σ p g): p·g = 1/2, then 1/4.
    scores, pattern = AttentionGradient(), AttentionGradient("pattern")
    with attach(by_hand, scores, pattern):
        first_logit(by_hand).backward()
    sequences = torch.tensor([[0.125, -0.25, 0.125], [-0.0625, -0.125, 0.1875]])
    last = {"layer": 0, "head": 0, "query": 2}
    close(scores.reading().sel(**last).values, sequences.sum(0))
    # Of two numbers a, b: sqrt(2 s²) = |a - b|.
    close(scores.stderr().sel(**last).values, (sequences[0] - sequences[1]).abs())
    close(pattern.reading().sel(**last).values, torch.tensor([1.0, 0.0, 2.0]))
    close(pattern.stderr().sel(**last).values, torch.tensor([1.0, 0.0, 0.0]))
    assert not scores.reading().values[..., :2, :].any()
    assert pattern.reading().name == "attention_gradient_pattern"


def test_centred_gradient_has_rows_without_mean(by_hand: HookedTransformer):
    # Last rows (1, 0, 1) and (0, 0, 1), each less its mean over three visible keys.
    with attach(by_hand, AttentionGradient("pattern", centred=True)) as (gradient,):
        first_logit(by_hand).backward()
    values = gradient.reading().sel(layer=0, head=0).values
    close(values[2], torch.tensor([0.0, -1.0, 1.0]))
    assert not values[:2].any()
    # Of the contributions (1, -2, 1)/3 and (-1, -1, 2)/3: |a - b|.
    expected = torch.tensor([2.0, 1.0, 1.0]) / 3
    close(gradient.stderr().sel(layer=0, head=0, query=2).values, expected)


@pytest.mark.parametrize("wrt", ["scores", "pattern"])
def test_gradient_equals_autograd_and_stderr_the_loop_over_sequences(
    model: HookedTransformer, tokens: Tensor, wrt: Any
):
    def sequence_gradients() -> Tensor:
        kept: dict[str, Tensor] = {}
        names = [f"blocks.{layer}.attn.hook_{'attn_' * (wrt == 'scores')}{wrt}" for layer in (0, 1)]
        keep: list[Any] = [(name, lambda x, hook: kept.update({hook.name: x})) for name in names]
        loss = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=keep)
        gradients = torch.autograd.grad(loss, [kept[name] for name in names])
        return torch.stack(gradients).double().tril()

    with attach(model, AttentionGradient(wrt)) as (gradient,):
        model(tokens, return_type="loss").backward()
    expected = sequence_gradients()
    close(gradient.reading().values, expected.sum(1).float())
    n = len(tokens)
    mean = sum(expected[:, b] for b in range(n)) / n
    variance = sum((expected[:, b] - mean) ** 2 for b in range(n)) / (n - 1)
    close(gradient.stderr().values, torch.as_tensor(n * variance).sqrt().float())
    masked = torch.ones(6, 6, dtype=torch.bool).triu(1)
    for values in (gradient.reading().values, gradient.stderr().values):
        assert not values[..., masked].any()
        assert values[..., ~masked].any()


def test_rows_masked_from_end_to_end_by_padding_give_zeros(
    model: HookedTransformer, tokens: Tensor
):
    padding = torch.ones_like(tokens)
    padding[0, :2] = 0
    probes = AttentionGradient(), AttentionGradient("pattern")
    with attach(model, *probes):
        model(tokens, attention_mask=padding)[:, -1].square().sum().backward()
    for probe in probes:
        assert probe.reading().values.isfinite().all()
        assert probe.stderr().values.isfinite().all()


def test_batches_accumulate(model: HookedTransformer, tokens: Tensor):
    model.double()  # float32 products depend on the size of the batch

    def loss(batch: Tensor) -> Tensor:
        total: Tensor = model(batch).square().sum()
        return total

    at_once = AttentionPattern(), AttentionPattern(reduce="mean"), AttentionGradient()
    parts = AttentionPattern(), AttentionPattern(reduce="mean"), AttentionGradient()
    with attach(model, *at_once):
        loss(tokens).backward()
    for batch in (tokens[:1], tokens[1:]):
        with attach(model, *parts):
            loss(batch).backward()
    for i in range(3):
        assert at_once[i].reading().axes == parts[i].reading().axes
        close(at_once[i].reading().values, parts[i].reading().values)
    close(at_once[2].stderr().values, parts[2].stderr().values)
    assert (at_once[2].batches, parts[2].batches) == (1, 2)
    close(at_once[1].reading().values, at_once[0].reading().mean("batch").values)
    parts[2].reset()
    with pytest.raises(ProbeError, match="no backward pass seen"):
        parts[2].reading()


def test_a_scaled_loss_is_read_in_its_own_units(model: HookedTransformer, tokens: Tensor):
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)  # type: ignore[attr-defined]
    plain, by_scaler, by_number = (
        AttentionGradient("pattern", loss_scale=scale) for scale in (None, scaler, 1024)
    )
    for factor in (1024.0, 2048.0):
        with attach(model, plain):
            model(tokens, return_type="loss").backward()
        with attach(model, by_scaler):
            scaler.scale(model(tokens, return_type="loss")).backward()
        scaler.update(factor)
        by_number.reset()
        with attach(model, by_number):
            (model(tokens, return_type="loss") * 1024).backward()
    # Powers of two scale without rounding, but for numbers below the smallest normal one.
    close(by_scaler.reading().values, plain.reading().values)
    close(by_scaler.stderr().values, plain.stderr().values)
    close(by_number.reading().values, plain.reading().values / 2)


def test_half_precision_autocast_asks_for_the_scale(build: Any, tokens: Tensor):
    model = build(dtype=torch.float32)
    silent = AttentionGradient(loss_scale=1)
    asking = AttentionGradient()
    with attach(model, silent, asking), torch.autocast("cpu", torch.float16):
        model(tokens, return_type="loss").backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silent.reading()
        assert not caught
        asking.reading()
    assert [w.category for w in caught] == [ProbeWarning]
    assert "pass loss_scale=scaler" in str(caught[0].message)


class Detached(nn.Module):
    """Shows a pattern that it does not compute with."""

    def __init__(self, point: nn.Module) -> None:
        super().__init__()
        self.point = point

    def forward(self, pattern: Tensor) -> Tensor:
        self.point(pattern.detach())
        return pattern


def test_gradients_that_do_not_arrive_are_named(model: HookedTransformer, tokens: Tensor):
    attention: Any = model.blocks[1].attn
    attention.hook_pattern = Detached(attention.hook_pattern)
    assert check_attention(model).problems() == (
        "editing a pattern changes nothing in layers 1, which run hook_pattern after use",
        "no gradient reaches the patterns of layers 1",
    )
    for wrt in ("scores", "pattern"):
        gradient = AttentionGradient(wrt)  # type: ignore[arg-type]
        with attach(model, gradient):
            model(tokens, return_type="loss").backward()
        with pytest.raises(ProbeError, match=r"gradients reach the mixed values of layers \[1\]"):
            gradient.reading()


def test_patterns_that_are_not_shown_are_named(model: HookedTransformer, tokens: Tensor):
    attention: Any = model.blocks[1].attn
    attention.hook_pattern = nn.Identity()
    with (
        pytest.warns(ProbeWarning, match="HookedTransformer.*: layers 1 show no attention pattern"),
        attach(model, AttentionPattern(0)),
    ):
        model(tokens)


def test_a_warning_that_is_an_error_breaks_no_pass(model: HookedTransformer, tokens: Tensor):
    attention: Any = model.blocks[1].attn
    attention.hook_pattern = nn.Identity()
    pattern = AttentionPattern(0)
    with warnings.catch_warnings(action="error"):
        block = attach(model, pattern)
        block.__enter__()
        model(tokens)
        assert pattern.batches == 1
        with pytest.raises(ProbeWarning):
            block.__exit__(None, None, None)
        with attach(model, pattern):  # warned once, and nothing is left
            model(tokens)


def test_chosen_layers_keep_their_number(model: HookedTransformer, tokens: Tensor):
    everywhere, second = AttentionPattern(), AttentionPattern(1)
    with attach(model, everywhere, second):
        model(tokens)
    assert second.reading().coords == {"layer": (1,)}
    close(second.reading().sel(layer=1).values, everywhere.reading().sel(layer=1).values)


def test_readings_keep_no_graph_and_are_at_least_float32(build: Any, tokens: Tensor):
    model = build(dtype=torch.bfloat16)
    probes = AttentionPattern(reduce="mean"), AttentionGradient()
    with attach(model, *probes):
        model(tokens, return_type="loss").backward()
    for probe in probes:
        assert not probe.reading().values.requires_grad
        assert probe.reading().values.dtype == torch.float32


def test_a_record_leaves_what_it_is_given_alone():
    values = torch.full((2, 3), 2.0, dtype=torch.float64)
    Moments().add(values)
    assert (values == 2).all()


def test_two_forward_passes_before_one_backward(model: HookedTransformer, tokens: Tensor):
    separate, together = AttentionGradient("pattern"), AttentionGradient("pattern")
    padding = torch.ones_like(tokens)
    padding[:, :2] = 0

    def plain() -> Tensor:
        loss: Tensor = model(tokens)[:, -1].square().sum()
        return loss

    def padded() -> Tensor:
        logits = model(tokens, attention_mask=padding)
        loss: Tensor = logits[:, -1].square().sum()
        return loss

    with attach(model, separate):
        plain().backward()
        padded().backward()
    with attach(model, together):
        (plain() + padded()).backward()
    close(together.reading().values, separate.reading().values)


class TestErrorsAreOneClearLine:
    def test_reading_before_a_pass(self, model: HookedTransformer, tokens: Tensor):
        gradient = AttentionGradient()
        with pytest.raises(ProbeError, match="no backward pass seen yet"):
            gradient.reading()
        with attach(model, gradient), torch.no_grad():
            model(tokens)
        with pytest.raises(ProbeError, match="no backward pass seen yet"):
            gradient.reading()
        with pytest.raises(ProbeError, match="no forward pass seen yet"):
            AttentionPattern().reading()

    def test_a_pass_that_did_not_reach_every_layer(self, model: HookedTransformer, tokens: Tensor):
        pattern = AttentionPattern()
        with attach(model, pattern):
            model(tokens, stop_at_layer=1)
        with pytest.raises(ProbeError, match=r"did not reach every layer .*\{0: 1, 1: 0\}"):
            pattern.reading()

    def test_batches_of_different_length(self, model: HookedTransformer, tokens: Tensor):
        with attach(model, AttentionPattern()):
            model(tokens)
            with pytest.raises(ProbeError, match="call reset"):
                model(tokens[:, :4])

    def test_standard_error_of_one_sequence(self, model: HookedTransformer, tokens: Tensor):
        with attach(model, AttentionGradient()) as (gradient,):
            model(tokens[:1], return_type="loss").backward()
        with pytest.raises(ProbeError, match="at least two sequences"):
            gradient.stderr()

    def test_another_model_with_other_layers(
        self, model: HookedTransformer, build: Any, tokens: Tensor
    ):
        pattern = AttentionPattern()
        with attach(model, pattern):
            model(tokens)
        with pytest.raises(ProbeError, match="call reset"), attach(build(n_layers=1), pattern):
            pass
        pattern.reset()
        with attach(build(n_layers=1), pattern):
            pass


def test_a_saturated_head_keeps_its_pattern_gradient(by_hand: HookedTransformer):
    by_hand.blocks[0].attn.W_Q.data[0, 4, 1] = 500.0
    scores, pattern = AttentionGradient(), AttentionGradient("pattern")
    with attach(by_hand, scores, pattern):
        first_logit(by_hand).backward()
    assert not scores.reading().values.any()
    assert pattern.reading().values[0, 0, 2].tolist() == [1.0, 0.0, 2.0]
    assert math.isclose(by_hand(TOKENS)[0, 2, 1].item(), 1.0)
