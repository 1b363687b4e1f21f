"""Which heads are found: wired models with known heads, and every number against a loop."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel

from mechcausal.models.adapter import HookedTransformer, HookedTransformerConfig
from probes import copying_score, repeated_tokens, score_heads
from probes.heads.stimuli import bos_token, draw_stimuli, fitting_repeat_lengths
from tests.probes.wired import CONTEXT, POSITION, VOCAB, blank, look_back, planted

close = torch.testing.assert_close
Build = Any


class TestWiredModels:
    @pytest.mark.parametrize("seed", range(50))
    def test_every_planted_head_is_found_and_no_other(self, seed: int):
        wiring = planted(seed)
        scores = score_heads(wiring.model, n_sequences=10)
        assert {head: v for head, v in scores.verdicts.items() if v} == wiring.verdicts
        assert scores.positional_offset[wiring.positional] == wiring.offset
        assert scores.prefix_matching[wiring.induction] > 0.8
        assert scores.copying[wiring.induction] == pytest.approx(1.0, abs=1e-4)

    @pytest.mark.parametrize("seed", range(5))
    def test_also_behind_a_bos_and_on_given_tokens(self, seed: int):
        wiring = planted(seed)
        generator = torch.Generator().manual_seed(seed)
        tokens = repeated_tokens(12, 7, VOCAB, generator=generator, bos=4)
        for scores in (
            score_heads(wiring.model, n_sequences=10, bos=4),
            score_heads(wiring.model, tokens),
        ):
            assert {head: v for head, v in scores.verdicts.items() if v} == wiring.verdicts

    def test_a_decoy_at_the_one_repeat_length_is_caught_by_its_control(self):
        model = blank(2, 4)
        look_back(model, (1, 2), 5)
        look_back(model, (0, 1), 6)
        scores = score_heads(model, repeat_lengths=(6,))
        close(scores.prefix_matching[1, 2], torch.tensor(1.0))
        close(scores.positional_control[1, 2], torch.tensor(1.0))
        close(scores.duplicate_token[0, 1], torch.tensor(1.0))
        close(scores.duplicate_control[0, 1], torch.tensor(1.0))
        assert scores.heads("positional") in ([(0, 1), (1, 2)], [(1, 2), (0, 1)])
        assert not scores.heads("induction")
        assert not scores.heads("duplicate_token")

    @pytest.mark.parametrize("key", [0, 1, 4])
    def test_resting_on_one_fixed_position_is_no_verdict(self, key: int):
        model = blank(1, 2)
        with torch.no_grad():
            model.blocks[0].attn.W_Q[0] = 0
            model.blocks[0].attn.W_K[0] = 0
            model.blocks[0].attn.W_Q[0, POSITION, 0] = 1
            model.blocks[0].attn.W_K[0, POSITION.start + key, 0] = 50
        assert not any(score_heads(model).verdicts.values())

    def test_looking_at_itself_is_no_verdict(self):
        model = blank(1, 2)
        with torch.no_grad():
            for weight in (model.blocks[0].attn.W_Q, model.blocks[0].attn.W_K):
                weight[0] = 0
                weight[0, POSITION, :CONTEXT] = 7 * torch.eye(CONTEXT)
        assert not any(score_heads(model).verdicts.values())

    @pytest.mark.parametrize("vocab", [2, 3, 20])
    @pytest.mark.parametrize("threshold", [0.1, 0.2, 0.4])
    def test_uniform_heads_get_no_verdict(self, build: Build, vocab: int, threshold: float):
        model = build(d_vocab=vocab)
        for parameter in model.parameters():
            parameter.data.zero_()
        source = torch.Generator().manual_seed(0)
        recurring = torch.randint(vocab, (8, 12), generator=source)
        recurring[:, 1] = recurring[:, 0]
        for tokens in (None, recurring, recurring[:, :3], torch.zeros_like(recurring)):
            scores = score_heads(model, tokens, threshold=threshold, n_sequences=10)
            assert not any(scores.verdicts.values())
            for name in ("prefix_matching", "previous_token", "duplicate_token", "positional"):
                assert not scores.reaches(name, threshold).any()

    def test_uniform_heads_score_the_baseline(self):
        model = blank(1, 3, noise=0.0)
        scores = score_heads(model)
        close(scores.prefix_matching, scores.uniform_baseline)
        close(scores.positional_control, scores.uniform_baseline)


def _patterns(model: Any, tokens: Tensor) -> Tensor:
    """`[layer batch head query key]`, by caching everything."""
    _, cache = model.run_with_cache(tokens)
    return torch.stack([cache["pattern", layer] for layer in range(model.cfg.n_layers)])


def _at(patterns: Tensor, queries: range, offset: int) -> Tensor:
    """Mean attention `[layer batch head]` from some queries to `offset` before them."""
    return sum(patterns[..., q, q - offset] for q in queries) / len(queries)  # type: ignore[return-value]


@pytest.mark.parametrize("bos", [None, 2])
def test_every_number_against_a_loop(build: Build, bos: int | None):
    model = build(n_ctx=17, d_vocab=30, n_layers=3)
    sizes: dict[str, Any] = {"n_sequences": 7, "repeat_lengths": (3, 7, 5), "bos": bos}
    stimuli = draw_stimuli(model, **sizes)
    scores = score_heads(model, **sizes)
    expected: dict[str, list[Tensor]] = {}
    profile: dict[int, list[Tensor]] = {}
    for stimulus, length in zip(stimuli, (3, 7, 5), strict=True):
        start = int(bos is not None)
        second = range(start + length, start + 2 * length)
        repeated, control = (_patterns(model, t) for t in (stimulus.tokens, stimulus.control))
        assert stimulus.tokens.shape == stimulus.control.shape
        assert all(len(set(row)) == len(row) for row in stimulus.control.tolist())
        for name, values in {
            "prefix_matching": _at(repeated, second, length - 1),
            "positional_control": _at(control, second, length - 1),
            "duplicate_token": _at(repeated, second, length),
            "duplicate_control": _at(control, second, length),
            "previous_token": _at(repeated, range(1, second.stop), 1),
        }.items():
            expected.setdefault(name, []).append(values)
        for query in range(second.stop):
            for key in range(1, query + 1):
                profile.setdefault(query - key, []).extend(control[:, :, :, query, key].unbind(1))
    for name, parts in expected.items():
        values = torch.cat(parts, dim=1)
        close(getattr(scores, name), values.mean(1))
        close(getattr(scores, f"{name}_stderr"), values.std(1) / math.sqrt(7))
    longest = 14 + (bos is not None)
    offsets = {d: torch.stack(values).mean(0) for d, values in profile.items()}
    usable = [
        d for d in offsets if d >= 2 and longest - d >= max(3, math.ceil((longest - 1) / 4)) + 1
    ]
    best = torch.stack([offsets[d] for d in sorted(usable)]).max(0)
    close(scores.positional, best.values)
    close(scores.positional_offset, best.indices + 2)
    close(scores.copying, torch.stack([copying_score(model, layer) for layer in range(3)]))
    assert scores.sequences == 7


def test_batches_do_not_change_the_result(model: HookedTransformer):
    model.double()  # float32 products depend on the size of the batch
    at_once = score_heads(model, n_sequences=11)
    one_by_one = score_heads(model, n_sequences=11, max_batch_bytes=1)
    close(at_once.prefix_matching, one_by_one.prefix_matching)
    close(at_once.positional, one_by_one.positional)
    close(at_once.prefix_matching_stderr, one_by_one.prefix_matching_stderr)


def test_the_generator_decides(model: HookedTransformer):
    def score(seed: int | None) -> Tensor:
        source = None if seed is None else torch.Generator().manual_seed(seed)
        return score_heads(model, generator=source).prefix_matching

    assert torch.equal(score(1), score(1))
    assert torch.equal(score(None), score(None))
    assert not torch.equal(score(1), score(2))


def test_evaluation_mode_while_scoring(model: HookedTransformer):
    seen = []
    model.train()
    model.embed.register_forward_hook(
        lambda *_: seen.append((model.training, torch.is_grad_enabled()))
    )
    score_heads(model, n_sequences=1)
    assert set(seen) == {(False, False)}


class TestExport:
    def test_the_json_of_the_issue(self, build: Build):
        scores = score_heads(build(n_heads=3, d_vocab=20), n_sequences=9, threshold=0.3)
        content = json.loads(scores.to_json("tiny"))
        heads = content.pop("heads")
        assert content == {
            "model": "tiny",
            "n_layers": 2,
            "n_heads": 3,
            "sequences": 9,
            "threshold": 0.3,
        }
        assert list(heads[0]) == [
            "layer",
            "head",
            "prefix_matching",
            "prefix_matching_stderr",
            "positional_control",
            "previous_token",
            "duplicate_token",
            "copying",
            "uniform_baseline",
            "duplicate_control",
            "positional",
            "positional_offset",
            "verdict",
        ]
        assert sorted((head["layer"], head["head"]) for head in heads) == list(scores.verdicts)
        ranked = [head["prefix_matching"] for head in heads]
        assert ranked == sorted(ranked, reverse=True)
        for head in heads:
            index = head.pop("layer"), head.pop("head")
            assert head.pop("verdict") == list(scores.verdicts[index])
            for name, value in head.items():
                assert value == getattr(scores, name)[index].item()
                assert math.isfinite(value)

    def test_the_frame_has_a_row_per_head_and_every_score(self, model: HookedTransformer):
        scores = score_heads(model)
        frame = scores.to_frame()
        assert len(frame) == 4
        assert frame["prefix_matching"].is_monotonic_decreasing
        row = frame.set_index(["layer", "head"]).loc[(1, 0)]
        assert row["positional_offset"] == scores.positional_offset[1, 0]
        assert row["verdict"] == list(scores.verdicts[1, 0])

    def test_what_cannot_be_measured_is_null(self, build: Build):
        scores = score_heads(build(d_vocab_out=5), n_sequences=1)
        row = scores.to_dict()["heads"][0]
        assert row["prefix_matching_stderr"] is None
        assert row["copying"] is None
        assert math.isfinite(row["prefix_matching"])
        json.loads(scores.to_json())

    def test_a_figure_frames_the_heads_with_a_verdict(self):
        wiring = planted(0)
        scores = score_heads(wiring.model, n_sequences=5)
        figure = scores.plot()
        panels = [axis for axis in figure.axes if axis.get_title()]
        assert [axis.get_title() for axis in panels] == [
            "prefix matching",
            "previous token",
            "duplicate token",
        ]
        frames: Any = panels[0].patches
        framed = {(round(frame.get_y() + 0.5), round(frame.get_x() + 0.5)) for frame in frames}
        assert framed == {wiring.induction, wiring.useless}
        with pytest.raises(ValueError, match="no score 'colour'"):
            scores.plot("colour")

    def test_a_notebook_lists_every_head_with_a_verdict(self):
        wiring = planted(0)
        page = score_heads(wiring.model, n_sequences=5)._repr_html_()
        for head, verdicts in wiring.verdicts.items():
            row = next(r for r in page.split("<tr>") if f"<td>{head[0]}.{head[1]}</td>" in r)
            assert verdicts[0].replace("_", " ") in row

    def test_top_and_heads_are_sorted_and_checked(self):
        wiring = planted(0)
        scores = score_heads(wiring.model, n_sequences=5)
        assert set(scores.top("prefix_matching", 2)) == {wiring.induction, wiring.useless}
        assert set(scores.heads("previous_token")) == {wiring.partner, wiring.previous}
        assert f"{wiring.positional[0]}.{wiring.positional[1]} positional" in repr(scores)


class TestStimuli:
    def test_lengths_fit_context_and_vocabulary(self):
        for n_ctx in range(6, 140):
            for vocab in (2, 5, 6, 9, 40, 200):
                for bos in (None, 0):
                    if n_ctx - (bos is not None) < 6:
                        continue
                    lengths = fitting_repeat_lengths(n_ctx, vocab, bos)
                    assert 1 <= len(lengths) <= 5
                    assert min(lengths) >= 3
                    assert 2 * max(lengths) + (bos is not None) <= n_ctx
                    drawable = vocab - (bos is not None)
                    assert max(lengths) <= max(3, drawable // 2)

    def test_a_small_vocabulary_leaves_coincidences_out_of_the_control(self, build: Build):
        for vocab in (2, 3, 4):
            scores = score_heads(build(d_vocab=vocab), n_sequences=5)
            assert scores.prefix_matching.isfinite().all()

    def test_bos_is_what_the_tokenizer_says(self, build: Build):
        model: Any = build()
        assert bos_token(model) is None
        model.tokenizer = SimpleNamespace(bos_token_id=3)
        assert bos_token(model) == 3
        assert bos_token(model, None) is None
        assert bos_token(model, 5) == 5
        assert all((s.tokens[:, 0] == 3).all() for s in draw_stimuli(model, n_sequences=4))
        model.tokenizer = SimpleNamespace(bos_token_id=50256)
        assert bos_token(model) is None
        model.tokenizer = SimpleNamespace(bos_token_id=3)
        model.cfg.default_prepend_bos = False
        assert bos_token(model) is None

    def test_fewer_sequences_than_lengths(self, build: Build):
        assert score_heads(build(d_vocab=50), n_sequences=2).sequences == 2


def gpt2_weights(model: GPT2LMHeadModel, n_heads: int) -> dict[str, Tensor]:
    """The weights of a GPT-2 of Hugging Face by TransformerLens's names."""
    parts: Any = model.transformer
    weights = {
        "embed.W_E": parts.wte.weight,
        "pos_embed.W_pos": parts.wpe.weight,
        "ln_final.w": parts.ln_f.weight,
        "ln_final.b": parts.ln_f.bias,
        "unembed.W_U": model.lm_head.weight.T,
    }
    for layer, block in enumerate(parts.h):
        by_head = block.attn.c_attn.weight.unflatten(1, (3, n_heads, -1)).permute(1, 2, 0, 3)
        biases = block.attn.c_attn.bias.unflatten(0, (3, n_heads, -1))
        named = {f"attn.W_{name}": weight for name, weight in zip("QKV", by_head, strict=True)}
        named |= {f"attn.b_{name}": bias for name, bias in zip("QKV", biases, strict=True)}
        named["attn.W_O"] = block.attn.c_proj.weight.unflatten(0, (n_heads, -1))
        named["attn.b_O"] = block.attn.c_proj.bias
        for name, norm in (("ln1", block.ln_1), ("ln2", block.ln_2)):
            named |= {f"{name}.w": norm.weight, f"{name}.b": norm.bias}
        for name, linear in (("in", block.mlp.c_fc), ("out", block.mlp.c_proj)):
            named |= {f"mlp.W_{name}": linear.weight, f"mlp.b_{name}": linear.bias}
        weights |= {f"blocks.{layer}.{name}": value for name, value in named.items()}
    return weights


def test_a_bridge_scores_as_the_hooked_transformer_with_the_same_weights(tmp_path: Path):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 64}
    original = GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=80, bos_token_id=7, eos_token_id=7))
    for parameter in original.parameters():
        parameter.data.mul_(4)
    original.save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    config = HookedTransformerConfig(
        n_layers=3,
        n_heads=4,
        d_model=32,
        d_head=8,
        d_mlp=128,
        n_ctx=64,
        d_vocab=80,
        act_fn="gelu_new",
        normalization_type="LN",
        device="cpu",
    )
    hooked = HookedTransformer(config)
    hooked.load_state_dict(gpt2_weights(original, n_heads=4), strict=False)
    modes = [module.training for module in bridge.original_model.modules()]
    through_bridge, direct = (
        score_heads(model, n_sequences=8, bos=7) for model in (bridge, hooked)
    )
    for ours, theirs in zip(
        through_bridge.to_dict()["heads"], direct.to_dict()["heads"], strict=True
    ):
        assert ours.pop("verdict") == theirs.pop("verdict")
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert direct.prefix_matching.std() > 1e-3
    assert modes == [module.training for module in bridge.original_model.modules()]
    bridge.tokenizer = None
    assert bos_token(bridge) == 7
