"""Attention by class of pairs: uniform attention has ratio 1, and loops give the same sums."""

import pytest
import torch
from torch import Tensor

from mechcausal.models.adapter import HookedTransformer
from probes import AttentionPattern, attach, attention_by_class
from probes.heads.scores import previous_token_score, uniform_baseline
from tests.oracles import seeded
from tests.probes.conftest import Build
from tests.probes.families import some_tokens, tiny
from tests.probes.wired import blank, look_back

close = torch.testing.assert_close
EXACT = {"atol": 1e-12, "rtol": 0.0}


def random_pattern(*shape: int, causal: bool, seed: int = 0) -> Tensor:
    scores = torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)
    hidden = torch.ones(shape[-2:], dtype=torch.bool).triu(1) & causal
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def lags(pos: int) -> Tensor:
    position = torch.arange(pos)
    return (position[:, None] - position).clamp(min=-1)


def by_loops(pattern: Tensor, classes: Tensor, label: int, *, causal: bool) -> tuple[Tensor, float]:
    """Mass of a class for every head, and the mass of uniform attention, one pair at a time."""
    batch, heads, pos, _ = pattern.shape
    mass, uniform, n_queries = torch.zeros(batch, heads, dtype=torch.float64), 0.0, 0
    for q in range(pos):
        keys = range(q + 1) if causal else range(pos)
        chosen = [k for k in keys if int(classes[q, k]) == label]
        if chosen:
            n_queries += 1
            mass += pattern[:, :, q, chosen].sum(-1)
            uniform += len(chosen) / len(keys)
    return mass / n_queries, uniform / n_queries


@pytest.mark.parametrize("causal", [True, False])
def test_equals_a_loop_over_pairs(causal: bool):
    pattern = random_pattern(5, 3, 7, 7, causal=causal)
    classes = torch.randint(-1, 4, (7, 7), generator=seeded(1))
    result = attention_by_class(pattern, classes)
    assert result.classes == (0, 1, 2, 3)
    for i, label in enumerate(result.classes):
        mass, uniform = by_loops(pattern, classes, label, causal=causal)
        close(result.mass[0, :, i], mass.mean(0), **EXACT)
        close(result.mass_stderr[0, :, i], mass.std(0) / 5**0.5, **EXACT)
        assert result.uniform[i].item() == pytest.approx(uniform, abs=1e-12)
        close(result.ratio[0, :, i], mass.mean(0) / uniform, **EXACT)
        close(result.ratio_stderr[0, :, i], mass.std(0) / 5**0.5 / uniform, **EXACT)


# A bidirectional HookedTransformer attends to padding, whatever the mask says.
@pytest.mark.parametrize(
    ("direction", "padded"), [("causal", False), ("causal", True), ("bidirectional", False)]
)
def test_uniform_attention_has_ratio_one(build: Build, direction: str, padded: bool):
    model = build(attention_dir=direction, dtype=torch.float64)
    for block in model.blocks:
        block.attn.W_Q.data.zero_()
        block.attn.b_Q.data.zero_()
    tokens = torch.randint(7, (4, 8), generator=seeded(0))
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, 5:], mask[1, 6:] = 0, 0
    position = torch.arange(8)
    distance = (position[:, None] ^ position).clamp(max=3)
    result = attention_by_class(model, distance, tokens, attention_mask=mask)
    assert result.mass.shape == (2, 2, 4)
    close(result.ratio, torch.ones_like(result.ratio), **EXACT)
    assert (result.ratio_stderr <= 1e-12).all()


def test_a_previous_token_head_puts_all_on_lag_one_and_its_score_is_the_mass():
    model = blank(1, 2)
    look_back(model, (0, 1), 1)
    tokens = torch.randint(20, (6, 12), generator=seeded(0))
    with attach(model, AttentionPattern()) as (pattern,):
        model(tokens)
    result = attention_by_class(model, lags(12), tokens, max_batch_bytes=1)
    assert result.mass[0, 1, 1] > 0.999
    close(result.mass[0, :, 1].float(), previous_token_score(pattern.reading().values[0]).mean(0))
    lag_one = (lags(12) == 1).unsqueeze(0)
    assert result.uniform[1].item() == pytest.approx(uniform_baseline(lag_one).item())
    of_pattern = attention_by_class(pattern.reading(), lags(12))
    assert of_pattern.layers == result.layers
    close(of_pattern.ratio, result.ratio)


def test_classes_of_all_visible_pairs_share_the_attention():
    pattern = random_pattern(4, 2, 6, 6, causal=True)
    ordered = torch.arange(36).view(6, 6)  # every pair a class of its own
    result = attention_by_class(pattern, ordered)
    assert len(result.classes) == 21  # pairs ahead are out of sight
    close(result.mass[0].sum(-1), torch.full((2,), 6.0, dtype=torch.float64), **EXACT)


def test_every_sequence_may_have_classes_of_its_own():
    pattern = random_pattern(6, 2, 5, 5, causal=True)
    classes = torch.randint(-1, 2, (6, 5, 5), generator=seeded(2))
    classes[0] = classes[0].clamp(max=0)  # the first sequence has no pair of class 1
    result = attention_by_class(pattern, classes)
    parts = [
        by_loops(pattern[n : n + 1], classes[n], 1, causal=True) for n in range(1, len(pattern))
    ]
    mass = torch.cat([part for part, _ in parts])
    uniform = torch.tensor([part for _, part in parts], dtype=torch.float64)
    close(result.mass[0, :, 1], mass.mean(0), **EXACT)
    assert result.uniform[1].item() == pytest.approx(uniform.mean().item(), abs=1e-12)
    close(result.ratio[0, :, 1], mass.mean(0) / uniform.mean(), **EXACT)


def test_the_standard_error_covers_the_ratio_where_uniform_masses_differ():
    """z over 200 data sets of 40 sequences; uniform attention of noisy rows has ratio 1."""
    hits = 0
    for seed in range(200):
        pattern = random_pattern(40, 1, 6, 6, causal=True, seed=seed)
        classes = torch.randint(0, 3, (40, 6, 6), generator=seeded(seed))
        result = attention_by_class(pattern, classes)
        z = (result.ratio[0, 0, 0] - 1) / result.ratio_stderr[0, 0, 0]
        hits += int(abs(z.item()) < 2)
    assert 0.95 * 200 - 3 * (200 * 0.95 * 0.05) ** 0.5 <= hits  # three standard errors


@pytest.mark.parametrize("family", ["GPT-2", "BERT", "GPT-Neo"])
@pytest.mark.filterwarnings("ignore::probes.ProbeWarning")
def test_through_a_bridge(family: str):
    model, tokens = tiny(family), some_tokens(3, 7)
    with attach(model, AttentionPattern()) as (pattern,):
        model(tokens)
    position = torch.arange(7)
    classes = (position[:, None] - position).abs()
    through_model = attention_by_class(model, classes, tokens)
    close(through_model.mass, attention_by_class(pattern.reading(), classes).mass)
    assert len(through_model.classes) == 7


def test_one_sequence_has_no_standard_error_and_a_frame_has_a_row_per_head_and_class(
    model: HookedTransformer,
):
    result = attention_by_class(model, lags(6), torch.arange(6)[None])
    assert result.mass_stderr.isnan().all()
    assert result.ratio_stderr.isnan().all()
    frame = result.to_frame()
    assert len(frame) == 2 * 2 * 6
    row = frame[(frame.layer == 1) & (frame["head"] == 0) & (frame["class"] == 2)]
    assert row.ratio.item() == result.ratio[1, 0, 2].item()
