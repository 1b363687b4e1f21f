"""Which positions of a batch hold text, and which only fill it up to one length."""

from typing import Any

from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn


def real_positions(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Shaped[Tensor, "batch mask_pos"] | None = None,
) -> Bool[Tensor, "batch pos"] | None:
    """True where a sequence holds text; None where nothing says that any position does not.

    With a mask, where it is not 0. Without one, everywhere but in the runs of the tokenizer's PAD
    token at both ends of a sequence; where that is the BOS too, and the model is given one, the
    last of a leading run is the BOS and stays.

    Raises:
        ValueError: the mask has another shape than the tokens.

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
        real = _between_runs(tokens, pad, has_bos=has_bos)
    return None if bool(real.all()) else real


def _between_runs(tokens: Tensor, pad: int, *, has_bos: bool) -> Tensor:
    is_text = tokens != pad
    begun = is_text.cumsum(-1) > 0
    if has_bos:
        # The position before the first token of text.
        begun[:, :-1] |= begun[:, 1:]
    not_over = is_text.flip(-1).cumsum(-1).flip(-1) > 0
    return begun & not_over


def pairs_of(real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch query key"]:
    """True where query and key both hold text."""
    return real.unsqueeze(2) & real.unsqueeze(1)
