"""Whatever happens inside the block, exactly our hooks are gone after it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from probes import (
    AttentionGradient,
    AttentionPattern,
    InductionScores,
    LabelledTensor,
    Probe,
    ProbeError,
    attach,
)
from probes.attach import ForwardHook
from probes.hook_names import pattern as pattern_name


def hooks_of(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """How many forward, forward-pre and backward hooks sit on every module."""
    return {
        name: (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
        )
        for name, module in model.named_modules()
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = hooks_of(model)
    yield
    assert hooks_of(model) == before


class Broken(Probe):
    """Fails at the chosen moment."""

    def __init__(self, moment: str, error: BaseException) -> None:
        self.moment, self.error = moment, error

    def hooks(self, model: nn.Module) -> Mapping[str, ForwardHook]:
        if self.moment == "hooks":
            raise self.error
        return {pattern_name(0): self.forward}

    def forward(self, pattern: Tensor) -> Any:
        if self.moment == "forward":
            raise self.error
        return self.backward

    def backward(self, gradient: Tensor) -> None:
        raise self.error

    def reset(self) -> None: ...

    def reading(self) -> LabelledTensor:
        return LabelledTensor("nothing", torch.zeros(()), ())


@pytest.mark.parametrize("moment", ["hooks", "forward", "backward"])
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_detaches_when_a_probe_fails(
    model: HookedTransformer, tokens: Tensor, moment: str, error: BaseException
):
    pattern = AttentionPattern()
    with (
        unchanged(model),
        pytest.raises(type(error)),
        attach(model, pattern, InductionScores(), Broken(moment, error)),
    ):
        model(tokens, return_type="loss").backward()
    with attach(model, pattern):  # no longer marked as attached either
        pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_detaches_when_the_model_fails(
    model: HookedTransformer, tokens: Tensor, error: type[BaseException]
):
    def fail(tensor: Tensor, *, hook: Any) -> None:
        raise error

    model.add_hook("blocks.1.attn.hook_z", fail)
    with unchanged(model), pytest.raises(error), attach(model, AttentionPattern()):
        model(tokens)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_detaches_when_the_loss_fails(
    model: HookedTransformer, tokens: Tensor, error: type[BaseException]
):
    def loss(logits: Tensor) -> Tensor:
        raise error

    with unchanged(model), pytest.raises(error), attach(model, AttentionGradient()):
        loss(model(tokens)).backward()


def test_a_missing_layer_leaves_nothing_behind(model: HookedTransformer):
    with (
        unchanged(model),
        pytest.raises(ProbeError, match="layer 9"),
        attach(model, AttentionPattern(), InductionScores(), AttentionGradient(layers=9)),
    ):
        pass


def test_nested_blocks_each_remove_their_own(model: HookedTransformer, tokens: Tensor):
    outer, inner = AttentionPattern(), AttentionPattern()
    with unchanged(model), attach(model, outer):
        with unchanged(model), attach(model, inner):
            model(tokens)
        model(tokens)
    model(tokens)
    assert (outer.batches, inner.batches) == (2, 1)


def test_one_probe_is_attached_once_at_a_time(model: HookedTransformer, tokens: Tensor):
    pattern = AttentionPattern()
    with attach(model, pattern):
        with (
            unchanged(model),
            pytest.raises(ProbeError, match="already attached"),
            attach(model, pattern),
        ):
            pass
        model(tokens)
    with attach(model, pattern):
        model(tokens)
    assert pattern.batches == 2


def test_foreign_hooks_survive_and_still_act(model: HookedTransformer, tokens: Tensor):
    calls: list[str] = []

    def count(name: str) -> Any:
        return lambda x, hook: calls.append(name)

    model.add_hook(pattern_name(0), count("before"))
    with attach(model, AttentionPattern(), AttentionGradient("pattern")):
        model.add_hook(pattern_name(0), count("inside"))
        model.add_hook(pattern_name(1), count("backward"), dir="bwd")
        model(tokens, return_type="loss").backward()
    model(tokens, return_type="loss").backward()
    assert sorted(calls) == ["backward"] * 2 + ["before"] * 2 + ["inside"] * 2


def test_resetting_the_models_hooks_inside_the_block_does_not_blind_a_probe(
    model: HookedTransformer, tokens: Tensor
):
    pattern = AttentionPattern()
    with unchanged(model), attach(model, pattern):
        model.reset_hooks(including_permanent=True)
        model.run_with_cache(tokens)
        model.run_with_hooks(tokens, fwd_hooks=[(pattern_name(0), lambda x, hook: None)])
        with model.hooks(fwd_hooks=[(pattern_name(0), lambda x, hook: None)]):
            model(tokens)
    assert pattern.batches == 3


def test_a_hook_that_ablates_in_place_still_works(model: HookedTransformer, tokens: Tensor):
    def ablate(pattern: Tensor, hook: Any) -> Tensor:
        pattern[:, 0] = 0.0
        return pattern

    probes = AttentionPattern(), AttentionGradient("pattern")
    with attach(model, *probes), model.hooks(fwd_hooks=[(pattern_name(0), ablate)]):
        model(tokens, return_type="loss").backward()
    assert not probes[1].reading().sel(layer=0, head=0).values.any()


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_probes_change_neither_outputs_nor_gradients(model: HookedTransformer, tokens: Tensor):
    given = tokens.clone()
    alone = model(tokens, return_type="loss")
    alone.backward()
    before = gradients_of(model)
    model.zero_grad()
    with attach(model, AttentionPattern(), AttentionGradient(), InductionScores()):
        probed = model(tokens, return_type="loss")
        assert all(p.grad is None for p in model.parameters())
        probed.backward()
    assert torch.equal(alone, probed)
    assert all(map(torch.equal, before, gradients_of(model)))
    assert torch.equal(tokens, given)


def test_a_backward_pass_after_the_block_is_not_read(model: HookedTransformer, tokens: Tensor):
    with attach(model, AttentionGradient()) as (gradient,):
        loss = model(tokens, return_type="loss")
        loss.backward(retain_graph=True)
    loss.backward()
    assert gradient.batches == 1


def test_no_graph_outlives_the_loss(model: HookedTransformer, tokens: Tensor):
    freed: list[bool] = []

    class Marker(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.marker = Freed()
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0]

    class Freed:
        def __del__(self) -> None:
            freed.append(True)

    def mark(tensor: Tensor, *, hook: Any) -> Tensor:
        marked: Tensor = Marker.apply(tensor)
        return marked

    model.add_hook(pattern_name(0), mark)
    with attach(model, AttentionPattern(), AttentionGradient("pattern"), InductionScores()):
        model(tokens, return_type="loss")
        assert freed == [True]
