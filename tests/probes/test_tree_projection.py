"""Trees from confined attention: a model that computes a tree, a pass by hand, and known charts."""

import itertools
import warnings

import pytest
import torch
import transformer_lens
from torch import Tensor

from mechcausal.models.adapter import HookedTransformer
from probes import ProbeError, tree_projection
from probes.intervening.tree_projection import _greedy_tree
from tests.left_as_found import left_as_found
from tests.lens_versions import needs_lens_3
from tests.oracles import seeded
from tests.probes.conftest import Build
from tests.probes.families import some_tokens, tiny

close = torch.testing.assert_close
EXACT = {"atol": 1e-10, "rtol": 0.0}
BALANCED = [(0, 2), (0, 4), (2, 4), (4, 6), (4, 8), (6, 8)]


def bidirectional(build: Build, **sizes: object) -> HookedTransformer:
    usual = {"attention_dir": "bidirectional", "dtype": torch.float64}
    model = build(**(usual | sizes))
    for parameter in model.parameters():
        parameter.data.mul_(0.06)  # no attention weight underflows to 0
    return model


def some(batch: int, pos: int, seed: int = 0) -> Tensor:
    return torch.randint(7, (batch, pos), generator=seeded(seed))


def forward_by_hand(model: HookedTransformer, tokens: Tensor, confined: range, from_layer: int):
    """The residual stream of one sequence, with scores outside of a span at minus infinity."""
    pos = len(tokens)
    inside = torch.tensor([p in confined for p in range(pos)])
    x = model.embed.W_E[tokens] + model.pos_embed.W_pos[:pos]
    for layer, block in enumerate(model.blocks):
        attention = block.attn
        q, k, v = (
            torch.einsum("pd,hde->hpe", x, weight) + bias[:, None]
            for weight, bias in (
                (attention.W_Q, attention.b_Q),
                (attention.W_K, attention.b_K),
                (attention.W_V, attention.b_V),
            )
        )
        scores = q @ k.mT / (model.cfg.attn_scale if model.cfg.use_attn_scale else 1.0)
        if layer >= from_layer:
            scores = scores.masked_fill(inside[:, None] & ~inside, -torch.inf)
        mixed = scores.softmax(-1) @ v
        x = x + torch.einsum("hpe,hed->pd", mixed, attention.W_O) + attention.b_O
    return x


@pytest.mark.parametrize("from_layer", [0, 1])
@pytest.mark.parametrize("max_batch_bytes", [1, 2**26])
def test_the_chart_equals_a_pass_by_hand_for_every_span(
    build: Build, from_layer: int, max_batch_bytes: int
):
    model = bidirectional(build, normalization_type=None)
    tokens = some(3, 5)
    result = tree_projection(model, tokens, from_layer=from_layer, max_batch_bytes=max_batch_bytes)
    for n in range(3):
        free = forward_by_hand(model, tokens[n], range(5), from_layer)
        for i, j in itertools.combinations(range(6), 2):
            confined = forward_by_hand(model, tokens[n], range(i, j), from_layer)
            cosine = torch.cosine_similarity(free[i:j].sum(0), confined[i:j].sum(0), dim=0)
            close(result.chart[n, i, j], cosine, **EXACT)
    empty = torch.ones(5, 6, dtype=torch.bool).tril()
    assert torch.equal(result.chart.isnan(), empty.expand(3, -1, -1))
    close(result.chart[:, 0, 5], torch.ones(3, dtype=torch.float64), **EXACT)


def trees_by_brute_force(
    chart: Tensor, i: int, j: int
) -> tuple[list[tuple[int, int]], list[float]]:
    """Greedy brackets and what each split gains, by recursion over all splits."""
    if j - i == 1:
        return [], []
    sums = {k: chart[i, k].item() + chart[k, j].item() for k in range(i + 1, j)}
    best = max(sums, key=lambda k: sums[k])
    gains = [] if j - i == 2 else [sums[best] - sum(sums.values()) / len(sums)]
    left, right = (trees_by_brute_force(chart, *part) for part in ((i, best), (best, j)))
    return [(i, j), *left[0], *right[0]], gains + left[1] + right[1]


