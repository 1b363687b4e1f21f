"""Scores of attention patterns for the heads of an induction circuit, as pure functions.

Every score is attention mass on a set of keys, averaged over the queries that have such keys: a
mask function chooses the keys, `attention_to` sums the attention on them, and `uniform_baseline` is
the score of uniform attention. Scores keep the batch axis, so that a standard error over sequences
can be computed; a sequence without any such query scores NaN. An `attention_mask`, 0 at padding and
1 at text, excludes padding as query, as key and as earlier occurrence of a token.
"""

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from probes.reading.padding import pairs_of


def attention_to(
    pattern: Float[Tensor, "batch head query key"], mask: Bool[Tensor, "batch query key"]
) -> Float[Tensor, "batch head"]:
    """Attention mass that queries put on the keys of a mask.

    `mean over q in Q of Σ_k A[q, k] · mask[q, k]`, where Q is the queries with a True key.

    Args:
        pattern: attention after the softmax.
        mask: True where attention counts.

    Returns:
        A share of attention in [0, 1]; NaN for a sequence whose mask is all False.

    Raises:
        ValueError: the mask does not fit the pattern.

    >>> pattern = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
    >>> attention_to(pattern, torch.tensor([[[False, False], [True, False]]]))
    tensor([[0.2500]])
    """
    expected = (pattern.shape[0], *pattern.shape[2:])
    if mask.shape != expected:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not fit a pattern of shape "
            f"{tuple(pattern.shape)}: expected {expected}"
        )
    return weighted_attention(pattern, mean_weights(mask.unsqueeze(1)))[:, 0]


def prefix_matching_mask(
    tokens: Int[Tensor, "batch pos"], attention_mask: Shaped[Tensor, "batch pos"] | None = None
) -> Bool[Tensor, "batch query key"]:
    """Keys just after an earlier occurrence of the query's token: `t[k-1] = t[q]`, `k-1 < q`.

    >>> prefix_matching_mask(torch.tensor([[5, 6, 5]]))[0, 2]
    tensor([False,  True, False])
    """
    duplicate = duplicate_token_mask(tokens, attention_mask)
    return _without_padding(torch.nn.functional.pad(duplicate[:, :, :-1], (1, 0)), attention_mask)


def duplicate_token_mask(
    tokens: Int[Tensor, "batch pos"], attention_mask: Shaped[Tensor, "batch pos"] | None = None
) -> Bool[Tensor, "batch query key"]:
    """Keys that hold an earlier occurrence of the query's token: `t[k] = t[q]`, `k < q`.

    >>> duplicate_token_mask(torch.tensor([[5, 6, 5]]))[0, 2]
    tensor([ True, False, False])
    """
    same = rearrange(tokens, "batch query -> batch query 1") == rearrange(
        tokens, "batch key -> batch 1 key"
    )
    return _without_padding(same.tril(-1), attention_mask)


def previous_token_mask(
    tokens: Int[Tensor, "batch pos"], attention_mask: Shaped[Tensor, "batch pos"] | None = None
) -> Bool[Tensor, "batch query key"]:
    """The key just before each query, `k = q - 1`, for any tokens.

    >>> previous_token_mask(torch.tensor([[5, 6, 5]]))[0, 2]
    tensor([False,  True, False])
    """
    batch, pos = tokens.shape
    before = torch.ones(pos, pos, dtype=torch.bool, device=tokens.device).tril(-1).triu(-1)
    return _without_padding(before.expand(batch, pos, pos), attention_mask)


SCORE_MASKS = {
    "prefix_matching": prefix_matching_mask,
    "previous_token": previous_token_mask,
    "duplicate_token": duplicate_token_mask,
}
"""For each score, the mask of the keys on which it counts attention."""


def _without_padding(
    mask: Bool[Tensor, "batch query key"], attention_mask: Shaped[Tensor, "batch pos"] | None
) -> Bool[Tensor, "batch query key"]:
    """The mask, False where query or key is padding."""
    return mask if attention_mask is None else mask & pairs_of(attention_mask.bool())


