"""Attention mass by class of (query, key) pairs: heights of a tree, lags, distances in a graph."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from probes.heads.scores import uniform_pattern
from probes.reading.hook_names import Layers, layers_with
from probes.reading.labelled import LabelledTensor, standard_error
from probes.reading.padding import real_positions
from probes.reading.passes import MAX_BATCH_BYTES, attends_ahead, checked_tokens
from probes.reading.patterns import read_patterns
from probes.reading.records import wide_type

_AXES = ("layer", "batch", "head", "query", "key")


@dataclass(frozen=True, eq=False)
class ClassAttention:
    """Attention mass by class of (query, key) pairs, for every head.

    Attributes:
        layers: the layer number of each row.
        classes: the classes that occur among pairs that a query sees, rising.
        mass: attention of a query to its keys of the class, mean over the queries that see any and
            over sequences; a share of attention in [0, 1].
        mass_stderr: its standard error over sequences (NaN for one).
        uniform: the mass under uniform attention over all keys that a query sees.
        ratio: `mass / uniform`: 1 under uniform attention.
        ratio_stderr: its standard error over sequences (NaN for one).
    """

    layers: tuple[int, ...]
    classes: tuple[int, ...]
    mass: Float[Tensor, "layer head class"]
    mass_stderr: Float[Tensor, "layer head class"]
    uniform: Float[Tensor, "class"]
    ratio: Float[Tensor, "layer head class"]
    ratio_stderr: Float[Tensor, "layer head class"]

    def to_frame(self) -> Any:
        """A pandas frame with one row per head and class; the columns are the attributes' names.

        `layer`, `head` and `class` come first.
        """
        import pandas as pd  # type: ignore[import-untyped, unused-ignore]

        return pd.DataFrame(
            {
                "layer": layer,
                "head": head,
                "class": label,
                "mass": self.mass[row, head, i].item(),
                "mass_stderr": self.mass_stderr[row, head, i].item(),
                "uniform": self.uniform[i].item(),
                "ratio": self.ratio[row, head, i].item(),
                "ratio_stderr": self.ratio_stderr[row, head, i].item(),
            }
            for row, layer in enumerate(self.layers)
            for head in range(self.mass.shape[1])
            for i, label in enumerate(self.classes)
        )


def attention_by_class(
    attention: nn.Module | LabelledTensor | Tensor,
    classes: Shaped[Tensor, "*sequence query key"],
    tokens: Int[Tensor, "batch pos"] | None = None,
    *,
    causal: bool | None = None,
    layers: Layers = None,
    attention_mask: Shaped[Tensor, "batch mask_pos"] | None = None,
    max_batch_bytes: int = MAX_BATCH_BYTES,
) -> ClassAttention:
    """How much attention every head pays to each class of (query, key) pairs, against uniform.

    For class c, with Q_c the queries that see a key of that class,
    `mass[c] = mean over q in Q_c of Σ_k A[q, k] · 1[class(q, k) = c]`, and `uniform[c]` is the same
    for `A[q, k] = 1 / |keys that q sees|`. `ratio = mass / uniform` is above 1 where a head prefers
    the class. A query sees the keys `k <= q`, or all keys if attention is bidirectional, without
    padding. (Of a layer that sees only a window of keys, the ratio is to all keys `k <= q`.)

    Args:
        attention: a HookedTransformer or TransformerBridge, which is left as it was; or patterns,
            `[batch head query key]`, `[layer batch head query key]` or an `AttentionPattern`'s
            reading.
        classes: the class of every pair as an integer from 0; -1 leaves a pair out. One matrix
            `[query key]` for all sequences, or one for each, `[batch query key]`.
        tokens: the model's input; only with a model.
        causal: whether a query sees no later key; None to find out from the attention.
        layers: one layer, several, or None for all; only with a model.
        attention_mask: 0 at padding; None to find padding by the model's tokenizer, see
            `padding.real_positions`.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.

    Returns:
        Mass, uniform mass and ratio by layer, head and class.

    Raises:
        ValueError: the classes do not fit the sequences, are below -1 or all out of sight; or
            tokens are missing, or given with a pattern; or `causal` is True of attention to later
            keys.
        ProbeError: the tokens do not fit the model, or it shows no pattern.

    By lag, for a head that attends to the previous token:

    >>> one_back = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> lags = torch.tensor([[q - k if k <= q else -1 for k in range(3)] for q in range(3)])
    >>> by_lag = attention_by_class(one_back.expand(2, 1, 3, 3), lags)
    >>> by_lag.classes, by_lag.mass[0, 0, 1], by_lag.uniform[1]
    ((0, 1, 2), tensor(1., dtype=torch.float64), tensor(0.4167, dtype=torch.float64))

    By height in a binary tree over four leaves (0 the leaf, 1 its sibling, 2 the other two):

    >>> heights = torch.tensor([[(q ^ k).bit_length() for k in range(4)] for q in range(4)])
    >>> by_height = attention_by_class(torch.full((2, 1, 4, 4), 0.25), heights, causal=False)
    >>> by_height.uniform, by_height.ratio
    (tensor([0.2500, 0.2500, 0.5000], dtype=torch.float64),
     tensor([[[1., 1., 1.]]], dtype=torch.float64))
    """
    if isinstance(attention, nn.Module):
        if tokens is None:
            raise ValueError("attention_by_class of a model needs tokens")
        return _of_model(
            attention, classes, tokens, causal, layers, attention_mask, max_batch_bytes
        )
    if tokens is not None or layers is not None:
        raise ValueError("tokens and layers go with a model; this attention is a pattern")
    pattern, numbers = _checked_pattern(attention)
    causal = _checked_direction(causal, ahead=bool(pattern.triu(1).any()))
    if attention_mask is not None and attention_mask.shape != (pattern.shape[1], pattern.shape[3]):
        raise ValueError(
            f"the attention mask has shape {tuple(attention_mask.shape)}, the pattern's sequences "
            f"{(pattern.shape[1], pattern.shape[3])}"
        )
    pairs = _Pairs(
        classes.to(pattern.device),
        n_sequences=pattern.shape[1],
        pos=pattern.shape[3],
        causal=causal,
        real=None if attention_mask is None else attention_mask.to(pattern.device).bool(),
    )
    everything = slice(0, pattern.shape[1])
    return _summary(pairs, {n: pairs.mass(everything, pattern[i]) for i, n in enumerate(numbers)})


def _of_model(
    model: nn.Module,
    classes: Tensor,
    tokens: Tensor,
    causal: bool | None,
    layers: Layers,
    attention_mask: Tensor | None,
    max_batch_bytes: int,
) -> ClassAttention:
    tokens = checked_tokens(model, tokens)
    real = real_positions(model, tokens, attention_mask)
    numbers = layers_with(model, "pattern", layers)
    pairs = _Pairs(
        classes.to(tokens.device),
        n_sequences=tokens.shape[0],
        pos=tokens.shape[1],
        causal=_checked_direction(causal, ahead=attends_ahead(model)),
        real=real,
    )
    masses: dict[int, list[Tensor]] = {layer: [] for layer in numbers}

    def read(layer: int, rows: slice, pattern: Tensor) -> None:
        masses[layer].append(pairs.mass(rows, pattern).to(tokens.device))

    read_patterns(model, numbers, tokens, real, read, max_batch_bytes=max_batch_bytes)
    return _summary(pairs, {layer: torch.cat(parts) for layer, parts in masses.items()})


def _checked_direction(causal: bool | None, *, ahead: bool) -> bool:
    """Whether a query sees no later key."""
    if causal and ahead:
        raise ValueError("causal is True, but this attention goes to later keys too")
    return not ahead if causal is None else causal


def _checked_pattern(
    attention: LabelledTensor | Tensor,
) -> tuple[Float[Tensor, "layer batch head query key"], tuple[int, ...]]:
    """The patterns of all layers, and the layers' numbers."""
    if isinstance(attention, LabelledTensor):
        if attention.axes != _AXES:
            raise ValueError(
                f"{attention.name} has axes {attention.axes}; a reading of AttentionPattern() has "
                f"{_AXES}"
            )
        numbers = attention.coords.get("layer", tuple(range(attention.values.shape[0])))
        return attention.values, cast(tuple[int, ...], numbers)
    pattern = attention.detach()
    if pattern.ndim == 4:
        pattern = pattern.unsqueeze(0)
    if (
        pattern.ndim != 5
        or pattern.shape[-1] != pattern.shape[-2]
        or not pattern.is_floating_point()
    ):
        raise ValueError(
            f"the pattern has shape {tuple(attention.shape)} and type {attention.dtype}; expected "
            "numbers [batch head query key], or [layer batch head query key], with as many keys as "
            "queries"
        )
    return pattern, tuple(range(len(pattern)))


