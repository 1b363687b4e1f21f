"""Copying: whether a head raises the logits of the tokens it attends to, from weights alone."""

from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from probes.reading.errors import ProbeError
from probes.reading.hook_names import Layers, layers_with


def copying_score(model: nn.Module, layer: int) -> Float[Tensor, "head"]:
    """Whether attending to a token raises that token's own logit, for every head of a layer.

    `Σ_i λ_i / Σ_i |λ_i|` over the eigenvalues of the full OV circuit `W_E W_V W_O W_U` (vocab ×
    vocab). The function decomposes `W_O W_U W_E W_V` (d_head × d_head), which has the same non-zero
    eigenvalues. The numerator is its trace, which is real. The function reads the weights as the
    model holds them: it includes LayerNorm only if the model has folded it into the weights.

    Args:
        model: a HookedTransformer or TransformerBridge.
        layer: the layer of the heads.

    Returns:
        One score per head in [-1, 1]: 1 copies, -1 suppresses; 0 for a circuit of zeros.

    Raises:
        ProbeError: the layer does not exist or has no attention, or the model reads and writes
            different vocabularies.

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

    >>> import warnings
    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 1, "d_model": 3, "d_head": 3, "n_ctx": 2, "d_vocab": 3}
    >>> with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    ...     model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> names = ("embed.W_E", "blocks.0.attn.W_V", "blocks.0.attn.W_O", "unembed.W_U")
    >>> identity = {n: torch.eye(3).expand_as(model.state_dict()[n]) for n in names}
    >>> _ = model.load_state_dict(identity, strict=False)
    >>> copying_score(model, 0)
    tensor([1.])
    """
    return copying_scores(model, (layer,))[0]


def copying_scores(
    model: nn.Module, layers: Layers = None, *, max_tokens: int | None = None
) -> Float[Tensor, "layer head"]:
    """`copying_score` of several layers, which share the d_model × d_model product `W_U W_E`.

    That product costs 2 · vocab · d_model² operations.

    Args:
        model: a HookedTransformer or TransformerBridge.
        layers: one layer, several, or None for every layer that has attention.
        max_tokens: use at most this many tokens, evenly spaced in the vocabulary; None for all.

    Returns:
        One score per head in [-1, 1].

    Raises:
        ValueError: `max_tokens` is not positive.
        ProbeError: as `copying_score`.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    weights: Any = model
    with torch.no_grad():
        chosen = layers_with(model, "pattern", layers)
        embed, unembed = weights.W_E, weights.W_U
        if embed.shape[0] != unembed.shape[1]:
            raise ProbeError(
                f"copying needs one vocabulary: {embed.shape[0]} tokens go in, "
                f"{unembed.shape[1]} come out"
            )
        stride = 1 if max_tokens is None else -(-embed.shape[0] // max_tokens)
        # In chunks: a float32 copy of the whole embedding may not fit into memory.
        outs, ins = unembed[:, ::stride].split(2048, dim=1), embed[::stride].split(2048)
        tokens = _wide(outs[0]) @ _wide(ins[0])
        for out, into in zip(outs[1:], ins[1:], strict=True):
            tokens += _wide(out) @ _wide(into)
        return torch.stack([_copying(weights.blocks[layer].attn, tokens) for layer in chosen])


def _copying(attention: Any, tokens: Float[Tensor, "d_model d_model"]) -> Float[Tensor, "head"]:
    write = _wide(attention.W_O)
    read = _wide(attention.W_V)
    # Grouped-query attention: several heads share one W_V.
    read = read.repeat_interleave(write.shape[0] // read.shape[0], dim=0)
    circuit = einsum(
        write,
        tokens.to(write.device),
        read,
        "head i model, model back, head back j -> head i j",
    )
    return _positive_share(circuit).to(tokens.device)


def _positive_share(circuit: Float[Tensor, "head d_head d_head"]) -> Float[Tensor, "head"]:
    """`trace / Σ|λ|` of each matrix, 0 where every eigenvalue is 0."""
    trace = circuit.diagonal(dim1=-2, dim2=-1).sum(-1)
    total = torch.linalg.eigvals(circuit).abs().sum(-1)
    # The eigenvalues of a nilpotent circuit are 0, but are computed as rounding noise.
    noise = torch.finfo(circuit.dtype).eps * torch.linalg.matrix_norm(circuit)
    share = torch.where(total > noise, trace / total, 0.0)
    return share.clamp(-1.0, 1.0)


def _wide(weight: Tensor) -> Tensor:
    """At least float32: eigenvalues are not defined for half precision."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
