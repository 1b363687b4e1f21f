"""The share of score variance that positions explain: known heads, enumeration, and its error."""

import math

import pytest
import torch
from torch import Tensor

from mechcausal.models.adapter import HookedTransformer
from probes import ProbeError, attention_by_class, positional_share, repeated_tokens
from tests.oracles import seeded
from tests.probes.families import some_tokens, tiny
from tests.probes.wired import (
    CONTEXT,
    POSITION,
    PREVIOUS,
    TOKEN,
    VOCAB,
    blank,
    copy,
    look_back,
    match,
)

close = torch.testing.assert_close


@torch.no_grad()
def by_key(
    model: HookedTransformer, head: int, positional: float, content: float, seed: int = 1
) -> None:
    """Scores `positional · a[k] + content · b[token of k]`, a over positions, b over tokens."""
    attention = model.blocks[0].attn
    attention.W_Q[head].zero_()
    attention.W_K[head].zero_()
    attention.W_Q[head, POSITION, 0] = 1.0  # the same query everywhere
    attention.W_K[head, POSITION, 0] = positional * position_scores()
    attention.W_K[head, TOKEN, 0] = content * token_scores(seed)


def position_scores() -> Tensor:
    return torch.randn(CONTEXT, generator=seeded(0))


def token_scores(seed: int = 1) -> Tensor:
    return torch.randn(VOCAB, generator=seeded(seed))


def wired() -> HookedTransformer:
    """Heads whose scores follow positions, tokens, and both."""
    model = blank(1, 3).double()
    by_key(model, 0, 1.0, 0.0)
    by_key(model, 1, 0.0, 1.0)
    by_key(model, 2, 0.7, 1.0)
    return model


def random_tokens(batch: int, pos: int, seed: int) -> Tensor:
    return torch.randint(VOCAB, (batch, pos), generator=seeded(seed))


def exact_share(positional: float, content: float, pos: int) -> float:
    """Over independent uniform tokens, from the variances of a and b in the rows."""
    explained = noise = 0.0
    variance = content**2 * token_scores().double().var(correction=0).item()
    for query in range(pos):
        keys = positional * position_scores()[: query + 1].double()
        explained += (keys - keys.mean()).square().sum().item()
        noise += query * variance  # Σ_k Var(b_k - mean of b) over query + 1 keys
    return explained / (explained + noise)


def test_scores_by_position_alone_give_one_and_by_tokens_alone_zero():
    result = positional_share(wired(), random_tokens(16, 10, 0))
    assert result.share[0, 0].item() == pytest.approx(1.0, abs=1e-12)
    assert result.stderr[0, 0].item() <= 1e-12
    assert abs(result.share[0, 1].item()) < 3 * result.stderr[0, 1].item()
    assert result.stderr[0, 1] < 0.1


def test_a_mixed_head_has_the_share_of_its_variances():
    exact = exact_share(0.7, 1.0, 10)
    result = positional_share(wired(), random_tokens(256, 10, 1))
    assert 0.2 < exact < 0.8
    assert abs(result.share[0, 2].item() - exact) < 3 * result.stderr[0, 2].item()
    assert result.stderr[0, 2] < 0.03


def test_few_sequences_do_not_bias_the_share_and_its_error_errs_on_the_wide_side():
    """Forty data sets of six sequences, twenty heads; a plug-in share of the heads would be 1/6."""
    model, n = blank(1, 21).double(), 40
    for head in range(20):
        by_key(model, head, 0.0, 1.0, seed=head)
    by_key(model, 20, 0.7, 1.0)
    results = [positional_share(model, random_tokens(6, 10, seed)) for seed in range(n)]
    shares = torch.stack([result.share[0] for result in results])
    by_tokens = shares[:, :20].mean(1)
    error = by_tokens.std().item() / math.sqrt(n)
    assert abs(by_tokens.mean().item()) < 3 * error < 1 / 6 / 3
    # The mixed head's share is a ratio of two unbiased sums: biased by order 1/N alone.
    mixed, error = shares[:, 20].mean().item(), shares[:, 20].std().item() / math.sqrt(n)
    assert abs(mixed - exact_share(0.7, 1.0, 10)) < 3 * error + 0.03
    squares = torch.stack([result.stderr[0] for result in results]).square()
    told, true = squares[:, :20].mean().sqrt().item(), shares[:, :20].var(0).mean().sqrt().item()
    # Jackknifing products of pairs whose mean is 0 gives 2 (N - 1) / (N - 2) times their variance.
    assert told / true == pytest.approx((2 * 5 / 4) ** 0.5, rel=0.15)


