"""A HookedTransformer for TransformerLens 4.x, which has removed its own.

It is built on what 4.x supports for models of one's own, HookedRootModule and HookPoint, and
computes what the HookedTransformer of 3.9 computes: the same parameters, initial weights, hook
points and results. Left out are text as input, generation, and hook points that fire only with a
switch in the config (`hook_result`, `hook_attn_in`, ...).
"""

from typing import Any, Literal, NamedTuple, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint

from mechcausal.models.hooked_blocks import Block, Embed, LayerNorm, PosEmbed, Unembed
from mechcausal.models.hooked_config import HookedTransformerConfig

_SINGLE = {"W_E": "embed", "W_pos": "pos_embed", "W_U": "unembed", "b_U": "unembed"}
_STACKED = {f"{kind}_{name}": "attn" for kind in "Wb" for name in "QKVO"} | {
    f"{kind}_{name}": "mlp" for kind in "Wb" for name in ("in", "out")
}


class Output(NamedTuple):
    """What `return_type="both"` returns."""

    logits: Tensor
    loss: Tensor


@no_type_check  # as in hooked_blocks
class HookedTransformer(HookedRootModule):
    """A transformer with TransformerLens's hook points.

    Attributes:
        cfg: its config.
        tokenizer: None; may be set for tools that look up padding or words.

    Example:
        >>> sizes = {"n_layers": 1, "n_ctx": 8, "d_model": 8, "d_head": 4, "d_vocab": 5}
        >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
        >>> logits, cache = model.run_with_cache(torch.tensor([[0, 1, 2]]))
        >>> logits.shape, cache["pattern", 0].shape
        (torch.Size([1, 3, 5]), torch.Size([1, 2, 3, 3]))
    """

    def __init__(
        self, cfg: HookedTransformerConfig | dict[str, Any], *, move_to_device: bool = True
    ) -> None:
        """Build the model and draw its initial weights.

        Args:
            cfg: the config, or its fields.
            move_to_device: whether to move the model to the config's device.
        """
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig(**cfg) if isinstance(cfg, dict) else cfg
        self.tokenizer: Any = None
        self.embed, self.hook_embed = Embed(cfg), HookPoint()
        self.pos_embed, self.hook_pos_embed = PosEmbed(cfg), HookPoint()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        if cfg.normalization_type is not None:
            self.ln_final = LayerNorm(cfg)
        self.unembed = Unembed(cfg)
        if cfg.init_weights:
            self.init_weights()
        if move_to_device:
            self.to(cfg.device)
        self.setup()  # type: ignore[no-untyped-call]

    def init_weights(self) -> None:
        """Draw every weight matrix from N(0, initializer_range²)."""
        if self.cfg.seed is not None:
            torch.manual_seed(self.cfg.seed)
        for name, parameter in self.named_parameters():
            if "W_" in name:
                nn.init.normal_(parameter, std=self.cfg.initializer_range)

    def forward(
        self,
        input: Tensor,
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        loss_per_token: bool = False,
        *,
        attention_mask: Tensor | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
    ) -> Any:
        """Logits, the next-token loss, both, or None, which skips the unembedding.

        Args:
            input: tokens `[batch pos]` or `[pos]`; with `start_at_layer` the residual stream.
            return_type: what to return.
            loss_per_token: the loss of each token after the first instead of their mean, in nats.
            attention_mask: 0 at padding, `[batch pos]`.
            start_at_layer: begin at this layer, with `input` as the residual stream before it.
            stop_at_layer: return the residual stream before this layer.

        Raises:
            ValueError: the mask has another shape than the tokens, or a pass that starts at a layer
                needs tokens: for a loss, or for positions in queries and keys (shortformer).
        """
        mask = None if attention_mask is None else attention_mask.to(self.W_E.device).bool()
        positions = None
        shortformer = self.cfg.positional_embedding_type == "shortformer"
        if start_at_layer is None:
            tokens = torch.atleast_2d(input).to(self.W_E.device)
            if mask is not None and mask.shape != tokens.shape:
                shapes = f"{[*mask.shape]}, tokens {[*tokens.shape]}"
                raise ValueError(f"attention_mask has shape {shapes}")
            residual = self.hook_embed(self.embed(tokens))
            positions = self.hook_pos_embed(self.pos_embed(tokens, mask))
            if not shortformer:
                residual, positions = residual + positions, None
        elif shortformer or return_type in ("loss", "both"):
            raise ValueError(f"start_at_layer is {start_at_layer}: this pass needs tokens")
        else:
            residual = input
        for block in self.blocks[start_at_layer:stop_at_layer]:
            residual = block(residual, shortformer_pos_embed=positions, attention_mask=mask)
        if stop_at_layer is not None:
            return residual
        if self.cfg.normalization_type is not None:
            residual = self.ln_final(residual)
        if return_type is None:
            return None
        logits = self.unembed(residual)
        if return_type == "logits":
            return logits
        loss = self._next_token_loss(logits, tokens, mask, loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def run_with_cache(
        self,
        *args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The output and the activations, an ActivationCache unless a dict is asked for."""
        output, cache = super().run_with_cache(*args, remove_batch_dim=remove_batch_dim, **kwargs)
        if return_cache_object:
            return output, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)
        return output, cache

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or convert the model; its config follows."""
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.cfg.device, self.cfg.dtype = str(self.W_E.device), self.W_E.dtype
        return self

    def __getattr__(self, name: str) -> Any:
        """The embeddings' weights, and each weight of the blocks stacked over layers: W_Q, ..."""
        if name in _SINGLE:
            return getattr(getattr(self, _SINGLE[name]), name)
        if name in _STACKED:
            return torch.stack([getattr(getattr(b, _STACKED[name]), name) for b in self.blocks])
        return super().__getattr__(name)

    @staticmethod
    def _next_token_loss(
        logits: Float[Tensor, "batch pos vocab"],
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"] | None,
        per_token: bool,
    ) -> Tensor:
        losses = F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")
        if mask is None:
            return losses if per_token else losses.mean()
        both = mask[:, :-1] & mask[:, 1:]
        losses = torch.where(both, losses, 0)
        return losses if per_token else losses.sum() / both.sum()
