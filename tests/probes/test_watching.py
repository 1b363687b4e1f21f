"""The gradient of a loss, its agreement with information, and the law of residual information."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechcausal.models.adapter import HookedTransformer
from probes import (
    LabelledTensor,
    LossGradient,
    PairwiseInformation,
    ProbeError,
    agreement,
    attention_gradient,
    descent_by_lag,
    direct_path,
    in_context_score,
    next_token_loss,
    pairwise_information,
    residual_information,
)
from tests.left_as_found import left_as_found
from tests.oracles import seeded
from tests.probes.conftest import Build

TOKENS = torch.randint(7, (48, 6), generator=seeded(1))


def scores_gradient(model: HookedTransformer, tokens: Tensor, layer: int) -> Tensor:
    """`∂L/∂scores` of every sequence's own loss by autograd, masked entries 0."""
    kept: list[Tensor] = []

    def keep(scores: Tensor, hook: Any) -> Tensor:
        scores.retain_grad()
        kept.append(scores)
        return scores

    name = f"blocks.{layer}.attn.hook_attn_scores"
    per_sequence = []
    for tokens_of_one in tokens.split(1):
        kept.clear()
        logits = model.run_with_hooks(tokens_of_one, fwd_hooks=[(name, keep)])
        next_token_loss(logits, tokens_of_one).backward()
        assert kept[0].grad is not None
        per_sequence.append(kept[0].grad[0])
    model.zero_grad()
    return torch.stack(per_sequence)


def test_gradient_is_the_mean_of_each_sequences_own(build: Build) -> None:
    model = build(dtype=torch.float64)
    gradient = attention_gradient(model, TOKENS)
    for layer in (0, 1):
        each = scores_gradient(model, TOKENS, layer)
        mean = gradient.mean.sel(layer=layer).values
        assert torch.allclose(mean, each.mean(0), atol=1e-12)
        assert torch.allclose(gradient.summed.sel(layer=layer).values, each.sum(1).mean(0))
        # The standard error compares 16 blocks of 3 sequences: within 30 % or so, over entries.
        exact = each.std(0) / math.sqrt(len(each))
        ratio = gradient.stderr.sel(layer=layer).values[exact > 0] / exact[exact > 0]
        assert ratio.log().mean().abs() < 0.2


def test_gradient_does_not_depend_on_the_size_of_its_batches(build: Build) -> None:
    model = build(dtype=torch.float64)
    at_once = attention_gradient(model, TOKENS, wrt="pattern", layers=1)
    parts = attention_gradient(model, TOKENS, wrt="pattern", layers=1, max_batch_bytes=1)
    assert torch.allclose(at_once.mean.values, parts.mean.values, atol=1e-13)


def test_padding_and_a_loss_of_ones_own(build: Build) -> None:
    model = build(dtype=torch.float64)
    mask = torch.ones_like(TOKENS)
    mask[:, 4:] = 0
    padded = attention_gradient(model, TOKENS, layers=0, attention_mask=mask).mean.values
    short = attention_gradient(model, TOKENS[:, :4], layers=0).mean.values
    assert torch.allclose(padded[..., :4, :4], short, atol=1e-12)
    twice = attention_gradient(
        model, TOKENS[:, :4], layers=0, loss=lambda logits, t: 2 * next_token_loss(logits, t)
    ).mean.values
    assert torch.allclose(twice, 2 * short)


def test_gradient_leaves_nothing_behind(build: Build) -> None:
    model = build()
    model.train()
    model.blocks[1].eval()
    model.W_E.requires_grad_(False)
    model(TOKENS, return_type="loss").backward()  # gradients of the user's, in mid-accumulation

    def fail(logits: Tensor, tokens: Tensor) -> Tensor:
        raise RuntimeError("the user's loss")

    with left_as_found(model):
        attention_gradient(model, TOKENS)
        with pytest.raises(RuntimeError, match="the user's loss"):
            attention_gradient(model, TOKENS, loss=fail)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits, tokens: logits.sum((1, 2)), "must be a scalar tensor, found (3,)"),
        (lambda logits, tokens: 3.0, "must be a scalar tensor, found float"),
        (lambda logits, tokens: logits.sum() * math.nan, "the loss is nan"),
        (lambda logits, tokens: torch.zeros(()), "does not depend on the model's attention"),
    ],
)
def test_a_loss_that_is_none_gets_one_clear_line(
    model: HookedTransformer, loss: Any, message: str
) -> None:
    with pytest.raises(ProbeError, match=re.escape(message)):
        attention_gradient(model, TOKENS, loss=loss)


