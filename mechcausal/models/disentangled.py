"""The paper's disentangled transformer, as a HookedTransformer and in closed form.

The residual stream concatenates instead of adding: `h0 = [onehot(token) | onehot(position)]`, and
every head appends `softmax(causal_mask(h A h^T)) h`, with one matrix A per head and no scale, value
or output matrix. A linear readout W of the last position gives the logits. Source: Nichani, Damian,
Lee, ICML 2024 (arXiv 2402.14735), section 2 and figures 2 and 5 to 7.

So every row and column of A and W belongs to a named stream. `token` and `position` are the inputs,
`0.0/token` is what head 0 of layer 0 copies from `token`, and `1.0/0.0/token` what head 0 of layer
1 copies from `0.0/token`. `model.block(1, 0, "token", "0.0/token")` is the part of layer 1's A that
compares the query's token with the tokens that layer 0 copied.

The HookedTransformer owns the parameters: A is the top left corner of W_Q, W is W_U, and W_K, W_V,
W_O are fixed 0/1 wiring. The closed form reads the same memory. It is faster because products with
one-hot streams are look-ups and the last layer is computed at the last position only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mechcausal.graphs import CausalGraph
from mechcausal.models.adapter import (
    HookedTransformer,
    HookedTransformerConfig,
    build_hooked,
    wired_config,
)
from mechcausal.models.base import GraphModel


def stream_widths(vocab_size: int, sequence_length: int, heads: Sequence[int]) -> list[int]:
    """Width of the residual stream before each layer and at the end; n heads multiply it by 1 + n.

    Example:
        >>> stream_widths(10, 20, [1, 1])  # d, 2d, 4d
        [30, 60, 120]
    """
    widths = [vocab_size + sequence_length]
    for n_heads in heads:
        widths.append(widths[-1] * (1 + n_heads))
    return widths


def disentangled_config(
    vocab_size: int, sequence_length: int, heads: Sequence[int], *, device: str = "cpu"
) -> HookedTransformerConfig:
    """The HookedTransformerConfig: d_model is the final width, d_head that before the last layer.

    Every layer gets `max(heads)` heads; those beyond `heads[layer]` stay unused.
    """
    widths = stream_widths(vocab_size, sequence_length, heads)
    return wired_config(
        vocab_size,
        sequence_length,
        n_layers=len(heads),
        n_heads=max(heads),
        d_model=widths[-1],
        d_head=widths[-2],
        device=device,
    )


class DisentangledTransformer(GraphModel):
    """The disentangled transformer, with any number of layers and of heads per layer.

    Example:
        >>> model = DisentangledTransformer(vocab_size=3, sequence_length=6, heads=(1, 1))
        >>> model.initialise(scale=0.1, generator=torch.Generator().manual_seed(0))
        >>> tokens = torch.tensor([[0, 1, 2, 0, 1, 0]])
        >>> hooked = model.probabilities(model.hooked(tokens))
        >>> bool(torch.allclose(model(tokens), hooked, atol=1e-6))
        True
        >>> list(model.streams(1))
        ['token', 'position', '0.0/token', '0.0/position']
    """

    kind = "disentangled"
    closed_form_is_clamped = True

    def __init__(
        self,
        vocab_size: int,
        sequence_length: int,
        heads: Sequence[int] = (1, 1),
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        """Build the wiring, with A = 0 and W = 0.

        Raises:
            ValueError: no layer, or a layer without heads.
        """
        if not heads or min(heads) < 1:
            raise ValueError(f"heads is {list(heads)}: every layer needs at least one head")
        config = disentangled_config(vocab_size, sequence_length, heads, device=str(device))
        self._take(build_hooked(config), heads)
        self._reset()

    @property
    def parameters_by_name(self) -> dict[str, torch.nn.Parameter]:
        """The attention matrices by layer as "A1", "A2", ..., the readout as "W"."""
        blocks = self.hooked.blocks
        named = {f"A{layer + 1}": block.attn.W_Q for layer, block in enumerate(blocks)}
        return named | {"W": self.hooked.unembed.W_U}

    def A(self, layer: int) -> Float[Tensor, "head width width"]:
        """The A of every used head of a layer, a view of the parameter: [head, query, key]."""
        width = self.widths[layer]
        weight: Tensor = self.hooked.blocks[layer].attn.W_Q
        return weight[: self.heads[layer], :width, :width]

    @property
    def W(self) -> Float[Tensor, "width vocab"]:
        """The readout, the parameter itself."""
        weight: Tensor = self.hooked.unembed.W_U
        return weight

    def streams(self, layer: int) -> dict[str, slice]:
        """The slice of each named stream in a layer's input; `layer = n_layers` for the readout."""
        return dict(self._streams[layer])

    def block(self, layer: int, head: int, query: str, key: str) -> Float[Tensor, "query key"]:
        """One block of a head's A, a view of the parameter.

        Raises:
            KeyError: the layer's input has no stream of this name.
        """
        streams = self._streams[layer]
        return self.A(layer)[head, streams[query], streams[key]]

    def readout(self, stream: str) -> Float[Tensor, "width vocab"]:
        """One block of W, a view of the parameter.

        Raises:
            KeyError: the readout has no stream of this name.
        """
        return self.W[self._streams[-1][stream]]

    @torch.no_grad()
    def initialise(self, *, scale: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Draw every A from a normal distribution with standard deviation `scale`; set W to 0.

        The paper uses `scale` = 0. Several heads in a layer need a positive scale, because equal
        heads stay equal.
        """
        self.W.zero_()
        for layer in range(len(self.heads)):
            block = self.A(layer)
            block.zero_()
            if scale:
                if generator is None:
                    raise ValueError("a scale above 0 needs a generator")
                draws = torch.randn(block.shape, generator=generator, device=generator.device)
                block.copy_(scale * draws)

    @torch.no_grad()
    def set_ideal(
        self, graph: CausalGraph, *, strength: float = 50.0, beta: float = 5.0, gain: float = 5.0
    ) -> None:
        """The paper's hand-built solution for a graph, with two layers.

        Head l of layer 0 attends from each position to its l-th parent, or uniformly if there is
        none. Layer 1 compares the copied tokens with the query's context: the query's token for
        single parents; for several, the tokens of the query's parents, which the last position's
        row of layer 0 copies. W returns the token that layer 1 attends to.

        Args:
            graph: single-parent graph, or a graph with the query's parents.
            strength: layer 0's score of a parent; other keys have 0.
            beta: layer 1's score of a match, per parent.
            gain: the readout's scale, `logits = gain * share of attention on each token`.

        Raises:
            ValueError: not two layers, too few heads, or the graph's sequence length differs.
        """
        needed = max(1, graph.max_parents)
        if len(self.heads) != 2 or self.heads[0] < needed:
            raise ValueError(
                f"heads is {list(self.heads)}: the solution needs 2 layers and "
                f"{needed} heads in the first"
            )
        self._check_length(graph)
        self.initialise()
        several = graph.query_parents is not None
        for position, row in enumerate(graph.parents):
            if several and position == self.sequence_length - 1:
                row = graph.query_parents or ()
            for head, parent in enumerate(row):
                self.block(0, head, "position", "position")[position, parent] = strength
        eye = torch.eye(self.vocab_size)
        for head in range(needed):
            copied = f"0.{head}/token"
            self.block(1, 0, copied if several else "token", copied).copy_(beta * eye)
        if several:  # the last position copies the query's parents, so it is not an example
            keys = self.block(1, 0, "position", "position")
            keys[-1, -1] = -(needed * beta + 20)  # far below a key without a match
        self.readout("1.0/token").copy_(gain * eye)

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch vocab"]:
        """The predicted distribution in closed form, differentiable in every A and in W."""
        return self.logits(tokens).softmax(-1)

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch vocab"]:
        """Logits of the last position in closed form."""
        one_hot = F.one_hot(tokens, self.vocab_size).to(self.W.dtype)
        parts = [one_hot, self._positions.expand(len(tokens), -1, -1)]
        last = len(self.heads) - 1
        for layer in range(last):
            scores = self._first_scores(one_hot) if layer == 0 else self._scores(layer, parts)
            patterns = self._held(layer, scores.masked_fill(self._future, -torch.inf).softmax(-1))
            parts += [_times(pattern, part) for pattern in patterns.unbind(1) for part in parts]
        # Only the last position's row of the last layer matters; it sees every key, so no mask.
        # Computed stream by stream to skip products with the identity (see `_times`).
        final = torch.cat([part[:, -1] for part in parts], dim=-1)
        queries = torch.einsum("bq,hqk->bhk", final, self.A(last))
        total: Any = sum(
            _times(query, part.mT)
            for query, part in zip(
                queries.split([p.shape[-1] for p in parts], -1), parts, strict=True
            )
        )
        pattern = self._held_last_row(last, total.softmax(-1))
        attended = torch.cat([_times(pattern, part) for part in parts], dim=-1)
        return torch.cat([final, attended.flatten(1)], dim=-1) @ self.W

    def _trained_blocks(self) -> list[Tensor]:
        return [*(self.A(layer) for layer in range(len(self.heads))), self.W]

    def _first_scores(self, one_hot: Tensor) -> Tensor:
        """Layer 0's scores [batch head query key], from look-ups in the rows and columns of A."""
        s, a = self.vocab_size, self.A(0)
        by_token, by_position = a[:, :s], a[:, s:]
        rows = torch.einsum("bqs,hsk->bhqk", one_hot, by_token) + by_position
        return rows[..., :s] @ one_hot.unsqueeze(1).mT + rows[..., s:]

    def _scores(self, layer: int, parts: list[Tensor]) -> Tensor:
        stream = torch.cat(parts, dim=-1).unsqueeze(1)
        return stream @ self.A(layer) @ stream.mT

    def _saved(self) -> dict[str, Any]:
        return {"heads": list(self.heads)}

    def _adopt(self, hooked: HookedTransformer, saved: Mapping[str, Any]) -> None:
        heads, cfg = saved.get("heads"), hooked.cfg
        # Widths grow exponentially with the heads: limit these first.
        if (
            not isinstance(heads, list)
            or len(heads) != cfg.n_layers
            or any(type(n) is not int or not 0 < n <= cfg.n_heads for n in heads)
            or stream_widths(cfg.d_vocab, cfg.n_ctx, heads)[-2:] != [cfg.d_head, cfg.d_model]
        ):
            raise ValueError("the weights are not a disentangled model's")
        self._take(hooked, heads)
        self._check_config(disentangled_config(cfg.d_vocab, cfg.n_ctx, heads))
        self._check_wiring()

    def _take(self, hooked: HookedTransformer, heads: Sequence[int]) -> None:
        self.hooked = hooked
        self.heads = tuple(heads)
        s, t, device = self.vocab_size, self.sequence_length, hooked.embed.W_E.device
        self.widths = stream_widths(s, t, heads)
        self._streams = [_streams(s, t, heads[:layer]) for layer in range(len(heads) + 1)]
        self._future = torch.ones(t, t, dtype=torch.bool, device=device).triu(1)
        self._positions = torch.eye(t, device=device)

    def _wire(self) -> None:
        s = self.vocab_size
        hooked = self.hooked
        hooked.embed.W_E[:, :s] = torch.eye(s)
        hooked.pos_embed.W_pos[:, s : self.widths[0]] = torch.eye(self.sequence_length)
        for layer, (n_heads, width) in enumerate(zip(self.heads, self.widths[:-1], strict=True)):
            attention, eye = hooked.blocks[layer].attn, torch.eye(width)
            for head in range(n_heads):
                start = width * (1 + head)
                attention.W_K[head, :width, :width] = eye
                attention.W_V[head, :width, :width] = eye
                attention.W_O[head, :width, start : start + width] = eye


def _times(left: Tensor, part: Tensor) -> Tensor:
    # Stride 0 marks the position stream: the identity matrix, expanded over the batch.
    return left if part.stride(0) == 0 else left @ part


def _streams(vocab_size: int, sequence_length: int, heads: Sequence[int]) -> dict[str, slice]:
    streams = {
        "token": slice(0, vocab_size),
        "position": slice(vocab_size, vocab_size + sequence_length),
    }
    for layer, n_heads in enumerate(heads):
        width = max(columns.stop for columns in streams.values())
        streams |= {
            f"{layer}.{head}/{name}": slice(
                width * (1 + head) + columns.start, width * (1 + head) + columns.stop
            )
            for head in range(n_heads)
            for name, columns in list(streams.items())
        }
    return streams
