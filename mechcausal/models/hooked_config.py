"""The config of `mechcausal.models.hooked_transformer`: HookedTransformerConfig's fields, for 4.x.

TransformerLens 4.0 removed HookedTransformerConfig. This one has the same fields with the same
defaults, so that a saved config means the same model under 3.9 and under 4.x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda values: F.gelu(values, approximate="tanh"),
    "silu": F.silu,
}
"""The MLPs' activation functions by their names in `act_fn`."""

_ALLOWED = {
    "positional_embedding_type": ("standard", "shortformer"),
    "normalization_type": (None, "LN"),
    "attention_dir": ("causal", "bidirectional"),
    "init_mode": ("gpt2",),
}


@dataclass(kw_only=True)
class _NotComputed:
    """The fields of what only TransformerLens's own HookedTransformer computes."""

    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_attn_in: bool = False
    use_hook_mlp_in: bool = False
    use_hook_tokens: bool = False
    n_devices: int = 1
    load_in_4bit: bool = False
    quantization_method: str | None = None
    from_checkpoint: bool = False
    checkpoint_index: int | None = None
    checkpoint_label_type: str | None = None
    checkpoint_value: int | None = None
    original_architecture: str | None = None
    n_key_value_heads: int | None = None
    ungroup_grouped_query_attention: bool = False
    use_local_attn: bool = False
    window_size: int | None = None
    attn_types: list[Any] | None = None
    use_qk_norm: bool = False
    clip_qkv: float | None = None
    use_logn_attn: bool = False
    train_seq_length: int | None = None
    use_attention_sinks: bool = False
    scale_attn_by_inverse_layer_idx: bool = False
    attn_scores_soft_cap: float = -1.0
    output_logits_soft_cap: float = -1.0
    parallel_attn_mlp: bool = False
    gated_mlp: bool = False
    num_experts: int | None = None
    experts_per_token: int | None = None
    norm_topk_prob: bool = False
    uses_rms_norm: bool = False
    layer_norm_folding: bool = False
    final_rms: bool = False
    post_embedding_ln: bool = False
    use_normalization_before_and_after: bool = False
    tie_word_embeddings: bool = False
    decoder_start_token_id: int | None = None
    relative_attention_max_distance: int | None = None
    relative_attention_num_buckets: int | None = None
    rotary_dim: int | None = None
    rotary_base: float | int = 10000
    rotary_base_local: float | int | None = None
    rotary_scaling_factor: float = 1.0
    rotary_adjacent_pairs: bool = False
    use_dynamic_ntk_rope: bool = False
    use_NTK_by_parts_rope: bool = False  # noqa: N815
    NTK_by_parts_low_freq_factor: float = 1.0
    NTK_by_parts_high_freq_factor: float = 4.0
    NTK_by_parts_factor: float = 8.0
    NTK_original_ctx_len: int = 8192
    use_yarn_rope: bool = False
    yarn_factor: float = 1.0
    yarn_attention_factor: float = 1.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_truncate: bool = True
    yarn_global_attn_only: bool = False


@dataclass(kw_only=True)
class HookedTransformerConfig(_NotComputed):
    """Describes a transformer, by the names of TransformerLens's HookedTransformerConfig.

    Values of None and -1 are derived from the others when the config is made.

    Raises:
        ValueError: a field asks for something that this HookedTransformer does not compute.

    Example:
        >>> sizes = {"n_layers": 2, "n_ctx": 8, "d_model": 16, "d_head": 4, "d_vocab": 5}
        >>> config = HookedTransformerConfig(**sizes, attn_only=True, device="cpu")
        >>> config.n_heads, config.attn_scale, config.n_params
        (4, 2.0, 2048)
    """

    n_layers: int
    d_model: int
    n_ctx: int
    d_head: int
    n_heads: int = -1
    d_mlp: int | None = None
    act_fn: str | None = "relu"
    d_vocab: int = -1
    d_vocab_out: int = -1
    attn_only: bool = False
    attention_dir: str = "causal"
    positional_embedding_type: str = "standard"
    normalization_type: str | None = "LN"
    eps: float = 1e-5
    use_attn_scale: bool = True
    attn_scale: float = -1.0
    init_weights: bool = True
    init_mode: str = "gpt2"
    initializer_range: float = -1.0
    seed: int | None = None
    dtype: torch.dtype = torch.float32
    device: str | None = None
    n_params: int | None = None
    model_name: str = "custom"
    tokenizer_name: str | None = None
    tokenizer_prepends_bos: bool | None = None
    default_prepend_bos: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check the fields and derive those that are None or -1."""
        for field in fields(_NotComputed):
            self._check(field.name, (field.default,))
        for name, allowed in _ALLOWED.items():
            self._check(name, allowed)
        if not self.attn_only:
            self._check("act_fn", tuple(ACTIVATIONS))
        if self.d_vocab < 1:
            raise ValueError(f"d_vocab is {self.d_vocab}: a model has at least 1 token")
        if self.n_heads == -1:
            if self.d_model % self.d_head:
                raise ValueError(f"d_model is {self.d_model}, not a multiple of {self.d_head}")
            self.n_heads = self.d_model // self.d_head
        if self.d_mlp is None:
            self.d_mlp = 4 * self.d_model
        if self.d_vocab_out == -1:
            self.d_vocab_out = self.d_vocab
        if self.initializer_range < 0:
            self.initializer_range = 0.8 / math.sqrt(self.d_model)
        if self.use_attn_scale and self.attn_scale == -1.0:
            self.attn_scale = math.sqrt(self.d_head)
        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        weights = 4 * self.d_model * self.d_head * self.n_heads
        if not self.attn_only:
            weights += 2 * self.d_model * self.d_mlp
        self.n_params = self.n_layers * weights

    def to_dict(self) -> dict[str, Any]:
        """Every field by name."""
        return dict(vars(self))

    def _check(self, name: str, allowed: tuple[Any, ...]) -> None:
        if (value := getattr(self, name)) not in allowed:
            raise ValueError(
                f"{name} is {value!r}, which needs transformer-lens below 4: "
                f"4.x has no HookedTransformer, and mechcausal's own computes {allowed}"
            )
