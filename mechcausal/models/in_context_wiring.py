"""The wiring of `mechcausal.models.in_context_graphs`: its sizes, and its three trained weights.

Each weight is a function of fewer parameters, for `torch.nn.utils.parametrize`: `forward` makes the
weight and `right_inverse` reads the parameters off it, exactly.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mechcausal.models.adapter import HookedTransformerConfig, wired_config

CHOICE_RATE = 1 / 8
"""Factor of w_L in the scores; a power of 2, so that files keep w_L exactly."""
BARRIER = -1e4
"""Score of keys that the wiring hides: exp of it is 0, unless trained scores exceed thousands."""


def in_context_config(
    vocab_size: int, n_positions: int, n_examples: int, n_heads: int, *, device: str = "cpu"
) -> HookedTransformerConfig:
    """The HookedTransformerConfig: T = (L + 1) H, d_model = (2 K + 2) S + T."""
    length = (n_examples + 1) * n_positions
    return wired_config(
        vocab_size,
        length,
        n_layers=2,
        n_heads=2 * n_heads,
        d_model=(2 * n_heads + 2) * vocab_size + length,
        d_head=n_examples + 1 + max(n_positions, n_heads * vocab_size),
        device=device,
    )


class ChoiceOfCopies(nn.Module):
    """Layer 1's W_Q from w_L and w_H: what each position looks for, by example and by column."""

    back: Tensor
    columns: Tensor

    def __init__(self, s: int, n_positions: int, n_examples: int, n_heads: int, shape: Any) -> None:
        """Index w_L and w_H for every position, in its two roles."""
        super().__init__()
        self.shape, self.start = tuple(shape), s
        self.n_positions, self.n_examples, self.n_heads = n_positions, n_examples, n_heads
        length = (n_examples + 1) * n_positions
        served = torch.arange(length) + torch.tensor([[0], [1]])  # a position's own, and the next
        back = served.unsqueeze(-1) // n_positions - torch.arange(n_examples + 1)
        # Index n_examples stands for the barrier, for examples that are not complete or too far.
        back = torch.where((back >= 1) & (back <= n_examples), back - 1, n_examples)
        columns = served.unsqueeze(-1) % n_positions - torch.arange(n_positions) + n_positions - 1
        self.register_buffer("back", back, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(
        self, w_L: Float[Tensor, "head example"], w_H: Float[Tensor, "head offset"]
    ) -> Float[Tensor, "head2 d_model d_head"]:
        """W_Q: first all heads for a position's own column, then again for the next one."""
        barrier = w_L.new_full((self.n_heads, 1), BARRIER)
        scores = torch.cat([CHOICE_RATE * w_L, barrier], dim=1)
        by_example = scores[:, self.back]  # [head, role, position, key]
        block = torch.cat([by_example, w_H[:, self.columns]], dim=-1)
        block = block.transpose(0, 1).flatten(0, 1)
        below, right = self.shape[1] - self.start - block.shape[1], self.shape[2] - block.shape[2]
        return F.pad(block, (0, right, self.start, below))

    def right_inverse(
        self, weight: Float[Tensor, "head2 d_model d_head"]
    ) -> tuple[Float[Tensor, "head example"], Float[Tensor, "head offset"]]:
        """w_L and w_H, read off the first rows that hold them."""
        own = weight[: self.n_heads, self.start :, :]
        last = self.n_examples * self.n_positions
        rows = own[:, last : last + self.n_positions, self.n_examples + 1 :]
        rows = rows[..., : self.n_positions]
        w_H = torch.cat([rows[:, 0].flip(-1), rows[:, 1:, 0]], dim=-1)
        by_example = own[:, last, : self.n_examples].flip(-1)
        return by_example / CHOICE_RATE, w_H.contiguous()


class Comparison(nn.Module):
    """Layer 2's W_Q from W, and the barrier to other examples."""

    fixed: Tensor

    def __init__(self, s: int, n_positions: int, n_examples: int, n_heads: int, shape: Any) -> None:
        """Set the fixed scores."""
        super().__init__()
        self.shape, self.s, self.n_heads = tuple(shape), s, n_heads
        self.start = s + (n_examples + 1) * n_positions + n_heads * s
        positions = torch.arange((n_examples + 1) * n_positions)
        other = positions.unsqueeze(1) // n_positions != torch.arange(n_examples + 1)
        fixed = torch.zeros(self.shape)
        fixed[0, s : s + len(positions), n_heads * s : n_heads * s + n_examples + 1] = (
            BARRIER * other
        )
        self.register_buffer("fixed", fixed, persistent=False)

    def forward(
        self, W: Float[Tensor, "head parent child"]
    ) -> Float[Tensor, "head2 d_model d_head"]:
        """W_Q: the blocks of W in head 0, all other heads 0."""
        block = torch.block_diag(*W.mT)  # queries from the left: rows are children
        above, n = self.start, len(block)
        below, right = self.shape[1] - above - n, self.shape[2] - n
        first = F.pad(block, (0, right, above, below)).unsqueeze(0)
        return F.pad(first, (0, 0, 0, 0, 0, self.shape[0] - 1)) + self.fixed

    def right_inverse(
        self, weight: Float[Tensor, "head2 d_model d_head"]
    ) -> Float[Tensor, "head parent child"]:
        """The blocks of W."""
        n, s = self.n_heads, self.s
        block = weight[0, self.start : self.start + n * s, : n * s].view(n, s, n, s)
        return block.diagonal(dim1=0, dim2=2).permute(2, 1, 0).contiguous()


class Readout(nn.Module):
    """W_U from V: the logits that the token which layer 2 attends to gives."""

    def __init__(self, d_model: int) -> None:
        """Set the width of the residual stream."""
        super().__init__()
        self.d_model = d_model

    def forward(self, V: Float[Tensor, "token vocab"]) -> Float[Tensor, "d_model vocab"]:
        """W_U: V in the last rows, which hold the token that layer 2 attends to."""
        return F.pad(V, (0, 0, self.d_model - len(V), 0))

    def right_inverse(self, weight: Float[Tensor, "d_model vocab"]) -> Float[Tensor, "token vocab"]:
        """V."""
        return weight[-weight.shape[1] :].contiguous()