class _Pairs:
    """The classes of the pairs that queries see, and sums of attention over them."""

    def __init__(
        self,
        classes: Tensor,
        *,
        n_sequences: int,
        pos: int,
        causal: bool,
        real: Bool[Tensor, "batch pos"] | None,
    ) -> None:
        if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
            raise ValueError(f"classes are of type {classes.dtype}; expected integers")
        fitting = ((pos, pos), (n_sequences, pos, pos))
        if tuple(classes.shape) not in fitting:
            raise ValueError(
                f"classes have shape {tuple(classes.shape)}; {n_sequences} sequences of {pos} "
                f"tokens need {fitting[0]} or {fitting[1]} (query, key)"
            )
        if classes.numel() and int(classes.min()) < -1:
            raise ValueError(
                f"classes hold {int(classes.min())}; allowed are 0 and above, and -1 for pairs to "
                "leave out"
            )
        seen = uniform_pattern(pos, causal, real, device=classes.device)[:, 0] > 0
        of_pair = (classes if classes.ndim == 3 else classes.unsqueeze(0)).long()
        counted = seen & (of_pair >= 0)
        labels = of_pair.expand_as(counted)[counted].unique()
        if not len(labels):
            raise ValueError("no query sees a key with a class of 0 or above")
        self.labels = tuple(int(label) for label in labels)
        # Pairs that do not count go to one more bin.
        bins = torch.searchsorted(labels, of_pair.expand_as(counted).contiguous())
        self._bins = bins.masked_fill(~counted, len(labels)).flatten(1)
        of_query = torch.zeros(*counted.shape[:2], len(labels) + 1, dtype=torch.bool)
        of_query = of_query.to(classes.device).scatter_(-1, self._bins.view_as(bins), True)
        self._n_queries = of_query.sum(1)[:, :-1]
        wide = seen.to(wide_type(classes))
        pattern = (wide / wide.sum(-1, keepdim=True).clamp(min=1)).unsqueeze(1)
        pattern = pattern.expand(len(counted), -1, -1, -1)
        self.uniform = self.mass(slice(0, len(counted)), pattern)[:, 0].expand(n_sequences, -1)

    def mass(
        self, rows: slice, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head class"]:
        """The mass of every class in some of the sequences; NaN where no query sees the class."""
        shared = len(self._bins) == 1
        bins = (self._bins if shared else self._bins[rows]).to(pattern.device)
        n_queries = (self._n_queries if shared else self._n_queries[rows]).to(pattern.device)
        weights = pattern.to(wide_type(pattern)).flatten(2)
        sums = weights.new_zeros(*weights.shape[:2], len(self.labels) + 1)
        sums.scatter_add_(-1, bins.unsqueeze(1).expand_as(weights), weights)
        return sums[..., :-1] / n_queries.unsqueeze(1)


def _summary(pairs: _Pairs, masses: dict[int, Tensor]) -> ClassAttention:
    device = pairs.uniform.device
    mass = torch.stack([values.to(device) for values in masses.values()])
    uniform = pairs.uniform.nanmean(0)
    ratio = mass.nanmean(1) / uniform
    # The first order of a ratio of two means; the uniform mass may differ between sequences.
    deviations = (mass - ratio.unsqueeze(1) * pairs.uniform.unsqueeze(1)) / uniform
    return ClassAttention(
        layers=tuple(masses),
        classes=pairs.labels,
        mass=mass.nanmean(1),
        mass_stderr=standard_error(mass, 1),
        uniform=uniform,
        ratio=ratio,
        ratio_stderr=standard_error(deviations, 1),
    )