def prefix_matching_score(
    pattern: Float[Tensor, "batch head query key"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch head"]:
    """Attention from a token to the positions just after its earlier occurrences.

    `attention_to` with `prefix_matching_mask`: 1 for a perfect induction head. The mean runs over
    the queries whose token occurred before (in a random block repeated twice: the second copy).
    Use several repeat lengths: with one, a head that attends a fixed number of positions back also
    scores high.

    Args:
        pattern: attention after the softmax.
        tokens: the tokens that the model read.
        attention_mask: 0 at padding.

    Returns:
        A share of attention in [0, 1]; NaN for a sequence in which no token recurs.

    Source:
        Olsson et al. 2022, "In-context Learning and Induction Heads".

    >>> tokens = torch.tensor([[5, 6, 5, 6], [1, 2, 3, 4]])
    >>> one_back = torch.eye(4).roll(-1, dims=1).expand(2, 1, 4, 4)
    >>> prefix_matching_score(one_back, tokens)
    tensor([[1.],
            [nan]])
    """
    return attention_to(pattern, prefix_matching_mask(tokens, attention_mask))


def duplicate_token_score(
    pattern: Float[Tensor, "batch head query key"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch head"]:
    """Attention from a token to its own earlier occurrences.

    `attention_to` with `duplicate_token_mask`: a share of attention in [0, 1], over the queries
    whose token occurred before; NaN for a sequence in which no token recurs.

    Source:
        Wang et al. 2022, "Interpretability in the Wild".

    >>> two_back = torch.eye(4).roll(-2, dims=1).expand(1, 1, 4, 4)
    >>> duplicate_token_score(two_back, torch.tensor([[5, 6, 5, 6]]))
    tensor([[1.]])
    """
    return attention_to(pattern, duplicate_token_mask(tokens, attention_mask))


def previous_token_score(
    pattern: Float[Tensor, "batch head query key"],
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch head"]:
    """Attention from a position to the one before it, `mean over q >= 1 of A[q, q-1]`.

    A share of attention in [0, 1]; NaN for sequences of one token.

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

    >>> previous_token_score(torch.eye(4).roll(-1, dims=1).expand(1, 1, 4, 4))
    tensor([[1.]])
    """
    if attention_mask is None:
        return pattern.diagonal(offset=-1, dim1=-2, dim2=-1).mean(-1)
    return attention_to(pattern, previous_token_mask(attention_mask.long(), attention_mask))


def uniform_baseline(
    mask: Bool[Tensor, "batch query key"],
    *,
    causal: bool = True,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch"]:
    """The score `attention_to` of a head with uniform attention over all visible keys.

    `mean over q in Q of |{k visible : mask[q, k]}| / |{k visible}|`. Visible keys are `k <= q`, or
    all with `causal=False`, without padding. A score is evidence only if it is above this.

    >>> uniform_baseline(previous_token_mask(torch.tensor([[5, 6]])))
    tensor([0.5000])
    """
    uniform = uniform_pattern(mask.shape[1], causal, attention_mask, device=mask.device)
    return attention_to(uniform.expand(len(mask), 1, -1, -1), mask)[:, 0]


def uniform_pattern(
    pos: int,
    causal: bool,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    *,
    device: torch.device | None = None,
) -> Float[Tensor, "batch 1 query key"]:
    """Uniform attention to all visible keys, `k <= q` or all; a batch of one without a mask.

    >>> uniform_pattern(2, causal=True)[0, 0]
    tensor([[1.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    visible = torch.ones(1, 1, pos, pos, device=device)
    if causal:
        visible = visible.tril()
    if attention_mask is not None:
        visible = visible * pairs_of(attention_mask.bool()).unsqueeze(1)
    return visible / visible.sum(-1, keepdim=True).clamp(min=1)


def above_chance(
    score: Float[Tensor, "*any"], uniform: Float[Tensor, "*any"]
) -> Float[Tensor, "*any"]:
    """The score rescaled so that uniform attention has 0: `(score - uniform) / (1 - uniform)`.

    1 for a head that attends only to the keys of the score, below 0 for one that avoids them.

    >>> above_chance(torch.tensor([0.5, 0.75]), torch.tensor([0.5, 0.5]))
    tensor([0.0000, 0.5000])
    """
    return (score - uniform) / (1 - uniform)


def mean_weights(masks: Bool[Tensor, "*any query key"]) -> Float[Tensor, "*any query key"]:
    """Weights w such that `Σ_qk A[q, k] · w[q, k]` is `attention_to` (NaN: no query)."""
    n_queries = masks.any(-1).sum(-1)
    return masks / rearrange(n_queries, "... -> ... 1 1")


def weighted_attention(
    pattern: Float[Tensor, "batch head query key"], weights: Float[Tensor, "batch score query key"]
) -> Float[Tensor, "batch score head"]:
    """`Σ_qk A[q, k] · w[q, k]` for several weightings in one pass over the pattern."""
    dtype = torch.promote_types(pattern.dtype, weights.dtype)
    return einsum(
        pattern.to(dtype),
        weights.to(dtype),
        "batch head query key, batch score query key -> batch score head",
    )
