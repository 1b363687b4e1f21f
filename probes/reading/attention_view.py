"""Hand attention patterns to circuitsvis, which shows them in a notebook."""

from collections.abc import Sequence
from typing import Any

from einops import rearrange

from probes.reading.errors import ProbeError
from probes.reading.labelled import LabelledTensor


def attention_view(pattern: LabelledTensor, tokens: Sequence[str]) -> Any:
    """Show attention patterns in a notebook with circuitsvis (extra `mechcausal[circuitsvis]`).

    Args:
        pattern: a reading with the axes query and key, and layer and head where there are several,
            such as `AttentionPattern(reduce="mean")`'s, or one sequence's, `reading.sel(batch=0)`.
        tokens: the text of every position.

    Returns:
        What `circuitsvis.attention.attention_heads` returns; a notebook shows it. Heads are named
        layer.head.

    Raises:
        ValueError: other axes, or another number of tokens.
        ProbeError: circuitsvis is not installed.

    >>> import torch
    >>> from probes import LabelledTensor
    >>> pattern = LabelledTensor("pattern", torch.eye(2), ("query", "key"))
    >>> attention_view(pattern, ["a"])
    Traceback (most recent call last):
    ValueError: 1 tokens for patterns over 2 positions
    """
    if not {"query", "key"} <= set(pattern.axes) <= {"layer", "head", "query", "key"}:
        raise ValueError(
            f"the axes are {pattern.axes}; query and key are needed, layer and head allowed: "
            "choose a sequence with sel(batch=0)"
        )
    size = pattern.shape["key"]
    if not len(tokens) == size == pattern.shape["query"]:
        raise ValueError(f"{len(tokens)} tokens for patterns over {size} positions")
    try:
        from circuitsvis.attention import (  # type: ignore[import-not-found, unused-ignore]
            attention_heads,
        )
    except ImportError:
        raise ProbeError(
            "circuitsvis is not installed: pip install 'mechcausal[circuitsvis]'"
        ) from None
    # A head or a layer that sel() has chosen is no axis any more.
    full, names = pattern.values, []
    for axis, position in (("layer", 0), ("head", 1)):
        if axis not in pattern.axes:
            full = full.unsqueeze(position)
    for layer in pattern.coords.get("layer", range(full.shape[0])):
        for head in pattern.coords.get("head", range(full.shape[1])):
            parts = [
                str(v) for v, axis in ((layer, "layer"), (head, "head")) if axis in pattern.axes
            ]
            names.append(".".join(parts) or "head")
    patterns = rearrange(full.float().cpu(), "layer head query key -> (layer head) query key")
    causal = not patterns.triu(1).any()
    return attention_heads(
        patterns, list(tokens), names, max_value=1.0, min_value=0.0, mask_upper_tri=causal
    )