def test_one_sequence_has_no_standard_error(model: HookedTransformer) -> None:
    with pytest.raises(ValueError, match="at least two sequences"):
        attention_gradient(model, TOKENS[:1])


# --- Agreement ---


def made_up(descent: Tensor, error: float) -> LossGradient:
    """A gradient of one layer and head with this descent direction, before the factor of keys."""
    values = -descent.double() / torch.arange(1, len(descent) + 1).unsqueeze(1)
    errors = torch.full_like(values, error) / torch.arange(1, len(descent) + 1).unsqueeze(1)
    by_head, summed = ("layer", "head", "query", "key"), ("layer", "query", "key")
    layer = {"layer": (0,)}
    return LossGradient(
        mean=LabelledTensor("mean", values[None, None], by_head, layer),
        stderr=LabelledTensor("stderr", errors[None, None], by_head, layer),
        summed=LabelledTensor("mean", values[None], summed, layer),
        summed_stderr=LabelledTensor("stderr", errors[None], summed, layer),
        n_sequences=100,
        wrt="scores",
    )


@pytest.fixture(scope="module")
def copies() -> PairwiseInformation:
    """Position i mostly repeats position i - 2."""
    tokens = torch.randint(3, (2000, 7), generator=seeded())
    for i in range(2, 7):
        same = torch.rand(2000, generator=seeded(i)) < 0.7
        tokens[:, i] = torch.where(same, tokens[:, i - 2], tokens[:, i])
    return pairwise_information(tokens)


@pytest.mark.parametrize(("target", "shift"), [("next", 1), ("query", 0)])
def test_a_gradient_that_is_the_information_agrees_fully(
    copies: PairwiseInformation, target: Any, shift: int
) -> None:
    # Row q holds the information of x[q + shift]; a constant for each row changes nothing.
    descent = copies.chi2.nan_to_num().roll(-shift, 0) + torch.arange(7).unsqueeze(1)
    result = agreement(made_up(descent, error=1e-3), copies, target=target)
    assert result.pearson == pytest.approx(1.0)
    assert (result.edge_hits, result.n_rows) == (1.0, 5)
    assert result.per_head == {(0, 0): pytest.approx(1.0)}
    other = agreement(
        made_up(descent, error=1e-3), copies, target="next" if shift == 0 else "query"
    )
    assert other.pearson < 0.8
    # The wrong parents: chance is one over the number of keys, averaged over rows.
    wrong = agreement(
        made_up(descent, 1e-3), copies, target=target, edges=[-1, -1, -1, -1, -1, -1, 5]
    )
    assert wrong.edge_hits == 0
    assert wrong.chance == pytest.approx(1 / 6)


def test_noise_is_not_compared(copies: PairwiseInformation) -> None:
    noise = torch.randn(7, 7, dtype=torch.float64, generator=seeded())
    result = agreement(made_up(noise, error=1.0), copies)
    assert not result.measurable
    assert math.isnan(result.pearson)
    assert math.isnan(result.edge_hits)
    assert 0.5 < result.signal_to_noise < 2


