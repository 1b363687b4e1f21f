"""Heads that carry the circuit, heads that do not, and a model that is the same afterwards."""

import itertools

import pytest
import torch
from torch import Tensor

from mechcausal.models.adapter import HookedTransformer
from probes import ablation_effects, mean_ablate, repeated_tokens
from probes.intervening.ablation_effects import NEGLIGIBLE
from probes.reading.passes import token_losses
from tests.probes.families import some_tokens, tiny
from tests.probes.wired import planted

close = torch.testing.assert_close


@pytest.mark.parametrize("seed", range(10))
def test_the_circuit_is_needed_and_everything_else_is_not(seed: int):
    wiring = planted(seed)
    effects = {
        (effect.layer, effect.head): effect
        for effect in ablation_effects(wiring.model, list(wiring.verdicts), n_sequences=64)
    }
    for needed in (wiring.partner, wiring.induction):
        assert effects[needed].rise > 1
        assert effects[needed].rise > 10 * effects[needed].stderr
        assert not effects[needed].removable
    for spare in (wiring.useless, wiring.previous, wiring.duplicate, wiring.positional):
        assert abs(effects[spare].rise) < 0.5
        clearly_below = effects[spare].rise + 2 * effects[spare].stderr < 0.05
        assert effects[spare].removable == clearly_below
    assert effects[wiring.useless].removable


def test_rise_is_the_difference_of_the_losses(model: HookedTransformer):
    tokens = repeated_tokens(6, 5, 7, generator=torch.Generator().manual_seed(0), bos=2)
    intact = token_losses(model, tokens)[:, 6:].mean(1)
    with mean_ablate(model, [(1, 0)], tokens=tokens):
        without = token_losses(model, tokens)[:, 6:].mean(1)
    (effect,) = ablation_effects(model, [(1, 0)], tokens=tokens)
    rise = without - intact
    assert effect.rise == pytest.approx(rise.mean().item(), abs=1e-4)
    assert effect.stderr == pytest.approx(rise.std().item() / 6**0.5, abs=1e-4)
    assert effect.loss == pytest.approx(intact.mean().item(), abs=1e-4)


def test_the_mean_is_over_sequences_and_positions(model: HookedTransformer, tokens: Tensor):
    _, cache = model.run_with_cache(tokens)
    seen = {}
    with mean_ablate(model, [(0, 1), (1, 0), (1, 1)], tokens=tokens):
        for layer in (0, 1):
            model.blocks[layer].attn.hook_z.register_forward_hook(
                lambda _, __, z, layer=layer: seen.update({layer: z})
            )
        model(tokens)
    close(seen[0][:, :, 1], cache["z", 0][:, :, 1].mean((0, 1)).expand(3, 6, -1))
    close(seen[0][:, :, 0], cache["z", 0][:, :, 0])
    close(seen[1], cache["z", 1].mean((0, 1)).expand(3, 6, -1, -1))


def test_gradients_flow_through_an_ablated_model(model: HookedTransformer, tokens: Tensor):
    with mean_ablate(model, [(0, 0)], tokens=tokens):
        model(tokens, return_type="loss").backward()
    assert model.W_U.grad.any()


def test_no_heads_is_no_change(model: HookedTransformer, tokens: Tensor):
    before = model(tokens)
    with mean_ablate(model, []):
        assert torch.equal(model(tokens), before)
    assert ablation_effects(model, []) == ()


def test_a_noisy_head_is_not_called_removable(model: HookedTransformer):
    heads = [(layer, head) for layer in (0, 1) for head in (0, 1)]
    effects = [e for n in (2, 3, 5, 9) for e in ablation_effects(model, heads, n_sequences=n)]
    noisy = [e for e in effects if NEGLIGIBLE < e.rise < 2 * e.stderr]
    assert noisy
    for effect in effects:
        assert effect.removable == (effect.rise + 2 * effect.stderr < NEGLIGIBLE)
    # One sequence has no standard error, so nothing is known.
    assert not any(e.removable for e in ablation_effects(model, heads, n_sequences=1))


