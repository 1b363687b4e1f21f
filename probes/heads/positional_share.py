"""How much of a head's attention scores depends on positions alone."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from probes.heads.scores import uniform_pattern
from probes.reading.errors import ProbeError
from probes.reading.hook_names import Layers, layers_with
from probes.reading.padding import real_positions
from probes.reading.passes import MAX_BATCH_BYTES, attends_ahead, checked_tokens
from probes.reading.patterns import read_patterns
from probes.reading.records import wide_type


@dataclass(frozen=True, eq=False)
class PositionalShare:
    """The share of every head's score variance that positions explain.

    Attributes:
        layers: the layer number of each row.
        share: 1 for scores that depend on positions alone, 0 for scores with the same mean at every
            key; a little below 0 or above 1 by chance. NaN if a head's scores do not vary.
        stderr: its standard error, by jackknife over sequences (NaN for two sequences); near a
            share of 0 it is too large, by a factor of √2 for many sequences.
        n_sequences: number of sequences.
    """

    layers: tuple[int, ...]
    share: Float[Tensor, "layer head"]
    stderr: Float[Tensor, "layer head"]
    n_sequences: int

    def to_frame(self) -> Any:
        """A pandas frame with one row per head: `layer`, `head`, `share`, `stderr`."""
        import pandas as pd  # type: ignore[import-untyped, unused-ignore]

        return pd.DataFrame(
            {
                "layer": layer,
                "head": head,
                "share": self.share[row, head].item(),
                "stderr": self.stderr[row, head].item(),
            }
            for row, layer in enumerate(self.layers)
            for head in range(self.share.shape[1])
        )


def positional_share(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    *,
    layers: Layers = None,
    attention_mask: Shaped[Tensor, "batch mask_pos"] | None = None,
    max_batch_bytes: int = MAX_BATCH_BYTES,
) -> PositionalShare:
    """The share of a head's row-centred score variance that its mean over sequences explains.

    With `x_n[q, k]` the score of sequence n minus the row's mean over the keys that q sees, the
    share is `Σ_qk (E x[q, k])² / Σ_qk E x[q, k]²`. Over N sequences the square of a mean is too
    large by the variance over N, so that noise alone would give a share of about 1/N. The square is
    therefore estimated without bias, from pairs of different sequences:
    `(E x)² ≈ ((Σ_n x_n)² - Σ_n x_n²) / (N (N - 1))`, and `E x² ≈ Σ_n x_n² / N`.

    Scores are read as the logarithm of the pattern, since row-centred both are equal, and since
    some bridges show weights under the name of scores. Keys that a query does not see, by a causal
    or sliding mask or as padding, do not count; each pair counts over the sequences that have it.

    Scores may follow positions for reasons that lie in the sequences: an induction head on blocks
    of one repeat length looks a fixed number of positions back. Vary the length. A head that
    matches tokens sees itself at every query, which also is a position.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        tokens: at least two sequences; different ones, drawn independently.
        layers: one layer, several, or None for every layer that has attention.
        attention_mask: 0 at padding; None to find padding by the tokenizer's PAD token, see
            `padding.real_positions`.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.

    Returns:
        Share and standard error by layer and head. Cost: two passes over the sequences, and memory
        for two matrices `[head query key]` a layer in float64.

    Raises:
        ValueError: fewer than two sequences, or a query never sees two keys.
        ProbeError: the tokens do not fit the model, it shows no pattern, or attention weights are 0
            where other sequences have some, so that the scores are lost.

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu", "seed": 0})
    >>> _ = model.embed.W_E.data.zero_()  # only positions are left
    >>> positional_share(model, torch.randint(20, (8, 6))).share
    tensor([[1.0000, 1.0000]], dtype=torch.float64)
    """
    tokens = checked_tokens(model, tokens)
    if len(tokens) < 2:
        raise ValueError(
            "positional_share got one sequence: at least two show what tokens, not positions, do"
        )
    real = real_positions(model, tokens, attention_mask)
    numbers = layers_with(model, "pattern", layers)
    causal = not attends_ahead(model)
    seen = uniform_pattern(tokens.shape[1], causal, real, device=tokens.device)[:, 0] > 0
    if int(seen.expand(len(tokens), -1, -1).sum(-1).max()) < 2:
        raise ValueError(
            f"sequences of {tokens.shape[1]} tokens are too short: some query must see two keys"
        )
    sums: dict[int, _Sums] = {}

    def add(layer: int, rows: slice, pattern: Tensor) -> None:
        scores, visible = _centred(pattern, seen, rows)
        if layer not in sums:
            sums[layer] = _Sums(scores, pattern.dtype)
        sums[layer].add(scores, visible)

    read_patterns(model, numbers, tokens, real, add, max_batch_bytes=max_batch_bytes)
    sequences_that_see = seen.expand(len(tokens), -1, -1).sum(0)
    for layer in numbers:
        sums[layer].check(layer, sequences_that_see)
    left_out: dict[int, list[Tensor]] = {layer: [] for layer in numbers}

    def leave_one_out(layer: int, rows: slice, pattern: Tensor) -> None:
        scores, visible = _centred(pattern, seen, rows)
        left_out[layer].append(sums[layer].share_without(scores, visible))

    read_patterns(model, numbers, tokens, real, leave_one_out, max_batch_bytes=max_batch_bytes)
    shares = torch.stack([sums[layer].share().to(tokens.device) for layer in numbers])
    without = torch.stack([torch.cat(left_out[layer]).to(tokens.device) for layer in numbers])
    n = len(tokens)
    spread = (without - without.mean(1, keepdim=True)).square().sum(1)
    return PositionalShare(numbers, shares, (spread * (n - 1) / n).sqrt(), n)


def _centred(
    pattern: Float[Tensor, "batch head query key"],
    seen: Bool[Tensor, "sequence query key"],
    rows: slice,
) -> tuple[Float[Tensor, "batch head query key"], Bool[Tensor, "batch head query key"]]:
    """The scores minus the mean of their row, 0 where no key is seen, and which keys are seen."""
    visible = (seen if len(seen) == 1 else seen[rows]).unsqueeze(1).to(pattern.device)
    visible = visible & (pattern > 0)
    scores = pattern.to(wide_type(pattern)).log().masked_fill(~visible, 0.0)
    mean = scores.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp(min=1)
    return (scores - mean).masked_fill(~visible, 0.0), visible


class _Sums:
    """Sums of centred scores and of their squares over the sequences, for one layer."""

    def __init__(self, scores: Tensor, dtype: torch.dtype) -> None:
        self._sum = torch.zeros_like(scores[0])
        self._squares = torch.zeros_like(scores[0])
        self._counts = torch.zeros_like(scores[0], dtype=torch.int64)
        # How far rounding alone moves the logarithm of a weight.
        self._rounding = 16 * torch.finfo(dtype).eps * max(1.0, math.log(scores.shape[-1]))

    def add(self, scores: Tensor, visible: Tensor) -> None:
        """Add some sequences, `[batch head query key]`."""
        self._sum += scores.sum(0)
        self._squares += scores.square().sum(0)
        self._counts += visible.sum(0)

    def check(self, layer: int, n_seen: Int[Tensor, "query key"]) -> None:
        """Refuse weights of 0 that no mask explains, since a mask holds for every sequence."""
        if bool(((self._counts > 0) & (self._counts < n_seen.to(self._counts.device))).any()):
            raise ProbeError(
                f"layer {layer} has attention weights of 0 where other sequences have some: the "
                "softmax rounded them, and the scores are lost; a model in a wider dtype, such as "
                "float64, keeps them"
            )

    def share(self) -> Float[Tensor, "head"]:
        """The share of variance over all sequences."""
        return self._ratio(self._sum, self._squares, self._counts)

    def share_without(self, scores: Tensor, visible: Tensor) -> Float[Tensor, "batch head"]:
        """The share over all sequences but one, for each of the given ones."""
        return self._ratio(
            self._sum - scores, self._squares - scores.square(), self._counts - visible.long()
        )

    def _ratio(self, sums: Tensor, squares: Tensor, counts: Tensor) -> Tensor:
        pairs = counts >= 2
        explained = (sums.square() - squares) / (counts * (counts - 1)).clamp(min=1)
        everything = squares / counts.clamp(min=1)
        explained, everything = (
            values.masked_fill(~pairs, 0.0).sum((-2, -1)) for values in (explained, everything)
        )
        constant = everything <= self._rounding**2 * pairs.sum((-2, -1))
        return (explained / everything).masked_fill(constant, torch.nan)
