"""Path patching names the wired path and no other; every effect against a computation by hand."""

import json
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from probes import ProbeError, direct_logit_attribution, find_circuit, repeated_tokens
from probes.intervening.circuit import heads_below
from probes.intervening.patching import INPUTS
from tests.probes.families import FAMILIES, tiny
from tests.probes.wired import planted, wired_circuit

close = torch.testing.assert_close
Build = Any


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= 10 else []) for n in range(50)]
)
def test_exactly_the_wired_paths_are_named(seed: int):
    wired = wired_circuit(seed)
    senders = heads_below(wired.model, wired.model.cfg.n_layers)
    receivers = [wired.induction, wired.decoys[0]]  # the second reads the same keys, for nothing
    circuit = find_circuit(wired.model, senders, receivers, n_sequences=10)
    assert {(path.sender, path.receiver, path.input) for path in circuit.named} == {
        (sender, wired.induction, name) for sender, name in wired.paths
    }
    for path in circuit.named:
        assert path.rise > 1
        assert (path.attention_drop > 0.5) == (path.input != "v")
    effects = {(effect.layer, effect.head): effect for effect in circuit.heads}
    assert effects[wired.induction].logit > 5
    for head in {wired.induction, *(sender for sender, _ in wired.paths)}:
        assert effects[head].rise > max(1, 5 * effects[head].rise_stderr)
    for decoy in wired.decoys:
        assert abs(effects[decoy].rise) < 0.5
        assert abs(effects[decoy].logit) < 0.5


def test_a_decoy_with_the_same_keys_loses_its_attention_but_no_prediction():
    wiring = planted(1)
    circuit = find_circuit(wiring.model, [wiring.partner], [wiring.useless], inputs="k")
    (path,) = circuit.paths
    assert path.attention_drop > 0.5
    assert not path.named
    assert abs(path.rise) < 0.05


