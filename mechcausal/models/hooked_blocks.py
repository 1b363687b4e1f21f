"""The parts of `mechcausal.models.hooked_transformer`, with TransformerLens's names.

Names of parameters, buffers and hook points are those of TransformerLens 3.9, and parameters are
registered in its order, in which initial weights are drawn. Tests check annotations at each call
except here, since torch.compile cannot trace those checks.
"""

from typing import no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint

from mechcausal.models.hooked_config import ACTIVATIONS, HookedTransformerConfig


def _empty(config: HookedTransformerConfig, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=config.dtype))


def _zeros(config: HookedTransformerConfig, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=config.dtype))


@no_type_check
class Embed(nn.Module):
    """Token embeddings."""

    def __init__(self, config: HookedTransformerConfig) -> None:
        super().__init__()
        self.W_E = _empty(config, config.d_vocab, config.d_model)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The tokens' rows of W_E."""
        return self.W_E[tokens]


@no_type_check
class PosEmbed(nn.Module):
    """Position embeddings; positions count the tokens that are not padding."""

    def __init__(self, config: HookedTransformerConfig) -> None:
        super().__init__()
        self.W_pos = _empty(config, config.n_ctx, config.d_model)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The positions' rows of W_pos, 0 at padding."""
        batch, length = tokens.shape
        if mask is None:
            return self.W_pos[:length].expand(batch, -1, -1).clone()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return torch.where(mask.unsqueeze(-1), self.W_pos[positions], 0)