def test_splits_are_greedy_and_the_tscore_is_their_mean_gain(build: Build):
    result = tree_projection(bidirectional(build), some(6, 7))
    for chart, brackets, tscore in zip(result.chart, result.brackets, result.tscore, strict=True):
        expected, gains = trees_by_brute_force(chart, 0, 7)
        assert brackets == tuple(sorted(expected[1:]))
        assert tscore.item() == pytest.approx(sum(gains) / len(gains), abs=1e-12)
        assert len(brackets) == 5
    expected, gains = trees_by_brute_force(result.chart.mean(0), 0, 7)
    assert result.mean_brackets == tuple(sorted(expected[1:]))
    assert result.mean_tscore == pytest.approx(sum(gains) / len(gains), abs=1e-12)
    assert len(set(result.brackets)) > 1


def test_a_small_chart_by_hand():
    """Splitting [0 1 2 3] after 1 scores 0.9 + 0.8; the other splits 0.5 + 0.4 and 0.3 + 0.6."""
    chart = torch.full((4, 5), torch.nan)
    for (i, j), value in {
        (0, 1): 0.5, (1, 2): 0.1, (2, 3): 0.2, (3, 4): 0.6,
        (0, 2): 0.9, (1, 3): 0.7, (2, 4): 0.8, (0, 3): 0.3, (1, 4): 0.4, (0, 4): 1.0,
    }.items():  # fmt: skip
        chart[i, j] = value
    brackets, tscore = _greedy_tree(chart)
    assert brackets == ((0, 2), (2, 4))
    # One span has several splits; its sums are 0.9, 1.7 and 0.9.
    assert tscore == pytest.approx(1.7 - 3.5 / 3, abs=1e-6)


@torch.no_grad()
def tree_model(build: Build, heights: tuple[int, ...]) -> HookedTransformer:
    """Eight positions; the head of each layer attends evenly within blocks of 2^height positions.

    Scores come from one-hot positions: 0 within a block, -60 elsewhere. Values are random.
    """
    model = bidirectional(
        build,
        n_layers=len(heights),
        n_heads=1,
        d_model=16,
        d_head=8,
        n_ctx=8,
        normalization_type=None,
        use_attn_scale=False,
    )
    position = slice(8, 16)
    model.embed.W_E[:, position] = 0.0
    model.pos_embed.W_pos[:, :8] = 0.0
    model.pos_embed.W_pos[:, position] = torch.eye(8, dtype=torch.float64)
    block_of = torch.arange(8)
    for layer, height in zip(model.blocks, heights, strict=True):
        for parameter in (layer.attn.W_Q, layer.attn.W_K, layer.attn.b_Q, layer.attn.b_K):
            parameter.zero_()
        same = (block_of[:, None] >> height) == (block_of >> height)
        layer.attn.W_Q[0, position] = -60.0 * (~same).double()
        layer.attn.W_K[0, position] = torch.eye(8, dtype=torch.float64)
        layer.attn.W_O[0, :, position] = 0.0
        layer.attn.b_O.zero_()
    return model


def test_a_model_that_computes_a_tree_projects_to_it(build: Build):
    """Pairs are mixed strongly, then blocks of four weakly, so that both matter to a span."""
    model = tree_model(build, (1, 2))
    model.blocks[0].attn.W_O.data.mul_(20)
    model.blocks[1].attn.W_O.data.mul_(0.2)
    result = tree_projection(model, some(5, 8))
    blocks = result.chart[:, [0, 4], [4, 8]]
    close(blocks, torch.ones_like(blocks), **EXACT)
    pairs = result.chart[:, [0, 2, 4, 6], [2, 4, 6, 8]]
    assert (pairs < 1 - 1e-9).all()
    assert all(list(brackets) == BALANCED for brackets in result.brackets)
    assert list(result.mean_brackets) == BALANCED
    of_mean, of_each = result.recall(BALANCED)
    assert of_mean == of_each.min().item() == 1
    assert min(result.tscore.min().item(), result.mean_tscore) > 0.01