def test_equals_pairs_of_sequences_and_leaving_one_out():
    model, tokens = blank(1, 2, noise=0.3).double(), random_tokens(5, 6, 3)
    _, cache = model.run_with_cache(tokens)
    scores = cache["attn_scores", 0]  # the scores themselves, not the logarithm of the pattern
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    finite = scores.masked_fill(~seen, 0.0)
    x = (finite - finite.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)).masked_fill(~seen, 0.0)

    def share(x: Tensor) -> Tensor:
        n = len(x)
        products = torch.einsum("nhqk,mhqk->nmh", x, x)
        across = sum(products[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        return across / products.diagonal().mean(-1)

    result = positional_share(model, tokens, max_batch_bytes=1)
    close(result.share[0], share(x), atol=1e-9, rtol=0)
    without = torch.stack([share(torch.cat([x[:i], x[i + 1 :]])) for i in range(5)])
    jackknife = (without - without.mean(0)).square().sum(0).mul(4 / 5).sqrt()
    close(result.stderr[0], jackknife, atol=1e-9, rtol=0)


def test_an_induction_head_is_positional_only_on_one_repeat_length():
    model = blank(2, 1)
    look_back(model, (0, 0), 1)
    copy(model, (0, 0), PREVIOUS)
    match(model, (1, 0), PREVIOUS)
    model = model.double()
    one_length = repeated_tokens(64, 8, VOCAB, generator=seeded(0))
    fixed = positional_share(model, one_length)
    drawn = seeded(1)
    lengths = [
        repeated_tokens(16, n, VOCAB, generator=drawn, n_repeats=4)[:, :16] for n in (4, 5, 6, 7, 8)
    ]
    varied = positional_share(model, torch.cat(lengths))
    assert min(fixed.share[0, 0], varied.share[0, 0]) > 0.9  # the previous-token head
    assert fixed.share[1, 0] > 0.8
    assert varied.share[1, 0] < 0.4


def test_padding_does_not_count():
    model, tokens = wired(), random_tokens(12, 8, 4)
    mask = torch.ones_like(tokens)
    mask[:4, 6:] = 0
    result = positional_share(model, tokens, attention_mask=mask)
    other = torch.where(mask.bool(), tokens, 3)
    close(positional_share(model, other, attention_mask=mask).share, result.share)
    assert result.share[0, 0].item() == pytest.approx(1.0, abs=1e-12)
    assert not torch.equal(positional_share(model, tokens).share, result.share)


@pytest.mark.parametrize("family", ["GPT-2", "GPT-Neo", "BERT", "gpt-oss", "Mistral"])
@pytest.mark.filterwarnings("ignore::probes.ProbeWarning")
def test_through_a_bridge_with_scores_or_weights_windows_or_sinks(family: str):
    model, tokens = tiny(family), some_tokens(6, 7)
    result = positional_share(model, tokens)
    assert result.share.shape == (2, 2)
    assert (result.share < 1 + 1e-6).all()
    # The same window hides the same keys from every sequence, so that no weight counts as lost.
    assert result.stderr.isfinite().all()


def test_a_uniform_head_has_no_share():
    model = blank(1, 2)
    by_key(model, 0, 0.0, 0.0)
    result = positional_share(model, random_tokens(4, 8, 0))
    assert result.share[0].isnan().tolist() == [True, False]
    assert result.to_frame().share.isna().tolist() == [True, False]


def test_two_sequences_have_a_share_but_no_standard_error():
    result = positional_share(wired(), random_tokens(2, 8, 0))
    assert result.share.isfinite().all()
    assert result.stderr.isnan().all()


def test_scores_that_the_softmax_lost_are_refused():
    model = blank(1, 1)
    by_key(model, 0, 0.0, 200.0)
    with pytest.raises(ProbeError, match="layer 0 has attention weights of 0 where other") as error:
        positional_share(model, random_tokens(8, 8, 0))
    assert len(str(error.value).splitlines()) == 1
    kept = positional_share(model.double(), random_tokens(8, 8, 0))
    assert kept.share.isfinite().all()


def test_the_attention_of_the_wired_heads_is_as_wired():
    """The premise of the tests above: a positional head's mean attention by key, by hand."""
    model, pos = wired(), 4
    classes = torch.arange(pos).expand(pos, pos)
    mass = attention_by_class(model, classes, random_tokens(2, pos, 0)).mass[0, 0]
    weights = position_scores()[:pos].double()
    rows = [weights[: q + 1].softmax(0) for q in range(pos)]
    last_key = rows[-1][-1]
    close(mass[-1], last_key, atol=1e-12, rtol=0)
