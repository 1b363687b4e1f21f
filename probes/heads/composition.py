"""Which earlier head a later head reads: composition of weights, no forward pass needed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from probes.heads.head_table import Head
from probes.reading.errors import ProbeError
from probes.reading.hook_names import attention_layers, config_of


@dataclass(frozen=True, eq=False)
class KComposition:
    """How strongly the keys of later heads read what earlier heads write.

    Attributes:
        later: the later heads as (layer, head), one per row.
        earlier: the earlier heads as (layer, head), one per column.
        scores: composition above what random matrices give; NaN where the column's head is not
            in a layer before the row's.
        random: what was subtracted.
    """

    later: tuple[Head, ...]
    earlier: tuple[Head, ...]
    scores: Float[Tensor, "later earlier"]
    random: float

    def partners(self, later: Head, n: int = 1) -> list[tuple[Head, float]]:
        """The n earlier heads that a later head's keys read most, with their scores.

        Raises:
            ValueError: the head is not among `later`.
        """
        if later not in self.later:
            raise ValueError(f"no scores for head {later}; there are {list(self.later)}")
        scores = self.scores[self.later.index(later)]
        order = scores.nan_to_num(-math.inf).argsort(descending=True, stable=True)
        finite = [i for i in order.tolist() if not scores[i].isnan()]
        return [(self.earlier[i], scores[i].item()) for i in finite[:n]]


def k_composition(
    model: nn.Module, later: Sequence[Head], earlier: Sequence[Head] | None = None
) -> KComposition:
    """K-composition of earlier heads with later ones, above what random matrices give.

    In the row-vector convention, x the residual stream, the later head's score of query i and
    key j is `x_i W_Q W_K^T x_j^T`, and the earlier head puts `x W_V W_O` into the stream. The
    earlier head's output as the later one's KEY input gives

    `‖W_V W_O · W_K W_Q^T‖_F / (‖W_V W_O‖_F ‖W_K W_Q^T‖_F) - 1 / sqrt(d_model)`,

    V and O of the earlier head, K and Q of the later. The last term is the root mean square of
    the ratio for independent Gaussian factors, whatever d_head. Everything is done on d_head ×
    d_head products. The weights are taken as the model holds them: LayerNorm counts only in so far
    as it is folded in, rotary positions do not count.

    Args:
        model: a HookedTransformer or TransformerBridge.
        later: the heads whose keys read, as (layer, head).
        earlier: the heads that write; None for all in layers before the last of `later`.

    Returns:
        Scores `[later, earlier]`, 0 for chance, at most `1 - 1 / sqrt(d_model)`.

    Raises:
        ProbeError: a head does not exist.

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

    >>> from transformer_lens import HookedTransformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> composition = k_composition(model, [(1, 0), (1, 1)])
    >>> composition.earlier, composition.scores.shape
    (((0, 0), (0, 1)), torch.Size([2, 2]))
    """
    config = config_of(model)
    if earlier is None:
        last = max((layer for layer, _ in later), default=0)
        earlier = [
            (layer, head)
            for layer in attention_layers(model)
            if layer < last
            for head in range(config.n_heads)
        ]
    with torch.no_grad():
        writes = [_factors(model, head, "W_V", "W_O") for head in earlier]
        reads = [_factors(model, head, "W_K", "W_Q") for head in later]
        scores = torch.full((len(later), len(earlier)), torch.nan)
        for row, (head, (key, query)) in enumerate(zip(later, reads, strict=True)):
            columns = [i for i, writer in enumerate(earlier) if writer[0] < head[0]]
            if columns:
                value = torch.stack([writes[i][0] for i in columns]).to(key)
                output = torch.stack([writes[i][1] for i in columns]).to(key)
                scores[row, columns] = _ratio(value, output, key, query).to(scores)
    chance = config.d_model**-0.5
    return KComposition(tuple(later), tuple(earlier), scores - chance, chance)


def _factors(model: nn.Module, head: Head, first: str, second: str) -> tuple[Tensor, Tensor]:
    """Two of a head's weights; grouped-query attention shares W_K and W_V among heads."""
    layer, index = head
    attention_layers(model, layer)
    blocks: Any = model.blocks
    attention = blocks[layer].attn
    n_heads = len(attention.W_O)
    if not 0 <= index < n_heads:
        raise ProbeError(
            f"head {layer}.{index} does not exist: the layer has {n_heads} heads, "
            f"0 to {n_heads - 1}"
        )
    weights = (getattr(attention, name).detach() for name in (first, second))
    one, other = (weight[index * len(weight) // n_heads].float() for weight in weights)
    return one, other


def _ratio(
    value: Float[Tensor, "earlier d_model d_head"],
    output: Float[Tensor, "earlier d_head d_model"],
    key: Float[Tensor, "d_model k_head"],
    query: Float[Tensor, "d_model k_head"],
) -> Float[Tensor, "earlier"]:
    """`‖V O K Q^T‖ / (‖V O‖ ‖K Q^T‖)` through Gram matrices, since `‖A B‖² = tr(A^T A B B^T)`."""
    values = rearrange(value, "earlier model head -> earlier head model") @ value
    outputs = output @ rearrange(output, "earlier head model -> earlier model head")
    queries, keys = query.T @ query, key.T @ key
    middle = output @ key
    joint = einsum(middle, values, middle, queries, "e i k, e i j, e j l, k l -> e")
    written = einsum(values, outputs, "e i j, e i j -> e")
    read = (queries * keys).sum()
    share = joint.clamp(min=0) / (written * read)
    return torch.where(written * read > 0, share, 0.0).sqrt()
