"""The two-layer transformer that infers a causal graph from examples in its context.

A context has L complete examples of H tokens and one more, which is predicted token by token. The
architecture is tailored to that: layer 1 has K heads that choose an example and a column,

    v_h^k = Σ_o softmax(w_L^k / 8)[o] Σ_h'' softmax_h''(w_H^k[h - h'']) x_h''^(L+1-o),

where o counts examples back from the last one. The 8 makes the choice of an example slow under
Adam, whose steps are equal for all parameters: the heads share out the examples while W follows;
without it some choose the same. Layer 2 compares two columns, and what it attends to is read out:

    score(h, h') = Σ_k v_h'^k · W_k v_h^k over h' < h,  logits = Σ_h' softmax(score)[h'] V[x_h'].

With W_k = log π (rows: parents) and head k on example k alone, the scores are the log likelihoods
of the parents, so layer 2's attention is the exact posterior; each column of W is determined up to
a constant. Source: "How Transformers Learn Causal Structures In-Context", ICLR 2026.

The HookedTransformer owns w_L, w_H, W and V. Its residual stream is `[token (S) | position (T) |
copies for the position's own column (K S) | copies for the next column (K S) | layer-2 copy (S)]`.
The token of column h is predicted at the position before it, so each head occurs twice in layer 1,
with the same parameters: once for the position's own column, which layer 2 takes as the key, and
once for the next position's, which it takes as the query. Nothing else is trained: a fixed score
keeps layer 1 on earlier examples and layer 2 in the query's own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

from mechcausal.models import WEIGHTS_FILE
from mechcausal.models.adapter import HookedTransformer, build_hooked
from mechcausal.models.base import GraphModel, ModelError
from mechcausal.models.in_context_wiring import (
    CHOICE_RATE,
    ChoiceOfCopies,
    Comparison,
    Readout,
    in_context_config,
)
from mechcausal.models.wired_weights import plain_weights


class InContextGraphTransformer(GraphModel):
    """The tailored model, as a HookedTransformer and in closed form with the same parameters.

    `model.hooked` predicts at every position; the closed form, `model.predict_positions(tokens)`,
    at those of the last example.

    Example:
        >>> model = InContextGraphTransformer(3, n_positions=4, n_examples=2, n_heads=2)
        >>> model.initialise(scale=0.1, generator=torch.Generator().manual_seed(0))
        >>> tokens = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 2, 2, 1, 0, 1]])
        >>> hooked = model.hooked(tokens).softmax(-1)[:, 8:]
        >>> bool(torch.allclose(model.predict_positions(tokens)[:, 8:], hooked, atol=1e-6))
        True
    """

    kind = "in_context_graphs"

    def __init__(
        self,
        vocab_size: int,
        *,
        n_positions: int,
        n_examples: int,
        n_heads: int,
        device: str | torch.device = "cpu",
    ) -> None:
        """Build the wiring, with all parameters 0.

        Args:
            vocab_size: S.
            n_positions: H, tokens of an example.
            n_examples: L, complete examples before the last one.
            n_heads: K.
            device: where the model lives.
        """
        config = in_context_config(vocab_size, n_positions, n_examples, n_heads, device=str(device))
        self._take(build_hooked(config), n_positions, n_examples, n_heads)
        self._reset()

    @property
    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """w_L [head, o - 1], w_H [head, h - h'' + H - 1], W [head, parent, child], V."""
        blocks: Any = self.hooked.blocks  # the type of parametrised modules is not known
        unembed: Any = self.hooked.unembed
        first, second = (block.attn.parametrizations.W_Q for block in blocks)
        return {
            "w_L": first.original0,
            "w_H": first.original1,
            "W": second.original,
            "V": unembed.parametrizations.W_U.original,
        }

    @torch.no_grad()
    def initialise(
        self,
        *,
        scale: float = 0.1,
        own_column: float = 3.0,
        generator: torch.Generator | None = None,
    ) -> None:
        """Set the initial parameters: W = V = 0, w_H = 0 except for the column itself.

        Args:
            scale: standard deviation of w_L / 8; with several heads above 0: equal ones stay equal.
            own_column: w_H of h'' = h. From 0, uniform attention, heads have to learn which column
                to compare, and may get stuck.
            generator: of w_L; needed if `scale` is above 0.

        Raises:
            ValueError: a scale above 0 without a generator.
        """
        for parameter in self.parameters_by_name.values():
            parameter.zero_()
        named = self.parameters_by_name
        named["w_H"][:, self.n_positions - 1] = own_column
        if scale:
            if generator is None:
                raise ValueError("a scale above 0 needs a generator")
            w_L = named["w_L"]
            drawn = torch.randn(w_L.shape, generator=generator, device=generator.device)
            w_L.copy_(scale / CHOICE_RATE * drawn)

    @torch.no_grad()
    def set_ideal(self, kernel: Float[Tensor, "vocab vocab"], *, strength: float = 50.0) -> None:
        """Set the exact posterior's parameters: head k on example k alone, W = V = log π.

        Heads beyond the number of examples get W = 0.

        Args:
            kernel: π, without zeros.
            strength: w_L / 8 and w_H of what a head attends to; the others have 0.

        Raises:
            ValueError: fewer heads than examples.
        """
        n = self.n_examples
        if self.n_heads < n:
            raise ValueError(f"{self.n_heads} heads for {n} examples: at least one for each")
        self.initialise(scale=0.0, own_column=strength)
        named = self.parameters_by_name
        named["w_L"][:n] = strength / CHOICE_RATE * torch.eye(n)
        named["W"][:n] = kernel.log()
        named["V"].copy_(kernel.log())

    def attention_to_examples(self) -> Float[Tensor, "head example"]:
        """Layer 1's attention from the last example to the others, the first one first."""
        return (CHOICE_RATE * self.parameters_by_name["w_L"]).softmax(-1).flip(-1)

    def attention_to_columns(self) -> Float[Tensor, "head column key"]:
        """Layer 1's attention from each column to each, within an example."""
        return self.parameters_by_name["w_H"][:, self._columns].softmax(-1)

    def comparison(self) -> Float[Tensor, "parent child"]:
        """What layer 2's scores add up to per example: log π at the optimum, up to columns.

        `1/L Σ_k (Σ_o a_k[o]²) (mean_h b_k[h, h]²) W_k` with the attention a to examples and b to
        columns: the part of the scores that compares tokens of the same example, each in its own
        column. With one head on each example it is the mean of W over heads.
        """
        to_examples = self.attention_to_examples().square().sum(1)
        own_column = self.attention_to_columns().diagonal(dim1=1, dim2=2).square().mean(1)
        weighted = torch.einsum(
            "k,k,kst->st", to_examples, own_column, self.parameters_by_name["W"]
        )
        return weighted / self.n_examples

    def parent_attention(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch column key"]:
        """Layer 2's attention within the last example; row h predicts column h + 1.

        Raises:
            ModelError: contexts of another length.
        """
        if tokens.shape[-1] != self.sequence_length:
            raise ModelError(
                f"contexts of {tokens.shape[-1]} tokens; the model reads "
                f"{self.n_examples + 1} examples of {self.n_positions}"
            )
        named = self.parameters_by_name
        one_hot = F.one_hot(tokens, self.vocab_size).to(named["W"].dtype)
        examples = one_hot.view(len(tokens), -1, self.n_positions, self.vocab_size)
        to_examples, to_columns = self.attention_to_examples(), self.attention_to_columns()

        def copied(rows: slice) -> Float[Tensor, "batch head column vocab"]:
            return torch.einsum("ke,behs->bkhs", to_examples, examples[:, rows])

        keys = to_columns @ copied(slice(-1))
        # The last position predicts column 0 of an example to come, so it counts from there.
        following = to_columns[:, :1] @ copied(slice(1, None))
        queries = torch.cat([keys[:, :, 1:], following], dim=2)
        scores = torch.einsum("bkqt,kst,bkps->bqp", queries, named["W"], keys)
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=tokens.device).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1)

    def predict_positions(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos vocab"]:
        """The closed form at every position of the last example; 1 / S at all earlier ones."""
        attention = self.parent_attention(tokens)
        logits = torch.einsum(
            "bqp,bps->bqs", attention, self.parameters_by_name["V"][tokens[:, -self.n_positions :]]
        )
        earlier = tokens.shape[1] - self.n_positions
        padding = logits.new_full((len(tokens), earlier, self.vocab_size), 1 / self.vocab_size)
        return torch.cat([padding, logits.softmax(-1)], dim=1)

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch vocab"]:
        """The distribution of the token after the context, the first one of a further example."""
        return self.predict_positions(tokens)[:, -1]

    def probabilities_by_position(
        self, output: Float[Tensor, "batch pos vocab"]
    ) -> Float[Tensor, "batch pos vocab"]:
        """Softmax of every position's logits."""
        return output.softmax(-1)

    def _trained_blocks(self) -> list[Tensor]:
        return list(self.parameters_by_name.values())

    def _saved(self) -> dict[str, Any]:
        return {"n_positions": self.n_positions, "n_examples": self.n_examples}

    @torch.no_grad()
    def _adopt(self, hooked: HookedTransformer, saved: Mapping[str, Any]) -> None:
        cfg, sizes = hooked.cfg, (saved.get("n_positions"), saved.get("n_examples"))
        n_positions, n_examples = sizes
        if (
            not (type(n_positions) is int and type(n_examples) is int)
            or min(n_positions, n_examples) < 1
            or (n_examples + 1) * n_positions != cfg.n_ctx
            or cfg.n_heads % 2
        ):
            raise ValueError(f"the weights are not those of a model of {self.kind}")
        n_heads = cfg.n_heads // 2
        config = in_context_config(cfg.d_vocab, n_positions, n_examples, n_heads)
        self.hooked = hooked
        self._check_config(config)
        loaded = {name: weight.clone() for name, weight in plain_weights(hooked).items()}
        self._take(hooked, n_positions, n_examples, n_heads)
        values = [parameter.clone() for parameter in self._trained_blocks()]
        self._reset()
        for parameter, value in zip(self._trained_blocks(), values, strict=True):
            parameter.copy_(value)
        for name, weight in plain_weights(hooked).items():
            if not torch.equal(weight, loaded[name]):
                raise ValueError(
                    f"{WEIGHTS_FILE}: {name} is not wired as in a {self.kind} model: "
                    "the file was changed or is damaged"
                )

    def _take(
        self, hooked: HookedTransformer, n_positions: int, n_examples: int, n_heads: int
    ) -> None:
        self.hooked = hooked
        self.n_positions, self.n_examples, self.n_heads = n_positions, n_examples, n_heads
        self.heads = (2 * n_heads, 1)
        device = hooked.embed.W_E.device
        columns = torch.arange(n_positions, device=device)
        self._columns = columns.unsqueeze(1) - columns + n_positions - 1
        sizes = (hooked.cfg.d_vocab, n_positions, n_examples, n_heads)
        shape = hooked.blocks[0].attn.W_Q.shape
        parts: list[tuple[nn.Module, str, nn.Module]] = [
            (hooked.blocks[0].attn, "W_Q", ChoiceOfCopies(*sizes, shape)),
            (hooked.blocks[1].attn, "W_Q", Comparison(*sizes, shape)),
            (hooked.unembed, "W_U", Readout(hooked.cfg.d_model)),
        ]
        for owner, name, part in parts:
            register_parametrization(owner, name, part.to(device), unsafe=True)

    def _wire(self) -> None:
        s, t, n = self.vocab_size, self.sequence_length, self.n_heads
        hooked, positions = self.hooked, torch.arange(self.sequence_length)
        examples, columns = positions // self.n_positions, positions % self.n_positions
        token, eye = slice(0, s), torch.eye(s)
        hooked.embed.W_E[:, token] = eye
        hooked.pos_embed.W_pos[:, s : s + t] = torch.eye(t)
        first, second = (block.attn for block in hooked.blocks)
        first.W_K[:, s + positions, examples] = 1.0
        first.W_K[:, s + positions, self.n_examples + 1 + columns] = 1.0
        first.W_V[:, token, :s] = eye
        for head in range(2 * n):
            start = s + t + head * s
            first.W_O[head, :s, start : start + s] = eye
        second.W_K[0, s + t : s + t + n * s, : n * s] = torch.eye(n * s)
        second.W_K[0, s + positions, n * s + examples] = 1.0
        second.W_V[0, token, :s] = eye
        second.W_O[0, :s, -s:] = eye
