"""Every instrument leaves a model as it was, also when an error or Ctrl-C interrupts it."""

import gc
import random
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mechcausal.models.adapter import HookedTransformer
from probes import (
    AttentionGradient,
    AttentionPattern,
    AttentionTo,
    InductionScores,
    LabelledTensor,
    Probe,
    ablation_effects,
    attach,
    attention_by_class,
    attention_effects,
    copying_score,
    edit_attention,
    k_composition,
    knock_out,
    loss_by_position,
    make_uniform,
    mean_ablate,
    order_sensitivity,
    positional_share,
    repeated_tokens,
    score_heads,
    track_formation,
)
from probes.heads import composition, copying, head_scores
from probes.intervening import attention_edits
from probes.reading import hooking, passes, patterns, records
from probes.reading.attach import ForwardHook
from tests.left_as_found import changed, fingerprint, interrupted, left_as_found

SCORES, PATTERN, VALUES = (f"blocks.0.attn.hook_{name}" for name in ("attn_scores", "pattern", "z"))
Work = Callable[[HookedTransformer, Tensor], Any]


def all_probes() -> tuple[Probe, ...]:
    return (
        AttentionPattern(),
        AttentionPattern(reduce="mean"),
        AttentionGradient(),
        AttentionGradient("pattern", centred=True),
        InductionScores(),
        AttentionTo(None, torch.ones(6, 6, dtype=torch.bool).tril(-1)),
    )


def probed(model: HookedTransformer, tokens: Tensor) -> None:
    """A pass without gradients, and one with gradients of the attention alone."""
    with attach(model, *all_probes()):
        model.eval()
        try:
            with torch.no_grad():
                model(tokens)
            parameters = [p for p in model.parameters() if p.requires_grad]
            loss = model(tokens, return_type="loss")
            torch.autograd.grad(loss, parameters[-1:], allow_unused=True)
        finally:
            model.train()


SHARED_PROBES = all_probes()


def empty_blocks(model: HookedTransformer, tokens: Tensor) -> None:
    """Nearly every moment is one of entering or leaving, with probes that were attached before."""
    with attach(model, *SHARED_PROBES), edit_attention(model, {0: make_uniform([2])}):
        pass


def ablated(model: HookedTransformer, tokens: Tensor) -> None:
    with torch.no_grad(), mean_ablate(model, [(0, 1), (1, 0)], tokens=tokens):
        model(tokens)


def edited(model: HookedTransformer, tokens: Tensor) -> None:
    with torch.no_grad(), edit_attention(model, {0: knock_out([(3, 1)]), 1: make_uniform([2])}):
        model(tokens)


def effects(model: HookedTransformer, tokens: Tensor) -> Any:
    def loss() -> Tensor:
        losses: Tensor = model(tokens, return_type="loss", loss_per_token=True)
        return losses.mean(1)

    return attention_effects(model, 0, [("a", knock_out([(3, 1)])), ("b", make_uniform([2]))], loss)


def ablated_by_name(model: HookedTransformer, tokens: Tensor) -> Any:
    repeats = repeated_tokens(2, 4, 7, generator=torch.Generator().manual_seed(0))
    return ablation_effects(model, [(1, 0)], tokens={"repeats": repeats})


WORKS: dict[str, Work] = {
    "attach": probed,
    "empty blocks": empty_blocks,
    "mean_ablate": ablated,
    "edit_attention": edited,
    "attention_effects": effects,
    "score_heads": lambda model, tokens: score_heads(model, n_sequences=4),
    "score_heads of tokens": lambda model, tokens: score_heads(model, tokens),
    "ablation_effects": lambda model, tokens: ablation_effects(model, [(1, 0)], n_sequences=2),
    "loss_by_position": lambda model, tokens: loss_by_position(model, n_sequences=2),
    "track_formation": lambda model, tokens: track_formation([(0, model)], n_sequences=2),
    "k_composition": lambda model, tokens: k_composition(model, [(1, 0)]),
    "copying_score": lambda model, tokens: copying_score(model, 0),
    "ablation_effects by name": ablated_by_name,
    "attention_by_class": lambda model, tokens: attention_by_class(
        model, torch.zeros(6, 6, dtype=torch.int64), tokens
    ),
    # Of this model, different sequences would have weights of 0 at different keys.
    "positional_share": lambda model, tokens: positional_share(model, tokens[:1].expand(3, -1)),
    "order_sensitivity": lambda model, tokens: order_sensitivity(model, tokens),
}


@pytest.fixture
def used(model: HookedTransformer, tokens: Tensor) -> HookedTransformer:
    """A model in use: with hooks and gradients of others, some frozen, and of mixed modes."""
    model.add_hook(VALUES, lambda x, hook: None)
    model.add_perma_hook("blocks.1.attn.hook_pattern", lambda x, hook: None)
    model(tokens, return_type="loss").backward()
    model.embed.W_E.requires_grad_(False)
    model.blocks[0].attn.W_Q.grad = None
    model.train()
    return model


class Fault:
    """Raises once, at the n-th call."""

    def __init__(self, error: BaseException, n: int = 0) -> None:
        self.error, self.n = error, n

    def __call__(self, *arguments: Any) -> None:
        self.n -= 1
        if self.n == -1:
            raise self.error


