"""The binary tree over a sequence that a bidirectional model's computation comes nearest to."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from probes.intervening.attention_edits import edit_attention
from probes.reading.errors import ProbeError
from probes.reading.hook_names import config_of, hook_name, hook_points, layers_with
from probes.reading.hooking import Hooks, converted
from probes.reading.padding import real_positions
from probes.reading.passes import (
    MAX_BATCH_BYTES,
    attends_ahead,
    batch_rows,
    checked_tokens,
    run,
    undisturbed,
)
from probes.reading.records import wide_type

Bracket: TypeAlias = tuple[int, int]
"""A span of tokens as (start, stop): the tokens start, …, stop - 1."""


@dataclass(frozen=True, eq=False)
class TreeProjection:
    """The trees that a model's attention projects to.

    Brackets are spans (start, stop) of at least two tokens; the span of all tokens is left out.

    Attributes:
        chart: the contextual invariance of every span, `[start, stop]`; NaN where stop <= start.
        brackets: those of each sequence's tree, from left to right.
        tscore: of each sequence, see `tree_projection`.
        mean_brackets: those of the tree of the chart averaged over sequences.
        mean_tscore: the tscore of that tree.
    """

    chart: Float[Tensor, "batch start stop"]
    brackets: tuple[tuple[Bracket, ...], ...]
    tscore: Float[Tensor, "batch"]
    mean_brackets: tuple[Bracket, ...]
    mean_tscore: float

    def recall(self, true: Iterable[Bracket]) -> tuple[float, Float[Tensor, "batch"]]:
        """The share of true brackets in the tree of the averaged chart, and in each sequence's.

        Raises:
            ValueError: no brackets are given.
        """
        wanted = frozenset(true)
        if not wanted:
            raise ValueError("recall needs at least one true bracket")
        trees = (self.mean_brackets, *self.brackets)
        of_mean, *of_each = (len(wanted & set(tree)) / len(wanted) for tree in trees)
        return of_mean, torch.tensor(of_each)


def tree_projection(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    *,
    from_layer: int = 0,
    start: int = 0,
    stop: int | None = None,
    attention_mask: Shaped[Tensor, "batch mask_pos"] | None = None,
    max_batch_bytes: int = MAX_BATCH_BYTES,
) -> TreeProjection:
    """The binary trees whose spans the model encodes most independently of their context.

    The contextual invariance of a span is the cosine of two vectors, each the sum of the last
    layer's residual stream over the span:
    `SCI(i, j) = cos(Σ_{i <= p < j} h_p, Σ_{i <= p < j} h_p^confined)`. For the second, the span's
    queries attend to the span's keys alone, from layer τ on. A span is split greedily,
    `k = argmax SCI(i, k) + SCI(k, j)`, from the top. The tscore is that sum at the chosen split
    minus its mean over all splits of the span, averaged over the tree's spans of three or more
    tokens.

    Args:
        model: a bidirectional HookedTransformer or TransformerBridge; left as it was.
        tokens: the sequences.
        from_layer: τ, the first layer whose attention is confined; at 0 a span is computed from its
            own tokens alone.
        start: the first token of the tree, from which brackets are counted.
        stop: the tree is over `tokens[:, start:stop]`; None for the last. The other tokens, such as
            [CLS] and [SEP], are context.
        attention_mask: 0 at padding, which is refused; None to find padding by the tokenizer's PAD
            token, see `padding.real_positions`.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.

    Returns:
        Chart, brackets and tscore of each sequence, and those of the averaged chart. Cost: T(T+1)/2
        passes over the sequences, many spans at a time, for T tokens.

    Raises:
        ValueError: fewer than three tokens between `start` and `stop`, or padding.
        ProbeError: the model is causal, or the layer does not exist, the tokens do not fit, or the
            model uses its patterns before they can be edited.

    Source:
        Murty et al. 2023, "Characterizing Intrinsic Compositionality in Transformers with Tree
        Projections".

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> sizes |= {"attn_only": True, "attention_dir": "bidirectional", "device": "cpu", "seed": 0}
    >>> trees = tree_projection(HookedTransformer(sizes), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    >>> len(trees.mean_brackets), trees.chart.shape  # a tree over three tokens joins two of them
    (1, torch.Size([2, 3, 4]))
    """
    tokens = checked_tokens(model, tokens)
    layers_with(model, "pattern", from_layer)
    if not attends_ahead(model):
        raise ProbeError(
            f"{type(model).__name__} attends to earlier tokens alone: tree_projection needs a "
            "bidirectional model"
        )
    real = real_positions(model, tokens, attention_mask)
    start, stop = _checked_range(tokens.shape[1], start, stop)
    if real is not None:
        raise ValueError("sequences hold padding: tree_projection needs sequences of one length")
    chart = _chart(model, tokens, from_layer, range(start, stop), max_batch_bytes)
    mean = chart.mean(0)
    trees = [_greedy_tree(one) for one in chart]
    mean_brackets, mean_tscore = _greedy_tree(mean)
    return TreeProjection(
        chart=chart,
        brackets=tuple(brackets for brackets, _ in trees),
        tscore=torch.tensor([tscore for _, tscore in trees], dtype=chart.dtype),
        mean_brackets=mean_brackets,
        mean_tscore=mean_tscore,
    )


def _checked_range(pos: int, start: int, stop: int | None) -> tuple[int, int]:
    first, last, _ = slice(start, stop).indices(pos)
    if last - first < 3:
        raise ValueError(
            f"start {start} and stop {stop} leave {max(0, last - first)} of {pos} tokens; a tree "
            "needs at least three"
        )
    return first, last


class _Confinement:
    """An edit that confines the queries of a span to its keys, in each sequence its own span."""

    def __init__(self) -> None:
        self.inside: Bool[Tensor, "batch pos"] | None = None

    def __call__(self, pattern: Tensor) -> Tensor:
        """The pattern with the softmax of confined queries taken over their span alone."""
        assert self.inside is not None
        inside = self.inside.to(pattern.device)
        query, key = inside[:, None, :, None], inside[:, None, None, :]
        wide = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
        kept = wide.masked_fill(~key, 0.0)
        total = kept.sum(-1, keepdim=True)
        uniform = key / key.sum(-1, keepdim=True).clamp(min=1)
        lost = total <= torch.finfo(wide.dtype).tiny  # all attention was outside of the span
        confined = torch.where(lost, uniform.to(wide), kept / torch.where(lost, 1.0, total))
        return torch.where(query, confined.to(pattern.dtype), pattern)


def _chart(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    from_layer: int,
    positions: range,
    max_batch_bytes: int,
) -> Float[Tensor, "batch start stop"]:
    """The contextual invariance of every span, in float64."""
    n_layers: int = config_of(model).n_layers
    last = layers_with(model, "resid_post", n_layers - 1)[0]
    point = hook_points(model)[hook_name("resid_post", last)]
    n_tokens, rows = len(positions), batch_rows(model, tokens.shape[1], max_batch_bytes)
    spans = [(i, j) for i in range(n_tokens) for j in range(i + 1, n_tokens + 1)]
    position = torch.arange(tokens.shape[1], device=tokens.device) - positions.start
    streams: list[Tensor] = []

    def stream(batch: Tensor) -> Tensor:
        """The last layer's residual stream."""
        streams.clear()
        run(model, batch)
        return streams[-1].to(wide_type(streams[-1]))

    def keep(module: nn.Module, inputs: Any, activation: Tensor) -> None:
        streams.append(converted(point, activation))

    confinement = _Confinement()
    layers = [layer for layer in layers_with(model, "pattern") if layer >= from_layer]
    charts = []
    with undisturbed(model), Hooks() as hooks:
        hooks.add(point, keep)
        for first in range(0, len(tokens), rows):
            batch = tokens[first : first + rows]
            unconfined = stream(batch)
            chart = unconfined.new_full((len(batch), n_tokens, n_tokens + 1), torch.nan)
            at_once = max(1, rows // len(batch))
            with edit_attention(model, dict.fromkeys(layers, confinement)):
                for number in range(0, len(spans), at_once):
                    some = spans[number : number + at_once]
                    i, j = torch.tensor(some, device=tokens.device).T
                    inside = (i[:, None] <= position) & (position < j[:, None])
                    confinement.inside = inside.repeat_interleave(len(batch), 0)
                    confined = stream(batch.repeat(len(some), 1))
                    confined = confined.unflatten(0, (len(some), len(batch)))
                    mask = inside.to(unconfined)
                    sums = torch.einsum("sp,bpd->sbd", mask, unconfined)
                    confined_sums = torch.einsum("sp,sbpd->sbd", mask, confined)
                    chart[:, i, j] = torch.cosine_similarity(sums, confined_sums, dim=-1).T
            charts.append(chart)
    return torch.cat(charts)


def _greedy_tree(
    chart: Float[Tensor, "start stop"],
) -> tuple[tuple[Bracket, ...], float]:
    """The brackets of the greedy tree of a chart, and its tscore."""
    values = chart.tolist()
    brackets: list[Bracket] = []
    gains: list[float] = []
    spans = [(0, len(values))]
    while spans:
        i, j = spans.pop()
        if j - i < 2:
            continue
        brackets.append((i, j))
        splits = [values[i][k] + values[k][j] for k in range(i + 1, j)]
        best = max(range(len(splits)), key=splits.__getitem__)
        if len(splits) > 1:
            gains.append(splits[best] - sum(splits) / len(splits))
        spans += [(i, i + 1 + best), (i + 1 + best, j)]
    return tuple(sorted(brackets[1:])), sum(gains) / len(gains)
