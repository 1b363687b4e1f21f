"""The path from the residual stream to the logits, with the scale of the final norm held fixed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.reading.errors import ProbeError

_TOLERANCE = 1e-3


@dataclass(frozen=True)
class FinalNorm:
    """The final norm `x ↦ w (x - m) / s + b`; m is the mean of x over d_model, or 0 (RMSNorm).

    Attributes:
        weight: w.
        bias: b.
        centres: whether the norm subtracts the mean.
    """

    weight: Float[Tensor, "d_model"]
    bias: Float[Tensor, "d_model"]
    centres: bool

    def centred(self, stream: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """`x - m`."""
        return stream - stream.mean(-1, keepdim=True) if self.centres else stream


def final_norm(model: nn.Module) -> FinalNorm | None:
    """The model's final norm, measured on three vectors; None if it has none.

    Raises:
        ProbeError: it is neither a LayerNorm nor an RMSNorm.
    """
    norm: Any = getattr(model, "ln_final", None)
    if not isinstance(norm, nn.Module) or isinstance(norm, nn.Identity):
        return None
    parameter = next(model.parameters())
    config: Any = model.cfg
    vector = _without_mean(int(config.d_model)).to(parameter)
    ahead, back = _call(norm, vector), _call(norm, -vector)
    shifted = _call(norm, vector + 1)
    weight = (ahead - back) / (2 * vector)
    scale = max(1.0, ahead.abs().max().item())
    centres = bool((shifted - ahead).abs().max() < _TOLERANCE * scale)
    measured = FinalNorm(weight, (ahead + back) / 2, centres)
    if not centres:
        # RMSNorm of `vector + 1`: its mean square is 2.
        expected = weight * (vector + 1) / 2**0.5 + measured.bias
        if not (shifted - expected).abs().max() < _TOLERANCE * scale:
            raise ProbeError(
                f"{type(model).__name__} ends with a {type(norm).__name__} that is neither a "
                "LayerNorm nor an RMSNorm: contributions to its logits are not defined"
            )
    return measured


def logit_directions(
    model: nn.Module,
    norm: FinalNorm | None,
    stream: Float[Tensor, "batch pos d_model"],
    logits: Float[Tensor, "batch pos vocab"],
    targets: Int[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos d_model"]:
    """The vector u of every position for which a part c of the stream adds `c · u` to a logit.

    The logit is that of the target minus the mean over the vocabulary. The scale s of the final
    norm stays that of the full stream. Logits may be the unembedding times a constant.

    Args:
        model: a HookedTransformer or TransformerBridge.
        norm: what `final_norm` gives.
        stream: the residual stream after the last layer.
        logits: the model's logits.
        targets: the token of each position's logit.

    Raises:
        ProbeError: the logits are not the unembedding of the final norm (as with a soft cap).
    """
    wide = torch.promote_types(stream.dtype, torch.float32)
    weights: Any = model
    stream, unembed = stream.to(wide), weights.W_U.detach().to(wide)
    bias = getattr(model, "b_U", None)
    normed, factor = stream, torch.ones_like(stream[..., :1])
    if norm is not None:
        weight, centred = norm.weight.to(wide), norm.centred(stream)
        normed_stream = _call(weights.ln_final, stream.to(logits.dtype)).to(wide)
        slope = weight * centred
        factor = ((normed_stream - norm.bias.to(wide)) * slope).sum(-1, keepdim=True) / (
            slope.square().sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        )
        normed = slope * factor + norm.bias.to(wide)
    raw = normed @ unembed
    if isinstance(bias, Tensor):
        raw = raw + bias.detach().to(wide)
    logits = logits[..., : raw.shape[-1]].to(wide)
    gain = (logits * raw).sum() / raw.square().sum().clamp(min=torch.finfo(wide).tiny)
    rounding = max(_TOLERANCE, 64 * torch.finfo(weights.W_U.dtype).eps)
    if not (gain * raw - logits).abs().max() <= rounding * logits.abs().max():
        raise ProbeError(
            f"the logits of {type(model).__name__} are not its unembedding of the final norm: "
            "contributions to them are not defined"
        )
    directions: Tensor = unembed[:, targets].movedim(0, -1) - unembed.mean(1)
    if norm is not None:
        directions = norm.centred(directions * norm.weight.to(wide)) * factor
    scaled: Tensor = gain * directions
    return scaled


def _without_mean(size: int) -> Tensor:
    """A vector without zeros, of mean 0 and mean square 1.

    >>> vector = _without_mean(5)
    >>> round(vector.mean().item(), 6), round(vector.square().mean().item(), 6)
    (0.0, 1.0)
    """
    vector = torch.ones(size)
    vector[1::2] = -1
    if size % 2:
        vector[-3:] = torch.tensor([1.0, 1.0, -2.0])[-size:]
    return vector / vector.square().mean().sqrt()


def _call(norm: Callable[[Tensor], Any], stream: Tensor) -> Tensor:
    with torch.no_grad():
        values: Tensor = norm(stream if stream.ndim == 3 else stream[None, None])
    return values if stream.ndim == 3 else values[0, 0]
