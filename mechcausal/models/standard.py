"""A standard transformer: a plain HookedTransformer without a closed form.

Embeddings are learned or one-hot; MLPs and LayerNorm are optional. Source of the setting: Nichani,
Damian, Lee, ICML 2024 (arXiv 2402.14735), figure 8.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.models.adapter import HookedTransformer, HookedTransformerConfig, build_hooked
from mechcausal.models.base import GraphModel


def standard_config(
    vocab_size: int,
    sequence_length: int,
    *,
    n_layers: int = 2,
    n_heads: int = 1,
    d_model: int = 64,
    d_mlp: int | None = None,
    layer_norm: bool = False,
    positions: str = "standard",
    attention: str = "causal",
    initial_scale: float = 0.0,
    device: str = "cpu",
) -> HookedTransformerConfig:
    """The HookedTransformerConfig of a standard transformer, heads of d_model / n_heads each.

    Args:
        vocab_size: S.
        sequence_length: longest context T.
        n_layers: attention layers, each followed by an MLP if `d_mlp` is given.
        n_heads: heads per layer.
        d_model: width of the residual stream.
        d_mlp: width of the ReLU MLPs; no MLPs when absent.
        layer_norm: whether LayerNorm precedes every attention layer, MLP and the unembedding.
        positions: "standard", or "shortformer" (positions enter only queries and keys).
        attention: "causal", or "bidirectional" (every position sees all others).
        initial_scale: standard deviation of the initial weights; 0.8 / sqrt(d_model) when 0.
        device: where the model lives.
    """
    return HookedTransformerConfig(
        n_layers=n_layers,
        n_heads=n_heads,
        d_model=d_model,
        d_head=d_model // n_heads,
        d_mlp=d_mlp,
        act_fn="relu",
        attn_only=d_mlp is None,
        n_ctx=sequence_length,
        d_vocab=vocab_size,
        normalization_type="LN" if layer_norm else None,
        positional_embedding_type=positions,
        attention_dir=attention,
        initializer_range=initial_scale
        or -1.0,  # a negative value selects TransformerLens's default
        default_prepend_bos=False,
        device=device,
    )


class StandardTransformer(GraphModel):
    """A standard transformer that predicts the token after the last position.

    Example:
        >>> model = StandardTransformer(standard_config(3, 6, d_model=8, d_mlp=16), seed=0)
        >>> model(torch.tensor([[0, 1, 2, 0, 1, 0]])).sum().round().item()
        1.0
    """

    kind = "standard"
    closed_form_is_clamped = True  # it has none: hooks reach all of it

    def __init__(
        self, config: HookedTransformerConfig, *, seed: int = 0, fixed_embeddings: bool = False
    ) -> None:
        """Build and initialise the model as TransformerLens does (normal weights, zero biases).

        Args:
            config: see `standard_config`.
            seed: of the initial weights.
            fixed_embeddings: use one-hot tokens and positions in disjoint streams, not trained.

        Raises:
            ValueError: the fixed embeddings do not fit into d_model.
        """
        # TransformerLens draws from torch's global generators: restore them afterwards.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            self.hooked: HookedTransformer = build_hooked(config)
        self.heads = (config.n_heads,) * config.n_layers
        self.fixed_embeddings = fixed_embeddings
        self._wire()

    @classmethod
    def around(cls, hooked: HookedTransformer) -> "StandardTransformer":
        """A HookedTransformer of your own; its logits are what it predicts."""
        model = cls.__new__(cls)
        model._adopt(hooked, {})
        return model

    @property
    def parameters_by_name(self) -> dict[str, torch.nn.Parameter]:
        """Every trained parameter, by TransformerLens's name."""
        named = self.hooked.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch vocab"]:
        """Softmax of the last position's logits."""
        return self.probabilities(self.hooked(tokens))

    def probabilities_by_position(
        self, output: Float[Tensor, "batch pos vocab"]
    ) -> Float[Tensor, "batch pos vocab"]:
        """Softmax of every position's logits."""
        return output.softmax(-1)

    def _saved(self) -> dict[str, Any]:
        return {"fixed_embeddings": self.fixed_embeddings}

    def _adopt(self, hooked: HookedTransformer, saved: Mapping[str, Any]) -> None:
        self.hooked = hooked
        self.heads = (hooked.cfg.n_heads,) * hooked.cfg.n_layers
        self.fixed_embeddings = saved.get("fixed_embeddings") is True
        if self.fixed_embeddings:
            self._check_wiring()

    def _trained_blocks(self) -> list[Tensor]:
        fixed = self._embeddings() if self.fixed_embeddings else ()
        return [p for p in self.hooked.parameters() if not any(p is weight for weight in fixed)]

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        return self.hooked.embed.W_E, self.hooked.pos_embed.W_pos

    @torch.no_grad()
    def _wire(self) -> None:
        if not self.fixed_embeddings:
            return
        tokens, positions = self._embeddings()
        s, t, width = self.vocab_size, self.sequence_length, self.hooked.cfg.d_model
        if width < s + t:
            raise ValueError(
                f"d_model is {width}: fixed embeddings of {s} tokens and {t} positions need {s + t}"
            )
        for weight, start, size in ((tokens, 0, s), (positions, s, t)):
            weight.zero_()
            weight[:, start : start + size] = torch.eye(size)
            weight.requires_grad_(False)
