"""Whatever happens inside the block, exactly our hooks are gone after it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from mechcausal.models.adapter import HookedTransformer
from probes import (
    AttentionGradient,
    AttentionPattern,
    InductionScores,
    ProbeError,
    attach,
    check_attention,
    copying_score,
    edit_attention,
    k_composition,
    loss_by_position,
    make_uniform,
    mean_ablate,
    score_heads,
)
from probes.reading.attach import ForwardHook
from probes.reading.hook_names import hook_name
from tests.left_as_found import left_as_found


def test_a_missing_layer_leaves_nothing_behind(model: HookedTransformer):
    with (
        left_as_found(model),
        pytest.raises(ProbeError, match="layer 9"),
        attach(model, AttentionPattern(), InductionScores(), AttentionGradient(layers=9)),
    ):
        pass


def test_nested_blocks_each_remove_their_own(model: HookedTransformer, tokens: Tensor):
    outer, inner = AttentionPattern(), AttentionPattern()
    with left_as_found(model), attach(model, outer):
        with left_as_found(model), attach(model, inner):
            model(tokens)
        model(tokens)
    model(tokens)
    assert (outer.batches, inner.batches) == (2, 1)


def test_one_probe_is_attached_once_at_a_time(model: HookedTransformer, tokens: Tensor):
    pattern = AttentionPattern()
    with attach(model, pattern):
        with (
            left_as_found(model),
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

    model.add_hook(hook_name("pattern", 0), count("before"))
    with attach(model, AttentionPattern(), AttentionGradient("pattern")):
        model.add_hook(hook_name("pattern", 0), count("inside"))
        model.add_hook(hook_name("pattern", 1), count("backward"), dir="bwd")
        model(tokens, return_type="loss").backward()
    model(tokens, return_type="loss").backward()
    assert sorted(calls) == ["backward"] * 2 + ["before"] * 2 + ["inside"] * 2


def test_resetting_the_models_hooks_inside_the_block_does_not_blind_a_probe(
    model: HookedTransformer, tokens: Tensor
):
    pattern = AttentionPattern()
    with left_as_found(model), attach(model, pattern):
        model.reset_hooks(including_permanent=True)
        model.run_with_cache(tokens)
        model.run_with_hooks(tokens, fwd_hooks=[(hook_name("pattern", 0), lambda x, hook: None)])
        with model.hooks(fwd_hooks=[(hook_name("pattern", 0), lambda x, hook: None)]):
            model(tokens)
    assert pattern.batches == 3


def test_a_hook_that_ablates_in_place_still_works_also_on_a_frozen_model(
    model: HookedTransformer, tokens: Tensor
):
    def ablate(pattern: Tensor, hook: Any) -> Tensor:
        pattern[:, 0] = 0.0
        return pattern

    readings = []
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        probes = AttentionGradient(), AttentionGradient("pattern")
        with attach(model, *probes), model.hooks(fwd_hooks=[(hook_name("pattern", 0), ablate)]):
            model(tokens, return_type="loss").backward()
        readings.append([probe.reading().values for probe in probes])
    for trained, frozen in zip(*readings, strict=True):
        torch.testing.assert_close(frozen, trained)
        assert not frozen[0, 0].any()


@pytest.mark.parametrize("in_place", [False, True])
def test_the_gradient_on_scores_reaches_through_what_others_make_of_the_pattern(
    model: HookedTransformer, tokens: Tensor, in_place: bool
):
    def halve(pattern: Tensor, hook: Any) -> Tensor:
        return pattern.mul_(0.5) if in_place else pattern * 0.5

    kept: list[Tensor] = []
    keep = ("blocks.0.attn.hook_attn_scores", lambda scores, hook: kept.append(scores))
    loss = model.run_with_hooks(
        tokens, return_type="loss", fwd_hooks=[keep, (hook_name("pattern", 0), halve)]
    )
    (true,) = torch.autograd.grad(loss, kept)
    with (
        model.hooks(fwd_hooks=[(hook_name("pattern", 0), halve)]),
        attach(model, AttentionGradient(layers=0)) as (gradient,),
    ):
        model(tokens, return_type="loss").backward()
    torch.testing.assert_close(gradient.reading().sel(layer=0).values, true.sum(0))


def test_any_module_with_hook_points_can_be_probed():
    class Doubler(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.hook_out = HookPoint()
            self.setup()

        def forward(self, x: Tensor) -> Tensor:
            doubled: Tensor = self.hook_out(2 * x)
            return doubled

    class Out(AttentionPattern):
        def hooks(self, model: nn.Module) -> Mapping[str, ForwardHook]:
            return {"hook_out": self.forward}

        def forward(self, activation: Tensor) -> None:
            self.seen = activation.tolist()

    model = Doubler()
    with attach(model, Out()) as (probe,):
        model(torch.ones(2))
    assert probe.seen == [2.0, 2.0]


NEED_HOOKS: dict[str, Any] = {
    "attach": lambda model: attach(model, AttentionPattern()),
    "edit_attention": lambda model: edit_attention(model, {0: make_uniform([1])}),
    "mean_ablate": lambda model: mean_ablate(model, [(0, 0)]),
    "score_heads": score_heads,
    "check_attention": check_attention,
}
NEED_WEIGHTS: dict[str, Any] = {
    "loss_by_position": loss_by_position,
    "k_composition": lambda model: k_composition(model, [(1, 0)]),
    "copying_score": lambda model: copying_score(model, 0),
}


def refuses(model: nn.Module, instrument: str, line: str) -> None:
    with pytest.raises(ProbeError, match=line) as error:
        (NEED_HOOKS | NEED_WEIGHTS)[instrument](model).__enter__()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("instrument", NEED_HOOKS)
def test_a_compiled_model_is_refused_in_one_line(model: HookedTransformer, instrument: str):
    compiled = torch.compile(model, backend="eager")
    refuses(compiled, instrument, "compiled with torch.compile")
    with attach(model, AttentionPattern()):  # the model itself stays as it was
        pass
    model.blocks[1].compile(backend="eager")
    refuses(model, instrument, "compiled with torch.compile")


@pytest.mark.parametrize("instrument", [*NEED_HOOKS, *NEED_WEIGHTS])
def test_a_wrapped_model_is_refused_in_one_line(model: HookedTransformer, instrument: str):
    wrapped = nn.DataParallel(model)
    refuses(wrapped, instrument, "DataParallel wraps a HookedTransformer: attach to its")


@pytest.mark.slow
def test_a_compiled_copy_is_read_rightly_or_not_at_all(model: HookedTransformer, tokens: Tensor):
    compiled = torch.compile(model, backend="eager")
    compiled(tokens).sum().backward()
    plain, through_copy = AttentionGradient("pattern"), AttentionGradient("pattern")
    with attach(model, plain):
        model(tokens).sum().backward()
    with attach(model, through_copy):
        compiled(tokens).sum().backward()
    if through_copy.batches:
        torch.testing.assert_close(through_copy.reading().values, plain.reading().values)
    else:
        with pytest.raises(ProbeError, match="a compiled copy of the model do not count"):
            through_copy.reading()


def test_the_module_of_a_ddp_wrapper_can_be_probed(model: HookedTransformer, tokens: Tensor):
    group: Any = torch.distributed
    group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(model)
        refuses(wrapper, "attach", "DistributedDataParallel wraps a HookedTransformer")
        probes = AttentionPattern(), AttentionGradient()
        # An all-reduce that is still running can deadlock torch when the wrapper is deleted.
        with attach(wrapper.module, *probes), wrapper.no_sync():  # as the line says
            wrapper(tokens, return_type="loss").backward()
        assert [probe.batches for probe in probes] == [1, 1]
    finally:
        group.destroy_process_group()


@pytest.mark.parametrize(
    ("reentrant", "frozen"),
    [(False, False), (False, True), (True, False)],  # reentrant blocks need a trained input
)
def test_activation_checkpointing_is_read_once(
    build: Any, tokens: Tensor, reentrant: bool, frozen: bool
):
    def readings(model: HookedTransformer) -> list[Tensor]:
        model.requires_grad_(not frozen)
        probes = AttentionPattern(reduce="mean"), AttentionGradient(), InductionScores()
        with attach(model, *probes):
            model(tokens, return_type="loss").backward()
        assert [probe.batches for probe in probes] == [1, 1, 1]
        return [probe.reading().values for probe in probes]

    def again(forward: Any, stream: Tensor, **options: Any) -> Tensor:
        output: Tensor = checkpoint(partial(forward, **options), stream, use_reentrant=reentrant)
        return output

    plain, checkpointed = build(), build()
    for block in checkpointed.blocks:
        block.forward = partial(again, block.forward)
    for expected, actual in zip(readings(plain), readings(checkpointed), strict=True):
        assert torch.allclose(expected, actual, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probes_change_neither_outputs_nor_gradients(build: Any, tokens: Tensor, dtype: Any):
    model, given = build(dtype=dtype), tokens.clone()
    parameters = list(model.parameters())

    def run() -> tuple[Tensor, ...]:
        loss = model(tokens, return_type="loss")
        return loss, *torch.autograd.grad(loss, parameters)

    alone = run()
    with attach(model, AttentionPattern(), AttentionGradient(), InductionScores()):
        probed = run()
    assert all(map(torch.equal, alone, probed))
    assert all(parameter.grad is None for parameter in parameters)
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

    model.add_hook(hook_name("pattern", 0), mark)
    with attach(model, AttentionPattern(), AttentionGradient("pattern"), InductionScores()):
        model(tokens, return_type="loss")
        assert freed == [True]