@no_type_check
class LayerNorm(nn.Module):
    """LayerNorm with a hook point for its scale, computed in float32 at least."""

    def __init__(self, config: HookedTransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.w = nn.Parameter(torch.ones(config.d_model, dtype=config.dtype))
        self.b = _zeros(config, config.d_model)
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """`(x - mean) / scale * w + b`."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x - x.mean(-1, keepdim=True)
        scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        normalized: Tensor = self.hook_normalized(x / scale)
        return normalized.to(self.w.dtype) * self.w + self.b


@no_type_check
class Attention(nn.Module):
    """An attention layer."""

    mask: Tensor
    IGNORE: Tensor

    def __init__(self, config: HookedTransformerConfig) -> None:
        super().__init__()
        heads, width, d_head = config.n_heads, config.d_model, config.d_head
        self.W_Q = _empty(config, heads, width, d_head)
        self.W_O = _empty(config, heads, d_head, width)
        self.b_Q = _zeros(config, heads, d_head)
        self.b_O = _zeros(config, width)
        self.W_K = _empty(config, heads, width, d_head)
        self.W_V = _empty(config, heads, width, d_head)
        self.b_K = _zeros(config, heads, d_head)
        self.b_V = _zeros(config, heads, d_head)
        # Unused, but a state_dict of TransformerLens has it.
        self.register_buffer("mask", torch.empty((0, 0), dtype=torch.bool))
        self.register_buffer("IGNORE", torch.tensor(-torch.inf))
        self.attn_scale = config.attn_scale if config.use_attn_scale else 1.0
        self.causal = config.attention_dir == "causal"
        self.hook_k, self.hook_q, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_z = HookPoint()
        self.hook_attn_scores = HookPoint()
        self.hook_pattern = HookPoint()

    def forward(
        self,
        query_input: Float[Tensor, "batch pos d_model"],
        key_input: Float[Tensor, "batch pos d_model"],
        value_input: Float[Tensor, "batch pos d_model"],
        mask: Bool[Tensor, "batch pos"] | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """`Σ_heads softmax(q k^T / scale) v W_O + b_O`; like 3.9, only causal layers are masked."""
        q = self.hook_q(self._by_head(query_input, self.W_Q, self.b_Q)).transpose(1, 2)
        k = self.hook_k(self._by_head(key_input, self.W_K, self.b_K)).transpose(1, 2)
        v = self.hook_v(self._by_head(value_input, self.W_V, self.b_V)).transpose(1, 2)
        scores = q @ k.mT / self.attn_scale
        if self.causal:
            past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            seen = past if mask is None else past & mask[:, None, None]
            scores = torch.where(seen, scores, self.IGNORE)
        pattern = F.softmax(self.hook_attn_scores(scores), dim=-1)
        # A query at padding may see no key at all.
        pattern = self.hook_pattern(torch.where(pattern.isnan(), 0, pattern))
        z = self.hook_z((pattern.to(v.dtype) @ v).transpose(1, 2))
        output = self.W_O.flatten(0, 1).T.contiguous()
        return F.linear(z.flatten(2), output, self.b_O)

    @staticmethod
    def _by_head(
        x: Float[Tensor, "batch pos d_model"],
        weight: Float[Tensor, "head d_model d_head"],
        bias: Float[Tensor, "head d_head"],
    ) -> Float[Tensor, "batch pos head d_head"]:
        rows = weight.transpose(1, 2).flatten(0, 1)
        return F.linear(x, rows, bias.flatten()).view(*x.shape[:-1], *bias.shape)


@no_type_check
class MLP(nn.Module):
    """An MLP of one hidden layer."""

    def __init__(self, config: HookedTransformerConfig) -> None:
        super().__init__()
        assert config.d_mlp is not None  # both were set or checked when the config was made
        assert config.act_fn is not None
        self.W_in = _empty(config, config.d_model, config.d_mlp)
        self.b_in = _zeros(config, config.d_mlp)
        self.W_out = _empty(config, config.d_mlp, config.d_model)
        self.b_out = _zeros(config, config.d_model)
        self.act_fn = ACTIVATIONS[config.act_fn]
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """`act(x W_in + b_in) W_out + b_out`."""
        hidden = self.hook_post(self.act_fn(self.hook_pre(x @ self.W_in + self.b_in)))
        output: Tensor = hidden @ self.W_out + self.b_out
        return output


@no_type_check
class Block(nn.Module):
    """An attention layer and, unless the model has none, an MLP."""

    def __init__(self, config: HookedTransformerConfig) -> None:
        super().__init__()
        self.ln1 = _norm(config)
        if not config.attn_only:
            self.ln2 = _norm(config)
        self.attn = Attention(config)
        if not config.attn_only:
            self.mlp = MLP(config)
            self.hook_mlp_out, self.hook_resid_mid = HookPoint(), HookPoint()
        self.attn_only = config.attn_only
        self.hook_attn_out = HookPoint()
        self.hook_resid_pre, self.hook_resid_post = HookPoint(), HookPoint()

    def forward(
        self,
        residual: Float[Tensor, "batch pos d_model"],
        *,
        shortformer_pos_embed: Float[Tensor, "batch pos d_model"] | None = None,
        attention_mask: Bool[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after the block.

        Args:
            residual: the stream before it.
            shortformer_pos_embed: added to the inputs of queries and keys alone.
            attention_mask: False at padding.
        """
        residual = self.hook_resid_pre(residual)
        normalized = self.ln1(residual)
        located = normalized
        if shortformer_pos_embed is not None:
            located = normalized + shortformer_pos_embed
        attended = self.attn(located, located, normalized, attention_mask)
        residual = residual + self.hook_attn_out(attended)
        if not self.attn_only:
            residual = self.hook_resid_mid(residual)
            residual = residual + self.hook_mlp_out(self.mlp(self.ln2(residual)))
        after: Tensor = self.hook_resid_post(residual)
        return after


@no_type_check
class Unembed(nn.Module):
    """From the residual stream to logits."""

    def __init__(self, config: HookedTransformerConfig) -> None:
        super().__init__()
        self.W_U = _empty(config, config.d_model, config.d_vocab_out)
        self.b_U = _zeros(config, config.d_vocab_out)
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos vocab"]:
        """`x W_U + b_U`."""
        logits: Tensor = self.hook_out(F.linear(self.hook_in(x), self.W_U.T.contiguous(), self.b_U))
        return logits


def _norm(config: HookedTransformerConfig) -> nn.Module:
    return nn.Identity() if config.normalization_type is None else LayerNorm(config)