def test_batches_by_name_have_the_effects_of_each_batch_and_a_control():
    wiring = planted(0)
    heads = [wiring.partner, wiring.induction, wiring.useless]
    source = torch.Generator().manual_seed(0)
    batches = {f"{n}": repeated_tokens(16, n, 20, generator=source) for n in (5, 8)}
    effects = ablation_effects(wiring.model, heads, tokens=batches)
    assert list(effects) == ["5", "8", "control"]
    for name, batch in batches.items():
        assert effects[name] == ablation_effects(wiring.model, heads, tokens=batch)
        needed = {(effect.layer, effect.head): effect.rise > 1 for effect in effects[name]}
        assert list(needed.values()) == [True, True, False]
    # Where nothing repeats, the circuit's copies are wrong: without it the loss is lower.
    for effect in effects["control"][:2]:
        assert effect.rise < -3 * effect.stderr < 0
        assert effect.removable


@pytest.mark.parametrize("padded", [False, True])
def test_the_control_is_random_and_judged_where_nothing_repeats(
    model: HookedTransformer, padded: bool
):
    tokens = repeated_tokens(6, 5, 7, generator=torch.Generator().manual_seed(0), bos=2)
    short = repeated_tokens(6, 3, 7, generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[:3, 9:] = 1 - int(padded)
    masks = {"long": mask} if padded else None
    seen: list[Tensor] = []
    handle = model.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    effects = ablation_effects(
        model, [(1, 0)], tokens={"short": short, "long": tokens}, attention_mask=masks
    )
    handle.remove()
    control = seen[-1]
    assert control.shape == tokens.shape
    assert (control[:, 0] == 2).all()  # the first token that all sequences share
    assert not torch.equal(control, tokens)
    losses = token_losses(model, control, attention_mask=mask)
    with mean_ablate(model, [(1, 0)], tokens=control, attention_mask=mask):
        rises = token_losses(model, control, attention_mask=mask) - losses
    means, before = [], []
    for row, (sequence, real) in enumerate(zip(control.tolist(), mask.tolist(), strict=True)):
        length = sum(real)
        pairs = list(itertools.pairwise(sequence[:length]))
        new = [i for i, pair in enumerate(pairs) if pair not in pairs[:i]]
        means.append(rises[row, new].mean())
        before.append(losses[row, new].mean())
    (effect,) = effects["control"]
    assert effect.rise == pytest.approx(torch.stack(means).mean().item(), abs=1e-4)
    assert effect.loss == pytest.approx(torch.stack(before).mean().item(), abs=1e-4)
    assert len(effects["long"]) == 1


def test_batches_by_name_without_heads_have_no_effects(model: HookedTransformer):
    tokens = repeated_tokens(2, 4, 7, generator=torch.Generator().manual_seed(0))
    assert ablation_effects(model, [], tokens={"a": tokens}) == {"a": (), "control": ()}


def test_through_a_bridge():
    bridge, tokens = tiny("GPT-2"), some_tokens(3, 8)
    _, cache = bridge.run_with_cache(tokens)
    with mean_ablate(bridge, [(1, 0)], tokens=tokens):
        _, ablated = bridge.run_with_cache(tokens)
    z, flat = (c["blocks.1.attn.hook_z"].reshape(3, 8, 2, 8) for c in (cache, ablated))
    close(flat[:, :, 0], z[:, :, 0].mean((0, 1)).expand(3, 8, -1))
    close(flat[:, :, 1], z[:, :, 1])
    effects = ablation_effects(bridge, [(0, 0), (1, 1)], n_sequences=4)
    assert [(e.layer, e.head) for e in effects] == [(0, 0), (1, 1)]
    assert any(effect.rise != 0 for effect in effects)
    _, again = bridge.run_with_cache(tokens)
    close(again["blocks.1.attn.hook_z"], cache["blocks.1.attn.hook_z"])
