"""The paper's simplified two-layer transformer, as a HookedTransformer and in closed form.

`f(s) = X^T softmax(softmax(causal_mask(A1)) X A2 x_query)`, where X are the one-hot tokens (T x S).
Layer 1 attends by position (A1, T x T) and copies a token to each position. Layer 2 compares the
query with the copied tokens (A2, S x S) and outputs the tokens at the positions it attends to.
Source: Nichani, Damian, Lee, ICML 2024 (arXiv 2402.14735), section 3.

The HookedTransformer owns the parameters. Its residual stream holds four blocks,
`[token (S) | position (T) | layer-1 copy (S) | layer-2 copy (S)]`; embeddings, keys, values,
outputs and unembedding are fixed 0/1 wiring; A1 is the position block of layer 0's W_Q, A2 the
token block of layer 1's W_Q. The closed form reads the same memory and skips the zeros: B T^2
multiplications per step instead of B T d_model d_head.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.models.adapter import (
    HookedTransformer,
    HookedTransformerConfig,
    build_hooked,
    wired_config,
)
from mechcausal.models.base import GraphModel


def simplified_config(
    vocab_size: int, sequence_length: int, *, device: str = "cpu"
) -> HookedTransformerConfig:
    """The HookedTransformerConfig of the simplified model: d_model = 3S + T, d_head = max(S, T)."""
    return wired_config(
        vocab_size,
        sequence_length,
        n_layers=2,
        n_heads=1,
        d_model=3 * vocab_size + sequence_length,
        d_head=max(vocab_size, sequence_length),
        device=device,
    )


def causal_softmax(
    scores: Float[Tensor, "*runs query key"],
) -> Float[Tensor, "*runs query key"]:
    """Attention patterns: the softmax over the keys up to each query."""
    length = scores.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def closed_form(
    A1: Float[Tensor, "*runs pos pos"],
    A2: Float[Tensor, "*runs vocab vocab"],
    tokens: Int[Tensor, "*runs batch pos"],
) -> Float[Tensor, "*runs batch vocab"]:
    """f of one model, or of several along leading axes, differentiable in A1 and A2.

    `(softmax(A1) X) A2 x_query = softmax(A1) (X A2 x_query)`, so layer 1 is one T x T product with
    the B x T matches, and no one-hot matrix is needed.
    """
    return _copied(tokens, query_attention(causal_softmax(A1), A2, tokens), A2.shape[-1])


def query_attention(
    attention1: Float[Tensor, "*runs query key"],
    A2: Float[Tensor, "*runs vocab vocab"],
    tokens: Int[Tensor, "*runs batch pos"],
) -> Float[Tensor, "*runs batch pos"]:
    """Layer 2's attention in the last row, from layer 1's pattern."""
    cells = tokens * A2.shape[-1] + tokens[..., -1:]
    matches = A2.flatten(-2).gather(-1, cells.flatten(-2)).view(tokens.shape)
    return (matches @ attention1.mT).softmax(-1)


class SimplifiedTransformer(GraphModel):
    """The simplified model, as a HookedTransformer and in closed form with the same parameters.

    `model.hooked` is the HookedTransformer for hooks and TransformerLens tools: its "logits" at the
    last position are the probabilities f. `model(tokens)` is the closed form for training.

    Example:
        >>> model = SimplifiedTransformer(vocab_size=3, sequence_length=6)
        >>> model.initialise(beta0=1.0)
        >>> tokens = torch.tensor([[0, 1, 2, 0, 1, 0]])
        >>> bool(torch.allclose(model(tokens), model.hooked(tokens)[:, -1], atol=1e-6))
        True
    """

    kind = "simplified"
    closed_form_is_clamped = True
    heads = (1, 1)

    def __init__(
        self, vocab_size: int, sequence_length: int, *, device: str | torch.device = "cpu"
    ) -> None:
        """Build the wiring, with A1 = 0 and A2 = 0."""
        config = simplified_config(vocab_size, sequence_length, device=str(device))
        self.hooked = build_hooked(config)
        self._reset()

    @property
    def parameters_by_name(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that contain A1 and A2; all other entries have zero gradient."""
        blocks = self.hooked.blocks
        return {"A1": blocks[0].attn.W_Q, "A2": blocks[1].attn.W_Q}

    @property
    def A1(self) -> Float[Tensor, "pos pos"]:
        """Layer 1's position-position block, a view of the parameter: rows are queries."""
        return self._position_block(self.parameters_by_name["A1"])

    @property
    def A2(self) -> Float[Tensor, "vocab vocab"]:
        """Layer 2's block, a view of the parameter: [copied token, query token].

        The HookedTransformer multiplies queries from the left, so this view is transposed.
        """
        return self._token_block(self.parameters_by_name["A2"])

    @torch.no_grad()
    def initialise(self, *, beta0: float = 1.0) -> None:
        """Set the initial weights of Algorithm 1: A1 = 0, A2 = beta0 I."""
        self.A1.zero_()
        self.A2.copy_(beta0 * torch.eye(self.vocab_size))

    @torch.no_grad()
    def set_ideal(
        self, graph: CausalGraph, *, strength: float = 50.0, beta: float | None = None
    ) -> None:
        """Set the hand-built solution: layer 1 one-hot on parents, layer 2 one-hot on matches.

        Rows of roots and of the query attend uniformly. If they attended to themselves, they would
        copy their own token, and layer 2 would attend to them whenever it equals the query's token,
        although they do not follow that token.

        Args:
            graph: single-parent graph of T - 1 positions.
            strength: layer 1's score of the parent; other keys have 0.
            beta: A2 = beta I; `strength` when absent. A small beta has a lower log loss, because it
                leaves probability for successors that do not occur in the context.

        Raises:
            ValueError: the graph's sequence length differs from the model's.
        """
        self._check_length(graph)
        self.initialise(beta0=strength if beta is None else beta)
        for parent, position in graph.edges:
            self.A1[position, parent] = strength

    def attention1(self) -> Float[Tensor, "query key"]:
        """Layer 1's attention pattern, the same for every sequence."""
        return self._held(0, causal_softmax(self.A1)[None, None])[0, 0]

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch vocab"]:
        """f in closed form, differentiable in A1 and A2."""
        attention2 = query_attention(self.attention1(), self.A2, tokens)
        attention2 = self._held_last_row(1, attention2.unsqueeze(1)).squeeze(1)
        return _copied(tokens, attention2, self.vocab_size)

    @staticmethod
    def predict_each(
        models: Sequence["SimplifiedTransformer"], tokens: Int[Tensor, "run batch pos"]
    ) -> Float[Tensor, "run batch vocab"]:
        """f of several models of equal size, each on its own sequences, in one pass.

        Differentiable in the parameters of every model.

        Example:
            >>> models = [SimplifiedTransformer(3, 6) for _ in range(2)]
            >>> for number, model in enumerate(models):
            ...     model.initialise(beta0=1.0 + number)
            >>> tokens = torch.tensor([[[0, 1, 2, 0, 1, 0]], [[2, 1, 2, 0, 1, 0]]])
            >>> together = SimplifiedTransformer.predict_each(models, tokens)
            >>> bool(torch.allclose(together[1], models[1](tokens[1])))
            True
        """
        if any(model.is_clamped for model in models):
            return torch.stack([model(own) for model, own in zip(models, tokens, strict=True)])
        first, parameters = models[0], [model.parameters_by_name for model in models]
        A1 = first._position_block(torch.stack([named["A1"] for named in parameters]))
        A2 = first._token_block(torch.stack([named["A2"] for named in parameters]))
        return closed_form(A1, A2, tokens)

    def probabilities(
        self, output: Float[Tensor, "batch pos vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """The last position's output, which already is a distribution."""
        return output[:, -1]

    def _position_block(self, weight: Tensor) -> Tensor:
        s, t = self.vocab_size, self.sequence_length
        return weight[..., 0, s : s + t, :t]

    def _token_block(self, weight: Tensor) -> Tensor:
        s = self.vocab_size
        return weight[..., 0, :s, :s].mT

    def _trained_blocks(self) -> list[Tensor]:
        return [self.A1, self.A2]

    def _adopt(self, hooked: HookedTransformer, saved: Mapping[str, Any]) -> None:
        self.hooked = hooked
        self._check_config(simplified_config(self.vocab_size, self.sequence_length))
        self._check_wiring()

    def _wire(self) -> None:
        s, t = self.vocab_size, self.sequence_length
        hooked = self.hooked
        token, position = slice(0, s), slice(s, s + t)
        copy1, copy2 = slice(s + t, 2 * s + t), slice(2 * s + t, 3 * s + t)
        eye_s, eye_t = torch.eye(s), torch.eye(t)
        hooked.embed.W_E[:, token] = eye_s
        hooked.pos_embed.W_pos[:, position] = eye_t
        first, second = (block.attn for block in hooked.blocks)
        first.W_K[0, position, :t] = eye_t
        first.W_V[0, token, :s] = eye_s
        first.W_O[0, :s, copy1] = eye_s
        second.W_K[0, copy1, :s] = eye_s
        second.W_V[0, token, :s] = eye_s
        second.W_O[0, :s, copy2] = eye_s
        hooked.unembed.W_U[copy2] = eye_s


def _copied(
    tokens: Int[Tensor, "*runs batch pos"],
    attention: Float[Tensor, "*runs batch pos"],
    vocab_size: int,
) -> Float[Tensor, "*runs batch vocab"]:
    """How much attention each token of the vocabulary gets."""
    output = attention.new_zeros(*tokens.shape[:-1], vocab_size)
    return output.scatter_add(-1, tokens, attention)