def test_a_span_that_never_looks_outside_is_fully_invariant(build: Build):
    """Heads that attend within pairs: every union of pairs has a cosine of 1."""
    chart = tree_projection(tree_model(build, (1, 1)), some(4, 8)).chart
    even = [(i, j) for i, j in itertools.combinations(range(9), 2) if i % 2 == j % 2 == 0]
    for i, j in itertools.combinations(range(9), 2):
        if (i, j) in even:
            close(chart[:, i, j], torch.ones(4, dtype=torch.float64), **EXACT)
        else:
            assert (chart[:, i, j] < 1 - 1e-6).all()


def test_attention_wholly_outside_of_a_span_becomes_uniform_over_it(build: Build):
    """Scores of -800 elsewhere underflow to 0 even in float64."""
    model = tree_model(build, (1,))
    model.blocks[0].attn.W_Q.data[0, 8:] *= 800 / 60
    # Token 0 alone would still see itself: move its block's attention to its sibling.
    model.blocks[0].attn.W_Q.data[0, 8, 0] = -800.0
    tokens = some(2, 8)
    chart = tree_projection(model, tokens).chart
    assert chart[:, 0, 1].isfinite().all()
    stream = forward_by_hand(model, tokens[0], range(8), 0)
    attention = model.blocks[0].attn
    x = model.embed.W_E[tokens[0, 0]] + model.pos_embed.W_pos[0]
    alone = x + (x @ attention.W_V[0] + attention.b_V[0]) @ attention.W_O[0] + attention.b_O
    close(chart[0, 0, 1], torch.cosine_similarity(stream[0], alone, dim=0), **EXACT)


def test_special_tokens_around_are_context(build: Build):
    model, tokens = bidirectional(build, normalization_type=None), some(3, 7)
    result = tree_projection(model, tokens, start=1, stop=-1)
    assert result.chart.shape == (3, 5, 6)
    free = forward_by_hand(model, tokens[0], range(7), 0)[2:4].sum(0)
    confined = forward_by_hand(model, tokens[0], range(2, 4), 0)[2:4].sum(0)
    close(result.chart[0, 1, 3], torch.cosine_similarity(free, confined, dim=0), **EXACT)
    assert (result.chart[:, 0, 5] < 1).all()
    assert max(stop for brackets in result.brackets for _, stop in brackets) <= 5


@pytest.mark.parametrize("nth_pass", [1, 2, 7])
def test_nothing_is_left_after_an_interrupted_pass(build: Build, nth_pass: int):
    model, passes = bidirectional(build), itertools.count()
    model.train()

    def interrupt(*arguments: object) -> None:
        if next(passes) == nth_pass:
            raise KeyboardInterrupt

    handle = model.blocks[1].attn.hook_z.register_forward_hook(interrupt)
    with left_as_found(model), pytest.raises(KeyboardInterrupt):
        tree_projection(model, some(2, 4), max_batch_bytes=1)
    handle.remove()
    with left_as_found(model):
        tree_projection(model, some(2, 4))


@needs_lens_3
def test_a_hooked_encoder_is_read_too():
    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 16, "d_head": 8, "n_ctx": 8, "d_vocab": 7}
    more = {"d_mlp": 32, "act_fn": "gelu", "attention_dir": "bidirectional", "device": "cpu"}
    config = transformer_lens.HookedTransformerConfig(**sizes, **more, dtype=torch.float64)
    with warnings.catch_warnings(action="ignore"):
        encoder = transformer_lens.HookedEncoder(config)
    for parameter in encoder.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3, generator=seeded(parameter.numel()))
    with left_as_found(encoder):
        chart = tree_projection(encoder, some(2, 5)).chart
    close(chart[:, 0, 5], torch.ones(2, dtype=torch.float64), **EXACT)
    assert (chart[:, 0, 1:5] < 1 - 1e-6).all()


def test_a_bridge_whose_patterns_cannot_be_edited_is_refused():
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(ProbeError, match="an edit would change nothing"),
    ):
        tree_projection(tiny("BERT"), some_tokens(2, 5))