@pytest.mark.parametrize("name", WORKS)
def test_nothing_is_left_after_a_work_that_ends_well(
    used: HookedTransformer, tokens: Tensor, name: str
) -> None:
    if name != "attach":  # which sets the mode itself
        used.blocks[1].eval()
    with left_as_found(used):
        for _ in range(2):
            WORKS[name](used, tokens)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize(
    "module",
    ["embed", "hook_embed", "blocks.0", SCORES, PATTERN, VALUES, "blocks.1.attn", "unembed"],
)
def test_nothing_is_left_after_a_fault_at_any_hook_of_a_pass(
    used: HookedTransformer, tokens: Tensor, module: str, n: int
) -> None:
    handle = used.get_submodule(module).register_forward_hook(Fault(KeyboardInterrupt(), n))
    with left_as_found(used), pytest.raises(KeyboardInterrupt):
        probed(used, tokens)
    handle.remove()


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize(
    ("name", "owner", "function"),
    [
        ("attach", records.Concatenated, "add"),
        ("attach", sys.modules["probes.reading.attach"], "_read_activation"),
        ("mean_ablate", records.Sum, "add"),
        ("edit_attention", hooking.Hooks, "remove"),
        ("attention_effects", attention_edits, "edit_attention"),
        ("score_heads", AttentionTo, "reading"),
        ("score_heads of tokens", head_scores, "uniform_baseline"),
        ("ablation_effects", torch.nn.functional, "cross_entropy"),
        ("loss_by_position", passes, "converted"),
        ("track_formation", head_scores, "run"),
        ("k_composition", composition, "_factors"),
        ("copying_score", copying, "_wide"),
        ("ablation_effects by name", passes, "converted"),
        ("attention_by_class", patterns, "converted"),
        ("positional_share", patterns, "converted"),
        ("order_sensitivity", sys.modules["probes.intervening.order_sensitivity"], "split"),
    ],
)
def test_nothing_is_left_after_a_fault_in_any_kind_of_work(
    used: HookedTransformer,
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    owner: Any,
    function: str,
    n: int,
) -> None:
    original, fault = getattr(owner, function), Fault(KeyboardInterrupt(), n)

    def faulty(*arguments: Any, **options: Any) -> Any:
        fault()
        return original(*arguments, **options)

    with left_as_found(used):
        monkeypatch.setattr(owner, function, faulty)
        with pytest.raises(KeyboardInterrupt):
            WORKS[name](used, tokens)
        monkeypatch.undo()


class Broken(Probe):
    """Fails at the chosen moment."""

    def __init__(self, moment: str, error: BaseException) -> None:
        self.moment, self.error = moment, error

    def hooks(self, model: nn.Module) -> Mapping[str, ForwardHook]:
        if self.moment == "hooks":
            raise self.error
        return {PATTERN: self.forward}

    def forward(self, pattern: Tensor) -> Any:
        if self.moment == "forward":
            raise self.error
        return self.backward

    def backward(self, gradient: Tensor) -> None:
        if self.moment == "backward":
            raise self.error

    def reset(self) -> None: ...

    def reading(self) -> LabelledTensor:
        return LabelledTensor("nothing", torch.zeros(()), ())


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["hooks", "forward", "backward", "the user's own line"])
def test_nothing_is_left_after_a_users_fault(
    used: HookedTransformer, tokens: Tensor, moment: str, error: BaseException
) -> None:
    probes = all_probes()
    used.requires_grad_(False)

    def work() -> None:
        with (
            edit_attention(used, {0: make_uniform([2])}),
            mean_ablate(used, [(1, 0)], tokens=tokens),
            attach(used, *probes, Broken(moment, error), AttentionPattern()),
        ):
            used(tokens, return_type="loss").backward()
            raise error

    with left_as_found(used), pytest.raises(type(error)):
        work()
    with left_as_found(used), attach(used, *probes):  # no longer marked as attached
        pass


# --- Nesting and order ---


def test_blocks_may_end_in_another_order_than_they_began(
    used: HookedTransformer, tokens: Tensor
) -> None:
    source = random.Random(0)
    for _ in range(20):
        probe = AttentionPattern()
        blocks: list[Any] = [
            attach(used, AttentionGradient(), AttentionPattern()),
            attach(used, InductionScores()),
            edit_attention(used, {0: knock_out([(3, 1)])}),
            edit_attention(used, {0: knock_out([(3, 1)])}),
            attach(used, probe),
        ]
        with left_as_found(used), torch.no_grad():
            for block in blocks:
                block.__enter__()
            used(tokens)
            source.shuffle(blocks)
            for block in blocks:
                block.__exit__(None, None, None)
        assert probe.batches == 1
        used(tokens)
        assert probe.batches == 1


def test_a_block_that_is_thrown_away_leaves_nothing(
    used: HookedTransformer, tokens: Tensor
) -> None:
    with left_as_found(used):
        for make in (
            lambda: attach(used, AttentionPattern()),
            lambda: edit_attention(used, {0: knock_out([(3, 1)])}),
            lambda: mean_ablate(used, [(0, 0)], tokens=tokens),
        ):
            block: Any = make()
            block.__enter__()
            del block
        gc.collect()


# --- Ctrl-C ---


@pytest.mark.parametrize(
    ("name", "times", "longest"),
    [
        ("attach", 20, 0.03),
        ("score_heads", 20, 0.03),
        ("mean_ablate", 20, 0.03),
        ("edit_attention", 20, 0.03),
        ("empty blocks", 40, 0.005),
    ],
)
def test_ctrl_c_at_random_moments_leaves_nothing(
    used: HookedTransformer, tokens: Tensor, name: str, times: int, longest: float
) -> None:
    source = random.Random(1)
    met = 0
    for _ in range(times):
        before = fingerprint(used)
        met += interrupted(
            lambda: WORKS[name](used, tokens), after=source.uniform(longest / 30, longest)
        )
        torch.set_grad_enabled(True)  # torch's own blocks are not safe from Ctrl-C
        used.train()
        assert changed(fingerprint(used), before) == {}
    assert met >= times / 2
