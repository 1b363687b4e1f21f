"""Score functions against loops over every query and key."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mechcausal.models.adapter import HookedTransformer
from probes import (
    AttentionTo,
    InductionScores,
    ProbeError,
    attach,
    attention_to,
    copying_score,
    duplicate_token_score,
    prefix_matching_score,
    previous_token_score,
    repeated_tokens,
    uniform_baseline,
)
from probes.heads.scores import duplicate_token_mask, prefix_matching_mask, previous_token_mask
from tests.probes.families import tiny

close = torch.testing.assert_close


@st.composite
def patterns_and_tokens(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A random causal pattern `[batch head query key]` and the tokens under it."""
    batch, head, pos = (draw(st.integers(1, upper)) for upper in (3, 2, 7))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, head, pos, pos, generator=generator)
    scores = scores.masked_fill(torch.ones(pos, pos).triu(1).bool(), -torch.inf)
    tokens = torch.randint(draw(st.integers(1, 6)), (batch, pos), generator=generator)
    return scores.softmax(-1), tokens


def loop(pattern: Tensor, tokens: Tensor, counts: Callable[[list[int], int, int], bool]) -> Tensor:
    """Attention on the keys for which `counts`, mean over queries that have one, by brute force."""
    batch, head, pos, _ = pattern.shape
    scores = torch.full((batch, head), torch.nan)
    for b in range(batch):
        sequence = tokens[b].tolist()
        for h in range(head):
            rows = []
            for q in range(pos):
                keys = [k for k in range(pos) if counts(sequence, q, k)]
                if keys:
                    rows.append(sum(pattern[b, h, q, k].item() for k in keys))
            if rows:
                scores[b, h] = sum(rows) / len(rows)
    return scores


def after_earlier(t: list[int], q: int, k: int) -> bool:
    return k >= 1 and t[k - 1] == t[q] and k - 1 < q


def earlier(t: list[int], q: int, k: int) -> bool:
    return t[k] == t[q] and k < q


def just_before(t: list[int], q: int, k: int) -> bool:
    return k == q - 1


@given(patterns_and_tokens())
def test_scores_equal_the_loops(case: tuple[Tensor, Tensor]):
    pattern, tokens = case
    nan: dict[str, Any] = {"equal_nan": True}
    close(prefix_matching_score(pattern, tokens), loop(pattern, tokens, after_earlier), **nan)
    close(duplicate_token_score(pattern, tokens), loop(pattern, tokens, earlier), **nan)
    close(previous_token_score(pattern), loop(pattern, tokens, just_before), **nan)
    uniform = torch.ones_like(pattern[:, :1]).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    for mask, counts in (
        (prefix_matching_mask(tokens), after_earlier),
        (duplicate_token_mask(tokens), earlier),
        (previous_token_mask(tokens), just_before),
    ):
        close(attention_to(pattern, mask), loop(pattern, tokens, counts), **nan)
        close(uniform_baseline(mask), loop(uniform, tokens, counts)[:, 0], **nan)


def test_perfect_heads_score_one_on_repeated_tokens():
    tokens = repeated_tokens(4, 5, 30, generator=torch.Generator().manual_seed(0), bos=0)

    def looks_back(offset: int) -> Tensor:
        rows = torch.arange(11)
        return (
            torch.nn.functional.one_hot((rows - offset).clamp(min=0), 11)
            .float()
            .expand(4, 1, -1, -1)
        )

    one = torch.ones(4, 1)
    close(prefix_matching_score(looks_back(4), tokens), one)
    close(duplicate_token_score(looks_back(5), tokens), one)
    close(previous_token_score(looks_back(1)), one)
    close(prefix_matching_score(looks_back(5), tokens), 0 * one)


def test_without_causal_mask_uniform_attention_sees_every_key():
    mask = previous_token_mask(torch.zeros(1, 4, dtype=torch.int64))
    close(uniform_baseline(mask, causal=False), torch.tensor([0.25]))


def test_a_mask_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"shape \(1, 2, 3\).*expected \(1, 3, 3\)"):
        _unchecked(attention_to)(torch.ones(1, 1, 3, 3), torch.ones(1, 2, 3, dtype=torch.bool))


def _unchecked(function: Any) -> Any:
    """The function without the shape checks that the tests put around it."""
    return getattr(function, "__wrapped__", function)