def test_information_by_lag_is_compared_lag_by_lag() -> None:
    tokens = torch.randint(3, (2000, 7), generator=seeded())
    tokens[:, 3:] = tokens[:, :-3]
    by_lag = pairwise_information(tokens, by="lag")
    query, key = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
    descent = by_lag.chi2[(query + 1 - key).clamp(1, 6) - 1]
    assert agreement(made_up(descent, 1e-3), by_lag).pearson == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "no layer 3"),
        ({"edges": [-1, 0]}, "edges name 2 positions"),
        ({"edges": [-1, 5, 0, 0, 0, 0, 0]}, "position 1 has parents [5]"),
    ],
)
def test_bad_comparisons_are_refused(
    copies: PairwiseInformation, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        agreement(made_up(torch.ones(7, 7), 1.0), copies, **options)


# --- Residual information ---


def one_layer(build: Build, **sizes: Any) -> HookedTransformer:
    """One layer without normalisation that keeps positions out of its values."""
    model = build(
        n_layers=1,
        normalization_type=None,
        positional_embedding_type="shortformer",
        dtype=torch.float64,
        **sizes,
    )
    for parameter in model.parameters():
        parameter.data.mul_(0.1)
    return model


def chain(n_sequences: int, length: int, n_tokens: int, seed: int) -> Tensor:
    generator = seeded(seed)
    rows = torch.rand(n_tokens, n_tokens, generator=generator).pow(4)
    tokens = torch.randint(n_tokens, (n_sequences, length), generator=generator)
    for i in range(1, length):
        tokens[:, i] = torch.multinomial(rows[tokens[:, i - 1]], 1, generator=generator)[:, 0]
    return tokens


def test_the_law_holds_at_every_step(build: Build) -> None:
    model = one_layer(build, n_heads=3)
    tokens = chain(160, 8, 7, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(61):
        if step in (0, 5, 20, 60):
            residual = residual_information(model, tokens)
            measured = descent_by_lag(attention_gradient(model, tokens, wrt="pattern"))
            path = direct_path(model, residual)
            assert torch.allclose(path.descent, measured, rtol=0, atol=1e-12)
            assert bool((path.descent.abs() <= path.bound).all())
            assert measured.abs().max() > 1e-3
        optimizer.zero_grad()
        model(tokens, return_type="loss").backward()
        optimizer.step()


def test_the_centred_residual_is_the_law_without_the_mean_key(build: Build) -> None:
    """Exactly: ρ is its centred part plus the misfit, the gradient the same plus an offset."""
    model = one_layer(build, n_heads=3)
    tokens = chain(160, 8, 7, seed=0)
    residual = residual_information(model, tokens)
    shares = residual.key_share.unsqueeze(2), residual.target_share.unsqueeze(1)
    mean_residual = residual.joint.sum(1)
    centred = residual.joint - shares[0] * mean_residual.unsqueeze(1)
    assert torch.allclose(centred.sum(1), torch.zeros(7, 7).double(), atol=1e-15)
    plain_size, centred_size = (
        (x.square() / (shares[0] * shares[1])).sum((1, 2)) for x in (residual.joint, centred)
    )
    misfit = (mean_residual.square() / residual.target_share).sum(1)
    assert torch.allclose(plain_size, centred_size + misfit, rtol=0, atol=1e-12)
    written = model.W_E @ model.W_V[0] + model.b_V[0].unsqueeze(1)
    circuit = (written @ model.W_O[0] @ model.W_U).detach()
    measured = descent_by_lag(attention_gradient(model, tokens, wrt="pattern"))
    offset = torch.einsum("hab,la,lb->hl", circuit, residual.key_share, mean_residual)
    law = torch.einsum("hab,lab->hl", circuit, centred)
    assert torch.allclose(law + offset, measured, rtol=0, atol=1e-12)
    assert offset.abs().max() > 1e-3


def test_independent_tokens_leave_misfit_alone_even_for_a_model_far_off(build: Build) -> None:
    """Independent tokens, some rare, and a uniform model: the centred ρ is 0 without bias."""
    model, n_tokens = one_layer(build), 7
    shares = torch.arange(1.0, n_tokens + 1).double() ** 3
    tokens = torch.multinomial(shares, 2000 * 8, replacement=True, generator=seeded(5)).view(-1, 8)
    for parameter in model.parameters():
        parameter.data.zero_()
    residual = residual_information(model, tokens, max_lag=3)
    seen = residual.target_share
    misfit = ((seen - 1 / 7).square() / seen).sum(1)
    assert torch.allclose(residual.misfit, misfit, rtol=2e-3)
    assert bool((misfit > 10).all())
    assert bool((residual.centred_chi2.abs() < 4 * residual.centred_chi2_stderr).all())
    # Taking p(1 - p) off would move it by Σ_b 6 (6/49 - P(b)(1 - P(b))) / N P(b), 0.04 and more.
    assert bool((residual.centred_chi2_stderr < 0.005).all())


@pytest.fixture(scope="module")
def random_models(build: Build) -> dict[int, HookedTransformer]:
    """One layer without normalisation, for every size of the vocabulary."""
    sizes = {"n_layers": 1, "d_model": 6, "d_head": 3, "n_ctx": 5, "normalization_type": None}
    return {n: build(**sizes, d_vocab=n, dtype=torch.float64) for n in range(2, 7)}


@settings(max_examples=200)
@given(seed=st.integers(0, 2**31), n_tokens=st.integers(2, 6), scale=st.floats(0.05, 5.0))
def test_the_bound_holds_for_random_models(
    random_models: dict[int, HookedTransformer], seed: int, n_tokens: int, scale: float
) -> None:
    model = random_models[n_tokens]
    generator = seeded(seed)
    for parameter in model.parameters():
        parameter.data.copy_(
            scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        )
    tokens = torch.randint(n_tokens, (16, 5), generator=generator)
    path = direct_path(model, residual_information(model, tokens))
    assert bool((path.descent.abs() <= path.bound * (1 + 1e-9) + 1e-15).all())


def test_a_model_of_single_tokens_leaves_all_pairwise_information(build: Build) -> None:
    # With p the share of each target, R is P(a,b) - P(a)P(b): plug-in χ², less the bias it removes.
    model = one_layer(build)
    tokens = chain(400, 8, 7, seed=2)
    targets = tokens[:, 1:].flatten()
    for parameter in model.parameters():
        parameter.data.zero_()
    model.unembed.b_U.data.copy_((targets.bincount(minlength=7) / len(targets)).log())
    residual = residual_information(model, tokens, max_lag=1)
    share = residual.key_share[0].unsqueeze(1) * residual.target_share[0]
    plug_in = pairwise_information(tokens, by="lag", max_lag=1, correction="none").chi2[0]
    assert torch.allclose((residual.joint[0].square() / share).sum(), plug_in)
    corrected = pairwise_information(tokens, by="lag", max_lag=1, correction="miller_madow")
    assert residual.chi2[0] == pytest.approx(corrected.chi2[0].item(), abs=3e-3)


def test_a_model_that_knows_the_pairs_leaves_none(build: Build) -> None:
    model = one_layer(build, d_model=7)
    tokens = chain(2000, 8, 7, seed=3)
    for parameter in model.parameters():
        parameter.data.zero_()
    counts = torch.zeros(7, 7, dtype=torch.float64)
    counts.index_put_((tokens[:, :-1].flatten(), tokens[:, 1:].flatten()), counts.new_ones(1), True)
    model.embed.W_E.data.copy_(torch.eye(7))
    model.unembed.W_U.data.copy_((counts / counts.sum(1, keepdim=True)).clamp(min=1e-9).log())
    residual = residual_information(model, tokens, max_lag=3)
    # The pairs were fitted to the same tokens, which takes away a little more than the bias.
    assert bool((residual.chi2.abs() < 0.005).all())
    assert pairwise_information(tokens, by="lag", max_lag=1).chi2[0] > 0.5


def test_buckets_keep_residual_information_below_its_value(build: Build) -> None:
    model, tokens = one_layer(build), chain(400, 8, 7, seed=2)
    fine = residual_information(model, tokens, max_lag=2)
    coarse = residual_information(model, tokens, max_lag=2, max_vocab=4)
    assert bool((coarse.chi2 < fine.chi2).all())
    with pytest.raises(ProbeError, match="needs every token apart"):
        direct_path(model, coarse)


def test_padding_counts_in_no_table(build: Build) -> None:
    model, tokens = one_layer(build), chain(60, 8, 7, seed=4)
    mask = torch.ones_like(tokens)
    mask[:, 6:] = 0
    padded = residual_information(model, tokens, attention_mask=mask, max_lag=3)
    short = residual_information(model, tokens[:, :6], max_lag=3)
    assert torch.allclose(padded.joint, short.joint, atol=1e-12)
    assert torch.equal(padded.n_queries, short.n_queries)


# --- In-context score ---


def test_in_context_score_is_late_minus_early(model: HookedTransformer) -> None:
    losses = model(TOKENS, return_type="loss", loss_per_token=True).double()
    result = in_context_score(model, TOKENS, early=1, late=5)
    difference = losses[:, 4] - losses[:, 0]
    assert result.score == pytest.approx(difference.mean().item(), abs=1e-5)
    assert result.stderr == pytest.approx((difference.std() / math.sqrt(48)).item(), rel=1e-4)
    with pytest.raises(ValueError, match="1 <= early < late <= 5"):
        in_context_score(model, TOKENS)


def test_in_context_score_leaves_out_padding(model: HookedTransformer) -> None:
    mask = torch.ones_like(TOKENS)
    mask[:40, 5] = 0
    assert in_context_score(model, TOKENS, early=1, late=5, attention_mask=mask).n_sequences == 8
