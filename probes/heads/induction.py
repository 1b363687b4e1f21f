"""Read induction, previous-token and duplicate-token attention during a forward pass."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from probes.heads.scores import SCORE_MASKS, mean_weights, weighted_attention
from probes.reading.attach import ForwardHook
from probes.reading.errors import ProbeError
from probes.reading.hook_names import ATTENTION_MASK, TOKENS, Layers, hook_name
from probes.reading.labelled import LabelledTensor
from probes.reading.padding import pairs_of, real_positions
from probes.reading.records import Concatenated, LayerProbe

KeyMask: TypeAlias = Callable[[Tensor], Tensor]
"""Maps tokens `[batch pos]` to the keys that count, `[batch query key]` or `[query key]`."""

_MaskOfText: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
"""Maps tokens and the positions of text, or None for all, to the keys that count."""


class _MaskedAttention(LayerProbe[Concatenated]):
    """Attention mass on one or several sets of keys; does not keep the patterns."""

    def __init__(
        self,
        layers: Layers,
        masks: Mapping[str, _MaskOfText],
        attention_mask: Shaped[Tensor, "batch pos"] | None,
    ) -> None:
        super().__init__(layers, Concatenated)
        self._masks = dict(masks)
        self._attention_mask = attention_mask
        self._forget_pass()

    def hooks(self, model: nn.Module) -> Mapping[str, ForwardHook]:
        """Hooks on the embedding's tokens, the attention mask, and every chosen layer's pattern.

        The embedding's tokens include the BOS that the model prepends to a text.
        """
        layers = self._layers(model)
        hooks: dict[str, ForwardHook] = {
            TOKENS: partial(self._at_tokens, model, layers),
            ATTENTION_MASK: self._at_mask,
        }
        for layer in layers:
            hooks[hook_name("pattern", layer)] = partial(self._at_pattern, layer)
        return hooks

    def begin_pass(self) -> None:
        """Forget the tokens of the last pass: this pass may start after the embedding."""
        self._forget_pass()

    def _forget_pass(self) -> None:
        self._tokens: Tensor | None = None
        self._given_mask: Tensor | None = None
        self._real: Tensor | None = None
        self._weights: Tensor | None = None
        self._unread: set[int] = set()

    def _at_mask(self, mask: Tensor) -> None:
        self._given_mask = None if bool(mask.all()) else mask.bool()

    def _at_tokens(self, model: nn.Module, layers: tuple[int, ...], tokens: Tensor) -> None:
        self._tokens, self._weights, self._unread = tokens, None, set(layers)
        try:
            self._real = real_positions(model, tokens, self._attention_mask)
        except ValueError as error:
            raise ProbeError(f"{type(self).__name__}: {error}") from None

    def _weights_of_pass(self) -> Tensor:
        """The weight of every attention entry in every score, `[batch score query key]`."""
        assert self._tokens is not None
        tokens, real = self._tokens, self._real
        if self._attention_mask is None and self._given_mask is not None:
            unmasked = self._given_mask.to(tokens.device)[:, -tokens.shape[1] :]
            real = unmasked if real is None else real & unmasked
        masks = [mask(tokens, real).expand(len(tokens), -1, -1) for mask in self._masks.values()]
        if real is not None:
            pairs = pairs_of(real)
            # `_at_pattern` rejects a mask of another shape, since it knows the right one.
            masks = [mask & pairs if mask.shape == pairs.shape else mask for mask in masks]
        return mean_weights(torch.stack(masks, dim=1))

    def _at_pattern(self, layer: int, pattern: Tensor) -> None:
        # Each layer may use the tokens once: `begin_pass` does not run under `run_with_hooks`, so a
        # pass that starts after the embedding would reuse the tokens of the last pass.
        if layer not in self._unread:
            raise ProbeError(f"{type(self).__name__} got an attention pattern before any tokens")
        self._unread.discard(layer)
        if self._weights is None:
            self._weights = self._weights_of_pass()
        weights = self._weights.to(pattern.device)
        if weights.shape[0] != pattern.shape[0] or weights.shape[2:] != pattern.shape[2:]:
            raise ProbeError(
                f"{type(self).__name__}: the mask has (query, key) {tuple(weights.shape[2:])} and "
                f"batch {weights.shape[0]}, but the pattern of layer {layer} has shape "
                f"{tuple(pattern.shape)} (batch, head, query, key); run whole sequences, no cache"
            )
        self._records[layer].add(weighted_attention(pattern, weights))

    def reset(self) -> None:
        """Forget every pass seen so far."""
        super().reset()
        self._forget_pass()

    def _scores(self) -> tuple[Tensor, tuple[int, ...]]:
        """Attention mass `[layer batch score head]`, and the layers."""
        records = self._complete_records()
        values = {layer: record.values() for layer, record in records.items()}
        return self._stack(values), tuple(records)


class InductionScores(_MaskedAttention):
    """Prefix-matching, previous-token and duplicate-token score of every head.

    The reading has axes `("score", "layer", "batch", "head")`; the labels of `score` are
    `prefix_matching`, `previous_token` and `duplicate_token`, for the functions
    `prefix_matching_score` etc. in `probes.heads.scores`. Several batches, also of different
    lengths, are concatenated along `batch`; `reading().mean("batch")` and `.stderr("batch")`
    summarise them. `prefix_matching` and `duplicate_token` are NaN for a sequence in which no
    token recurs. The probe keeps only the scores.

    Padding does not count: positions where the attention mask of the pass is 0, and, if the model
    has a tokenizer, runs of its PAD token at both ends of a sequence (`padding.real_positions`).

    Args:
        layers: one layer, several, or None for every layer that has attention.
        attention_mask: 0 at padding, 1 at text, for every pass; replaces both rules.
    """

    def __init__(
        self, layers: Layers = None, *, attention_mask: Shaped[Tensor, "batch pos"] | None = None
    ) -> None:
        super().__init__(layers, SCORE_MASKS, attention_mask)

    def reading(self) -> LabelledTensor:
        """Shares of attention in [0, 1] (NaN: no query of the sequence qualifies).

        Raises:
            ProbeError: there was no forward pass yet.
        """
        values, layers = self._scores()
        return LabelledTensor(
            "induction_scores",
            values.permute(2, 0, 1, 3),
            ("score", "layer", "batch", "head"),
            {"score": tuple(self._masks), "layer": layers},
        )


class AttentionTo(_MaskedAttention):
    """Attention mass on the keys of a mask, as computed by `probes.heads.scores.attention_to`.

    The reading has axes `("layer", "batch", "head")`. Padding does not count, as in
    `InductionScores`.

    Args:
        layers: one layer, several, or None for every layer that has attention.
        mask: True where attention counts, `[query key]` for every sequence or
            `[batch query key]`; or a function from the tokens `[batch pos]` to such a mask.
        attention_mask: 0 at padding, 1 at text, for every pass; see `InductionScores`.
    """

    def __init__(
        self,
        layers: Layers,
        mask: Tensor | KeyMask,
        *,
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    ) -> None:
        def keys(tokens: Tensor, real: Tensor | None) -> Tensor:
            return mask if isinstance(mask, Tensor) else mask(tokens)

        super().__init__(layers, {"mask": keys}, attention_mask)

    def reading(self) -> LabelledTensor:
        """Shares of attention in [0, 1] (NaN: the mask of the sequence is all False).

        Raises:
            ProbeError: there was no forward pass yet.
        """
        values, layers = self._scores()
        return LabelledTensor(
            "attention_to", values[:, :, 0], ("layer", "batch", "head"), {"layer": layers}
        )