class TestProbes:
    def test_induction_scores_equal_the_functions_over_several_batches(
        self, model: HookedTransformer, tokens: Tensor
    ):
        batches = [tokens, tokens[:2, :4]]
        scores = InductionScores()
        expected = []
        with attach(model, scores):
            for batch in batches:
                _, cache = model.run_with_cache(batch)
                patterns = [cache["pattern", layer] for layer in (0, 1)]
                expected.append(
                    [
                        torch.stack([prefix_matching_score(p, batch) for p in patterns]),
                        torch.stack([previous_token_score(p) for p in patterns]),
                        torch.stack([duplicate_token_score(p, batch) for p in patterns]),
                    ]
                )
        reading = scores.reading()
        assert reading.axes == ("score", "layer", "batch", "head")
        for name, *parts in zip(
            ("prefix_matching", "previous_token", "duplicate_token"), *expected, strict=True
        ):
            close(reading.sel(score=name).values, torch.cat(parts, dim=1), equal_nan=True)

    def test_attention_to_a_mask_or_a_function_of_the_tokens(
        self, model: HookedTransformer, tokens: Tensor
    ):
        first = torch.zeros(6, 6, dtype=torch.bool)
        first[3:, 0] = True
        fixed, of_tokens = AttentionTo(1, first), AttentionTo(None, duplicate_token_mask)
        with attach(model, fixed, of_tokens):
            _, cache = model.run_with_cache(tokens)
        assert fixed.reading().shape == {"layer": 1, "batch": 3, "head": 2}
        close(fixed.reading().sel(layer=1).values, cache["pattern", 1][:, :, 3:, 0].mean(-1))
        close(
            of_tokens.reading().sel(layer=0).values,
            duplicate_token_score(cache["pattern", 0], tokens),
            equal_nan=True,
        )

    def test_keys_that_do_not_fit_the_pattern_are_one_clear_line(
        self, model: HookedTransformer, tokens: Tensor
    ):
        mask = torch.ones(4, 4, dtype=torch.bool)
        with attach(model, AttentionTo(0, mask)), pytest.raises(ProbeError, match=r"\(4, 4\)"):
            model(tokens)

    def test_a_pass_without_tokens_is_not_scored_with_the_last_ones(
        self, model: HookedTransformer, tokens: Tensor
    ):
        _, cache = model.run_with_cache(tokens)
        start, middle = cache["resid_pre", 0], cache["resid_pre", 1]
        unknown = pytest.raises(ProbeError, match="before any tokens")
        with attach(model, InductionScores()) as (scores,):
            model(tokens)
            for run in (model, model.run_with_hooks):
                for layer, residual in ((0, start), (1, middle)):
                    with unknown:
                        run(residual, start_at_layer=layer)
            model(tokens)
        assert scores.batches == 2
        with attach(model, AttentionTo(1, duplicate_token_mask)):
            model(tokens, stop_at_layer=1)
            with unknown:
                model(middle.flip(0), start_at_layer=1)

    def test_reset_forgets(self, model: HookedTransformer, tokens: Tensor):
        with attach(model, InductionScores()) as (scores,):
            model(tokens)
        scores.reset()
        with pytest.raises(ProbeError, match="no forward pass"):
            scores.reading()


class TestCopying:
    def with_ov(self, build: Any, *values: Tensor) -> HookedTransformer:
        """Identity in and out of the vocabulary, and the given OV matrix for each head."""
        size = len(values[0])
        sizes = {"d_model": size, "d_head": size, "d_vocab": size}
        model: HookedTransformer = build(n_layers=1, n_heads=len(values), **sizes)
        model.embed.W_E.data.copy_(torch.eye(size))
        model.unembed.W_U.data.copy_(torch.eye(size))
        model.blocks[0].attn.W_V.data.copy_(torch.stack(values))
        model.blocks[0].attn.W_O.data.copy_(torch.eye(size).expand(len(values), -1, -1))
        return model

    def test_identity_copies_its_negative_suppresses_and_zero_does_neither(self, build: Any):
        identity, nilpotent = torch.eye(4), torch.diag(torch.ones(3), 1)
        rotation = torch.eye(4).roll(1, dims=0)
        model = self.with_ov(build, identity, -identity, 0 * identity, nilpotent, rotation)
        scores = copying_score(model, 0)
        assert scores[:4].tolist() == [1.0, -1.0, 0.0, 0.0]
        assert abs(scores[4].item()) < 1e-6

    def test_complex_eigenvalues_count_by_their_modulus(self, build: Any):
        # Eigenvalues 1 ± i and 2: (1 + 1 + 2) / (2√2 + 2).
        matrix = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
        score = copying_score(self.with_ov(build, matrix), 0).item()
        assert score == pytest.approx(4 / (2 * math.sqrt(2) + 2), rel=1e-6)

    @pytest.mark.parametrize("family", ["HookedTransformer", "GPT-2", "Llama"])
    def test_equals_the_eigenvalues_of_the_vocabulary_sized_circuit(self, family: str):
        model = tiny(family)
        attention = model.blocks[1].attn
        scores = copying_score(model, 1)
        assert not scores.requires_grad
        share = len(scores) // len(attention.W_V)  # heads that share one W_V: grouped queries
        for head, score in enumerate(scores.tolist()):
            value = attention.W_V[head // share]
            circuit = model.W_E @ value @ attention.W_O[head] @ model.W_U
            eigenvalues = torch.linalg.eigvals(circuit.double())
            expected = eigenvalues.sum().real / eigenvalues.abs().sum()
            assert score == pytest.approx(expected.item(), abs=1e-4)
