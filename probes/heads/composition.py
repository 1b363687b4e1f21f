"""K-composition: which earlier heads the keys of a later head read, computed from weights alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from probes.reading.hook_names import Head, check_head, config_of, layers_with


@dataclass(frozen=True, eq=False)
class KComposition:
    """How strongly the keys of later heads read what earlier heads write.

    Attributes:
        later: the later heads as (layer, head), one per row.
        earlier: the earlier heads as (layer, head), one per column.
        excess: the composition score minus `random`; NaN unless the column's head lies in an
            earlier layer than the row's.
        random: the score of random matrices, `1 / sqrt(d_model)`.
    """

    later: tuple[Head, ...]
    earlier: tuple[Head, ...]
    excess: Float[Tensor, "later earlier"]
    random: float

    def partners(self, later: Head, n: int = 1) -> list[tuple[Head, float]]:
        """The n earlier heads that a later head's keys read most, each with its excess.

        Raises:
            ValueError: the head is not among `later`.
        """
        if later not in self.later:
            raise ValueError(f"no scores for head {later}; there are {list(self.later)}")
        excess = self.excess[self.later.index(later)]
        order = excess.nan_to_num(-math.inf).argsort(descending=True, stable=True)
        defined = [i for i in order.tolist() if not excess[i].isnan()]
        return [(self.earlier[i], excess[i].item()) for i in defined[:n]]


def k_composition(
    model: nn.Module, later: Sequence[Head], earlier: Sequence[Head] | None = None
) -> KComposition:
    """K-composition of earlier heads with later heads, in excess of random matrices.

    With row vectors x from the residual stream, the later head scores query i and key j as
    `x_i W_Q W_K^T x_j^T`, and the earlier head writes `x W_V W_O`. When the later head's keys read
    what the earlier head writes, the excess is

    `‖W_V W_O · W_K W_Q^T‖_F / (‖W_V W_O‖_F ‖W_K W_Q^T‖_F) - 1 / sqrt(d_model)`

    with W_V, W_O of the earlier head and W_K, W_Q of the later. The last term is the root mean
    square of the ratio for independent Gaussian factors of any d_head. The function reads the
    weights as the model holds them: it includes LayerNorm only if the model has folded it into
    the weights, and it ignores rotary embeddings.

    Args:
        model: a HookedTransformer or TransformerBridge.
        later: the heads whose keys read, as (layer, head).
        earlier: the heads that write; None for every head below the highest layer in `later`.

    Returns:
        Excess `[later, earlier]`: 0 for random matrices, at most `1 - 1 / sqrt(d_model)`.

    Raises:
        ProbeError: a head does not exist.

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> composition = k_composition(model, [(1, 0), (1, 1)])
    >>> composition.earlier, composition.excess.shape
    (((0, 0), (0, 1)), torch.Size([2, 2]))
    """
    config = config_of(model)
    if earlier is None:
        last = max((layer for layer, _ in later), default=0)
        earlier = [
            (layer, head)
            for layer in layers_with(model, "pattern")
            if layer < last
            for head in range(config.n_heads)
        ]
    with torch.no_grad():
        writes = [_factors(model, head, "W_V", "W_O") for head in earlier]
        reads = [_factors(model, head, "W_K", "W_Q") for head in later]
        ratios = torch.full((len(later), len(earlier)), torch.nan)
        for row, (head, (key, query)) in enumerate(zip(later, reads, strict=True)):
            columns = [i for i, writer in enumerate(earlier) if writer[0] < head[0]]
            if columns:
                value = torch.stack([writes[i][0] for i in columns]).to(key)
                output = torch.stack([writes[i][1] for i in columns]).to(key)
                ratios[row, columns] = _ratio(value, output, key, query).to(ratios)
    chance = config.d_model**-0.5
    return KComposition(tuple(later), tuple(earlier), ratios - chance, chance)


def _factors(model: nn.Module, head: Head, first: str, second: str) -> tuple[Tensor, Tensor]:
    """The head's two named weights, `[d_model d_head]` or `[d_head d_model]`, in float32."""
    check_head(model, head)
    layer, index = head
    blocks: Any = model.blocks
    attention = blocks[layer].attn
    # Grouped-query attention: several heads share one W_K and one W_V.
    weights = (getattr(attention, name).detach() for name in (first, second))
    n_heads = config_of(model).n_heads
    first_weight, second_weight = (w[index * len(w) // n_heads].float() for w in weights)
    return first_weight, second_weight


def _ratio(
    value: Float[Tensor, "earlier d_model d_head"],
    output: Float[Tensor, "earlier d_head d_model"],
    key: Float[Tensor, "d_model k_head"],
    query: Float[Tensor, "d_model k_head"],
) -> Float[Tensor, "earlier"]:
    """`‖V O K Q^T‖ / (‖V O‖ ‖K Q^T‖)` from d_head × d_head products, `‖A B‖² = tr(A^T A B B^T)`."""
    values = rearrange(value, "earlier model head -> earlier head model") @ value
    outputs = output @ rearrange(output, "earlier head model -> earlier model head")
    queries, keys = query.T @ query, key.T @ key
    middle = output @ key
    joint = einsum(middle, values, middle, queries, "e i k, e i j, e j l, k l -> e")
    written = einsum(values, outputs, "e i j, e i j -> e")
    read = (queries * keys).sum()
    squared = joint.clamp(min=0) / (written * read)
    return torch.where(written * read > 0, squared, 0.0).sqrt()
