"""Read induction, previous-token and duplicate-token attention during a forward pass."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from probes import hook_names
from probes.attach import ForwardHook
from probes.errors import ProbeError
from probes.hook_names import Layers
from probes.labelled import LabelledTensor
from probes.records import Concatenated, LayerProbe
from probes.scores import (
    duplicate_token_mask,
    mean_weights,
    prefix_matching_mask,
    previous_token_mask,
    weighted_attention,
)

KeyMask: TypeAlias = Callable[[Tensor], Tensor]
"""From tokens `[batch pos]` to the keys that count, `[batch query key]` or `[query key]`."""


class _MaskedAttention(LayerProbe[Concatenated]):
    """Attention mass on one or several sets of keys; patterns themselves are not kept."""

    def __init__(self, layers: Layers, masks: Mapping[str, KeyMask]) -> None:
        super().__init__(layers, Concatenated)
        self._masks = dict(masks)
        self._weights: Tensor | None = None

    def hooks(self, model: nn.Module) -> Mapping[str, ForwardHook]:
        """Take the tokens where the model embeds them, then the pattern of every chosen layer.

        The tokens are those the model really saw: with the BOS that it put in front of a text.
        """
        hooks: dict[str, ForwardHook] = {hook_names.TOKENS: self._at_tokens}
        for layer in self._layers(model):
            hooks[hook_names.pattern(layer)] = partial(self._at_pattern, layer)
        return hooks

    def _at_tokens(self, tokens: Tensor) -> None:
        batch = len(tokens)
        masks = [mask(tokens).expand(batch, -1, -1) for mask in self._masks.values()]
        self._weights = mean_weights(torch.stack(masks, dim=1))

    def _at_pattern(self, layer: int, pattern: Tensor) -> None:
        if self._weights is None:
            raise ProbeError(f"{type(self).__name__} saw attention before any tokens")
        weights = self._weights.to(pattern.device)
        if weights.shape[0] != pattern.shape[0] or weights.shape[2:] != pattern.shape[2:]:
            raise ProbeError(
                f"{type(self).__name__}: keys chosen for (query, key) {tuple(weights.shape[2:])} "
                f"and batch {weights.shape[0]}, but layer {layer} attends with shape "
                f"{tuple(pattern.shape)} (batch, head, query, key); score whole sequences, no cache"
            )
        self._records[layer].add(weighted_attention(pattern, weights))

    def _seen(self) -> str:
        return "forward pass"

    def reset(self) -> None:
        """Forget every pass seen so far."""
        super().reset()
        self._weights = None

    def _scores(self) -> tuple[Tensor, tuple[int, ...]]:
        """Attention mass `[layer batch score head]`, and the layers."""
        records = self._complete_records()
        values = {layer: record.values() for layer, record in records.items()}
        return self._stack(values), tuple(records)


class InductionScores(_MaskedAttention):
    """Prefix-matching, previous-token and duplicate-token score of every head.

    The reading has axes `("score", "layer", "batch", "head")`; `score` is labelled
    `prefix_matching`, `previous_token`, `duplicate_token`, which are the functions of the same
    name in `probes.scores`. Several batches, also of different lengths, follow one another along
    `batch`; `reading().mean("batch")` and `.stderr("batch")` summarise them. A sequence in which
    no token recurs is NaN in the first and the last. Only the scores are kept.

    Args:
        layers: one layer, several, or None for every layer that has attention.
    """

    def __init__(self, layers: Layers = None) -> None:
        super().__init__(
            layers,
            {
                "prefix_matching": prefix_matching_mask,
                "previous_token": previous_token_mask,
                "duplicate_token": duplicate_token_mask,
            },
        )

    def reading(self) -> LabelledTensor:
        """Shares of attention in [0, 1] (NaN: no query of the sequence qualifies).

        Raises:
            ProbeError: no forward pass was seen.
        """
        values, layers = self._scores()
        return LabelledTensor(
            "induction_scores",
            values.permute(2, 0, 1, 3),
            ("score", "layer", "batch", "head"),
            {"score": tuple(self._masks), "layer": layers},
        )


class AttentionTo(_MaskedAttention):
    """Attention mass on keys of your choice, as `probes.scores.attention_to`.

    The reading has axes `("layer", "batch", "head")`.

    Args:
        layers: one layer, several, or None for every layer that has attention.
        mask: True where attention counts, `[query key]` for every sequence or
            `[batch query key]`; or a function from the tokens `[batch pos]` to such a mask.
    """

    def __init__(self, layers: Layers, mask: Tensor | KeyMask) -> None:
        super().__init__(layers, {"mask": (lambda _: mask) if isinstance(mask, Tensor) else mask})

    def reading(self) -> LabelledTensor:
        """Shares of attention in [0, 1] (NaN: the mask of the sequence is all False).

        Raises:
            ProbeError: no forward pass was seen.
        """
        values, layers = self._scores()
        return LabelledTensor(
            "attention_to", values[:, :, 0], ("layer", "batch", "head"), {"layer": layers}
        )
