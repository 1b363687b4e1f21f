"""Which positions of a batch hold text, and which are padding."""

from typing import Any

from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn


def real_positions(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Shaped[Tensor, "batch mask_pos"] | None = None,
) -> Bool[Tensor, "batch pos"] | None:
    """True at text, False at padding; None if no position is padding.

    With a mask, padding is where the mask is 0. Without one, it is the runs of the tokenizer's PAD
    token at both ends of a sequence. If PAD is also the BOS, and the model expects a BOS, the last
    token of a leading run is the BOS and counts as text.

    Raises:
        ValueError: the mask and the tokens differ in shape.

    >>> import torch
    >>> mask = torch.tensor([[0, 1, 1]])
    >>> real_positions(nn.Identity(), torch.tensor([[4, 4, 5]]), mask)
    tensor([[False,  True,  True]])
    """
    if attention_mask is not None:
        if attention_mask.shape != tokens.shape:
            raise ValueError(
                f"the attention mask has shape {tuple(attention_mask.shape)}, "
                f"the tokens {tuple(tokens.shape)}"
            )
        real = attention_mask.to(tokens.device).bool()
    else:
        tokenizer: Any = getattr(model, "tokenizer", None)
        pad = getattr(tokenizer, "pad_token_id", None)
        if not isinstance(pad, int):
            return None
        config: Any = getattr(model, "cfg", None)
        has_bos = getattr(tokenizer, "bos_token_id", None) == pad and getattr(
            config, "default_prepend_bos", True
        )
        real = _inside_padding(tokens, pad, has_bos=has_bos)
    return None if bool(real.all()) else real


def _inside_padding(tokens: Tensor, pad: int, *, has_bos: bool) -> Tensor:
    """True from the first to the last token that is not `pad`, with the BOS before the first."""
    is_text = tokens != pad
    after_start = is_text.cumsum(-1) > 0
    if has_bos:
        after_start[:, :-1] |= after_start[:, 1:]
    before_end = is_text.flip(-1).cumsum(-1).flip(-1) > 0
    return after_start & before_end


def pairs_of(real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch query key"]:
    """True where query and key both hold text."""
    return real.unsqueeze(2) & real.unsqueeze(1)