def _by_hand(model: Any, tokens: Tensor, other: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Logits and pattern if one input of head 1.0 reads head 0.1 of other sequences."""
    (_, cache), (_, source) = (model.run_with_cache(t) for t in (tokens, other))
    attention = model.blocks[1].attn
    written = (source["z", 0] - cache["z", 0])[:, :, 1] @ model.blocks[0].attn.W_O[1]
    stream = cache["resid_pre", 1]
    streams = {key: stream + written if key == name else stream for key in INPUTS}
    query, key, value = (
        streams[part] @ getattr(attention, f"W_{part.upper()}")[0]
        + getattr(attention, f"b_{part.upper()}")[0]
        for part in ("q", "k", "v")
    )
    scores = query @ key.mT
    pattern = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf).softmax(-1)
    z = pattern @ value
    output = cache["resid_post", 1] + (z - cache["z", 1][:, :, 0]) @ attention.W_O[0]
    return output @ model.W_U + model.b_U, pattern


@pytest.mark.parametrize("name", INPUTS)
def test_a_path_against_a_computation_by_hand(build: Build, name: Any):
    model = build(normalization_type=None, use_attn_scale=False, seed=3).double()
    for parameter in model.parameters():
        parameter.data.mul_(0.15)  # without a norm, the logits would be in the thousands
    tokens = repeated_tokens(5, 4, 7, generator=torch.Generator().manual_seed(0), bos=0)
    circuit = find_circuit(model, [(0, 1)], [(1, 0)], inputs=(name,), tokens=tokens)
    logits, pattern = _by_hand(model, tokens, tokens.roll(1, 0), name)
    intact, cache = model.run_with_cache(tokens)
    losses = [
        -values.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[:, 5:, 0].mean(1)
        for values in (logits, intact)
    ]
    rise = losses[0] - losses[1]
    (path,) = circuit.paths
    assert path.rise == pytest.approx(rise.mean().item(), abs=1e-9)
    assert path.rise_stderr == pytest.approx(rise.std().item() / math.sqrt(5), abs=1e-9)
    assert abs(path.rise) > 1e-3
    queries = range(5, 9)
    drop = sum(
        (cache["pattern", 1][:, 0, q, q - 3] - pattern[:, q, q - 3]) / len(queries) for q in queries
    )
    assert path.attention_drop == pytest.approx(drop.mean().item(), abs=1e-9)


def test_passes_that_start_at_the_receiver_equal_whole_passes(build: Build):
    model = build(n_layers=3, attn_only=False, act_fn="gelu", d_mlp=16).double()
    options: dict[str, Any] = {"n_sequences": 3, "generator": None}
    senders, receivers = heads_below(model, 2), [(2, 0), (1, 1)]
    circuit = find_circuit(model, senders, receivers, **options)
    one_by_one = find_circuit(model, senders, receivers, max_batch_bytes=1, **options)
    model.original_model = None  # then every pass starts at the tokens, as those of a bridge
    whole = find_circuit(model, senders, receivers, **options)
    for other in (one_by_one, whole):
        for ours, theirs in zip(circuit.paths, other.paths, strict=True):
            assert (ours.sender, ours.receiver, ours.input) == (
                theirs.sender,
                theirs.receiver,
                theirs.input,
            )
            assert ours.rise == pytest.approx(theirs.rise, abs=1e-9)
            assert ours.attention_drop == pytest.approx(theirs.attention_drop, abs=1e-9)
    assert len(circuit.paths) == 3 * (4 + 2)


def test_resample_ablation_against_a_computation_by_hand(build: Build):
    model = build().double()
    tokens = repeated_tokens(5, 4, 7, generator=torch.Generator().manual_seed(0))
    (effect, _) = find_circuit(model, [(0, 0)], [(1, 1)], tokens=tokens).heads
    intact, cache = model.run_with_cache(tokens)

    def swap(z: Tensor, hook: Any) -> Tensor:
        z[:, :, 1] = cache["z", 1].roll(1, 0)[:, :, 1]
        return z

    changed = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", swap)])
    rise = [
        -values.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[:, 4:, 0].mean()
        for values in (changed, intact)
    ]
    assert (effect.layer, effect.head) == (1, 1)
    assert effect.rise == pytest.approx((rise[0] - rise[1]).item(), abs=1e-9)


@pytest.mark.parametrize("norm", [None, "LN"])
def test_contributions_add_up_to_the_logit(build: Build, norm: str | None):
    model = build(normalization_type=norm, d_model=9, n_layers=2, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.ndim)
        )
    tokens = repeated_tokens(4, 5, 7, generator=torch.Generator().manual_seed(0))
    reading = direct_logit_attribution(model, tokens)
    logits, cache = model.run_with_cache(tokens)
    right = logits[:, :-1].gather(2, tokens[:, 1:, None])[..., 0] - logits[:, :-1].mean(-1)
    assert reading.total == pytest.approx(right[:, 5:].mean().item(), abs=1e-9)

    def direct(part: Tensor) -> Tensor:
        """What a part of the stream adds to the right logit, on the repeated half."""
        if norm is not None:
            scale = cache["ln_final.hook_scale"]
            part = (part - part.mean(-1, keepdim=True)) / scale * model.ln_final.w
        centred = part @ model.W_U
        gathered = centred[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        mean: Tensor = (gathered - centred[:, :-1].mean(-1))[:, 5:].mean()
        return mean

    total = direct(cache["hook_embed"] + cache["hook_pos_embed"])
    for layer in (0, 1):
        attention = model.blocks[layer].attn
        for head in (0, 1):
            part = direct(cache["z", layer][:, :, head] @ attention.W_O[head])
            close(reading.logit[layer, head], part.detach())
            total = total + part
        total = total + direct(attention.b_O.expand_as(cache["resid_pre", 0]))
    if norm is not None:
        bias = (model.ln_final.b @ model.W_U).expand_as(logits)
        gathered = bias[:, :-1].gather(2, tokens[:, 1:, None])[..., 0] - bias[:, :-1].mean(-1)
        total = total + gathered[:, 5:].mean()
    unembed = model.b_U.expand_as(logits)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    total = total + (unembed - model.b_U.mean())[:, 5:].mean()
    assert total.item() == pytest.approx(reading.total, abs=1e-9)


NORMALISES = ("Gemma 2", "Gemma 3", "OLMo 2")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_patched_or_refused_in_one_line(family: str):
    model = tiny(family)
    if family in (*NORMALISES, "BERT"):
        reason = "later tokens" if family == "BERT" else "does not add the sum of its heads"
        with pytest.raises(ProbeError, match=reason) as refusal:
            find_circuit(model, [(0, 0)], [(1, 0)], n_sequences=2)
        assert "\n" not in str(refusal.value)
        return
    with warnings.catch_warnings(action="ignore"):
        circuit = find_circuit(model, [(0, 0), (0, 1)], [(1, 1)], n_sequences=4)
    assert len(circuit.paths) == 6
    # Of rotary, grouped or scaled attention too: every input of the head carries something.
    for path in circuit.paths:
        assert path.rise != 0
        assert path.input != "v" or abs(path.attention_drop) < 1e-6


def test_hook_points_that_the_model_does_not_compute_with_are_refused(build: Build):
    model = build()
    attention = model.blocks[1].attn
    hooked, attention.hook_k = attention.hook_k, HookPoint()
    with pytest.raises(ProbeError, match=r"does not run its blocks\.1\.attn\.hook_k"):
        find_circuit(model, [(0, 0)], [(1, 0)])
    attention.hook_k = hooked
    attention.W_V.data.zero_()
    with pytest.raises(ProbeError, match=r"hook_resid_pre.*changes nothing at .*hook_v"):
        find_circuit(model, [(0, 0)], [(1, 0)], inputs=("v",))


def test_bad_input_is_refused(build: Build):
    model = build()
    pair: Any = ([(0, 0)], [(1, 0)])
    tokens = repeated_tokens(1, 4, 7, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"inputs are \[\]"):
        find_circuit(model, *pair, inputs=())
    with pytest.raises(ValueError, match="standard_errors is -1"):
        find_circuit(model, *pair, standard_errors=-1.0)
    with pytest.raises(ValueError, match="give two"):
        find_circuit(model, *pair, tokens=tokens)
    with pytest.raises(ProbeError, match="no pair of tokens recurs in sequence 1"):
        find_circuit(model, *pair, tokens=torch.tensor([[1, 2, 1, 2], [1, 2, 3, 4]]))
    with pytest.raises(ProbeError, match="head 5 does not exist"):
        find_circuit(model, [(0, 5)], [(1, 0)])


def test_exports(build: Build):
    circuit = find_circuit(build(), [(0, 0), (1, 1)], [(1, 0)], n_sequences=1)
    content = json.loads(json.dumps(circuit.to_dict(), allow_nan=False))
    assert [path["input"] for path in content["paths"]] == ["k", "q", "v"]
    assert content["paths"][0]["rise_stderr"] is None  # one sequence has no standard error
    assert not circuit.named
    frame = circuit.to_frame()
    assert list(frame["sender"]) == [(0, 0)] * 3
    assert find_circuit(build(), [(0, 0)], []).paths == ()
