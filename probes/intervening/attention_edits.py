"""Change what heads attend to and see what the model makes of it: whether attention is used.

    with edit_attention(model, {0: knock_out([(5, 3)]), 1: redirect([(7, 2, 4)])}):
        model(tokens)

An edit is a function from attention patterns to attention patterns: rows stay distributions and
gradients flow through it. The edits made here speak of causal attention (key <= query).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.heads.in_context import standard_error
from probes.reading import hook_names
from probes.reading.errors import ProbeError
from probes.reading.hook_names import attention_layers, hook_points
from probes.reading.hooking import Hooks
from probes.reading.passes import undisturbed

Edit: TypeAlias = Callable[
    [Float[Tensor, "batch head query key"]], Float[Tensor, "batch head query key"]
]
"""What to put in place of a layer's attention pattern; must not write into what it is given."""


@dataclass(frozen=True)
class AttentionEffect:
    """What a loss does when a layer attends otherwise.

    Attributes:
        label: names the edit.
        rise: mean rise of the loss, in units of the loss.
        stderr: its standard error, paired over sequences (NaN for one sequence).
        loss: mean loss without the edit.
    """

    label: str
    rise: float
    stderr: float
    loss: float


@contextmanager
def edit_attention(model: nn.Module, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Replace attention patterns, after the softmax, for the length of a `with` block.

    Blocks nest: the inner edit gets the outer one's pattern, and a probe attached inside the block
    reads what the edit made. Leaving the block, by an exception too, removes exactly these hooks.

    Args:
        model: a HookedTransformer or TransformerBridge.
        edits: for each layer, what to make of its pattern `[batch head query key]`; rows must
            stay distributions, which is not checked here.

    Raises:
        ProbeError: a layer does not exist. In a pass inside the block: an edit does not fit the
            pattern or changes its shape, or the model does not compute with the pattern it shows
            (a bridge that lets the original model attend), so that no edit could matter.

    >>> from transformer_lens import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    >>> before = model(tokens)
    >>> with edit_attention(model, {0: knock_out([(2, 0)])}):
    ...     _, cache = model.run_with_cache(tokens)
    >>> cache["pattern", 0][:, :, 2, 0].any().item()
    False
    >>> torch.equal(model(tokens), before)
    True
    """
    points = hook_points(model)
    with Hooks() as hooks:
        for layer, edit in edits.items():
            attention_layers(model, layer)
            use = _Use(layer)
            name = hook_names.pattern(layer)
            hook = _edits(layer, edit, use)
            hooks.add(points[name], hook)
            if (mixed := points.get(hook_names.z(layer))) is not None:
                hooks.add(mixed, use.check)
        yield


def attention_effects(
    model: nn.Module,
    layer: int,
    edits: Sequence[tuple[str, Edit]],
    loss: Callable[[], Float[Tensor, "batch"]],
) -> tuple[AttentionEffect, ...]:
    """How much a loss rises under each edit of one layer's attention, alone.

    `rise = mean over sequences of (loss with the edit - loss without it)`.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        layer: the layer edited.
        edits: each with a label.
        loss: runs the model and returns one loss for each sequence, the same sequences every
            time. Called without gradients, in evaluation mode.

    Returns:
        One effect per edit, in their order. Cost: one call of `loss` each, and one more.

    Raises:
        ProbeError: see `edit_attention`.
    """
    whole, rises = loss_rises(model, layer, [edit for _, edit in edits], loss)
    return tuple(
        AttentionEffect(label, rise.mean().item(), standard_error(rise).item(), whole.mean().item())
        for (label, _), rise in zip(edits, rises, strict=True)
    )


def loss_rises(
    model: nn.Module,
    layer: int,
    edits: Sequence[Edit],
    loss: Callable[[], Float[Tensor, "batch"]],
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "edit batch"]]:
    """The loss of every sequence without edits, and its rise under each edit alone, in float64.

    Arguments and errors are those of `attention_effects`.
    """
    with undisturbed(model):
        whole = loss().double()
        rises = whole.new_empty(len(edits), len(whole))
        for number, edit in enumerate(edits):
            with edit_attention(model, {layer: edit}):
                rises[number] = loss().double() - whole
    return whole, rises


def knock_out(pairs: Sequence[tuple[int, int]], head: int | None = None) -> Edit:
    """Take attention away from (query, key) pairs and scale up what the row's other keys have.

    `pattern[q, j] / sum of pattern[q, j'] over keys j' kept`: what the softmax gives with those
    scores masked. A row that had everything on its pairs becomes uniform over its other keys
    j <= q. A row without another key stays as it is: it has nowhere else to look.

    Args:
        pairs: (query, key), key <= query.
        head: the head to change; None for all.

    Raises:
        ValueError: a negative position, or a key after its query.

    >>> pattern = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.25, 0.5, 0.25]])
    >>> knock_out([(0, 0), (1, 1), (2, 1)])(pattern[None, None])[0, 0]
    tensor([[1.0000, 0.0000, 0.0000],
            [1.0000, 0.0000, 0.0000],
            [0.5000, 0.0000, 0.5000]])
    """
    for query, key in pairs:
        _check_order(query, key)
    rows = sorted({query for query, _ in pairs})
    places = [(rows.index(query), key) for query, key in pairs]

    def change(part: Tensor) -> Tensor:
        visible = _visible(rows, part)
        lost = _mask(places, part)
        kept = part.masked_fill(lost, 0.0)
        total = kept.sum(-1, keepdim=True)
        # A divisor below the smallest normal number would make gradients infinite.
        empty = total <= torch.finfo(part.dtype).tiny
        scaled = kept / torch.where(empty, 1.0, total)
        others = visible & ~lost
        replaced = torch.where(empty, _uniform(others, part), scaled)
        return torch.where(others.any(-1, keepdim=True), replaced, part)

    return _on_rows(rows, head, change)


def redirect(pairs: Sequence[tuple[int, int, int]], head: int | None = None) -> Edit:
    """Move attention from an old key to a new one: in the query's row the two weights swap.

    Several swaps in one row follow one another in the order given.

    Args:
        pairs: (query, old key, new key), keys <= query.
        head: the head to change; None for all.

    Raises:
        ValueError: a negative position, or a key after its query.

    >>> redirect([(1, 0, 1)])(torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]]))[0, 0, 1]
    tensor([0.7500, 0.2500])
    """
    for query, old, new in pairs:
        _check_order(query, old)
        _check_order(query, new)
    rows = sorted({query for query, _, _ in pairs})

    def change(part: Tensor) -> Tensor:
        order = [list(range(part.shape[-1])) for _ in rows]
        for query, old, new in pairs:
            row = order[rows.index(query)]
            row[old], row[new] = row[new], row[old]
        return part.gather(-1, torch.tensor(order, device=part.device).expand_as(part))

    return _on_rows(rows, head, change)


def make_uniform(queries: Sequence[int], head: int | None = None) -> Edit:
    """Let queries attend to all keys j <= q alike: the rows say nothing any more.

    Args:
        queries: the rows to change.
        head: the head to change; None for all.

    Raises:
        ValueError: a negative position.

    >>> make_uniform([1])(torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]]))[0, 0, 1]
    tensor([0.5000, 0.5000])
    """
    for query in queries:
        _check_order(query, 0)
    rows = sorted(set(queries))
    return _on_rows(rows, head, lambda part: _uniform(_visible(rows, part), part).expand_as(part))


def replace_pattern(pattern: Float[Tensor, "*batch_head query key"]) -> Edit:
    """Let a layer attend as given, whatever it would have done.

    Args:
        pattern: `[query key]`, `[head query key]` or `[batch head query key]`; sizes of 1 in
            front are repeated. Gradients flow to it, none to what it replaces.

    Raises:
        ValueError: more axes, a weight below zero by more than rounding (the number of keys times
            the type's epsilon, at most 1e-3), or a row that does not sum to 1 (within 1e-3).
    """
    if pattern.ndim > 4:
        raise ValueError(f"the pattern has {pattern.ndim} axes; at most 4: batch, head, query, key")
    with torch.no_grad():
        off = (pattern.sum(-1) - 1).abs().max().item() if pattern.numel() else 0.0
        lowest = pattern.min().item() if pattern.numel() else 0.0
    epsilon = torch.finfo(pattern.dtype).eps if pattern.is_floating_point() else 0.0
    rounding = min(pattern.shape[-1] * epsilon, 1e-3)
    # Written so that NaN is refused too.
    if not (lowest >= -rounding and off <= 1e-3):
        raise ValueError(
            f"the pattern has a lowest weight of {lowest:g} and rows up to {off:g} away from a sum "
            "of 1; weights must be >= 0 and rows sum to 1 within 0.001"
        )

    def edit(
        before: Float[Tensor, "batch head query key"],
    ) -> Float[Tensor, "batch head query key"]:
        try:
            return pattern.to(before).expand_as(before)
        except RuntimeError:
            raise ProbeError(
                f"a pattern of shape {tuple(pattern.shape)} cannot replace one of shape "
                f"{tuple(before.shape)}"
            ) from None

    return edit


class _Use:
    """Whether the layer computes with the pattern it shows: values are mixed after it."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self.edited = False

    def check(self, point: nn.Module, inputs: tuple[Any, ...], z: Tensor) -> None:
        if not self.edited:
            raise ProbeError(
                f"layer {self._layer} mixes values before it shows its attention pattern, or shows "
                "none: an edit would change nothing"
            )
        self.edited = False


def _edits(
    layer: int, edit: Edit, use: _Use
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def replace(point: nn.Module, inputs: tuple[Any, ...], activation: Tensor) -> Tensor:
        conversion: Any = getattr(point, "hook_conversion", None)
        before = activation if conversion is None else conversion.convert(activation)
        after = edit(before)
        if after.shape != before.shape:
            raise ProbeError(
                f"the edit of layer {layer} makes shape {tuple(after.shape)} of a pattern of shape "
                f"{tuple(before.shape)}"
            )
        use.edited = True
        after = after.to(before)
        edited: Tensor = after if conversion is None else conversion.revert(after)
        return edited

    return replace


def _on_rows(rows: Sequence[int], head: int | None, change: Callable[[Tensor], Tensor]) -> Edit:
    """An edit that hands the named rows, `[batch head row key]`, to `change`."""

    def edit(
        pattern: Float[Tensor, "batch head query key"],
    ) -> Float[Tensor, "batch head query key"]:
        n_heads, n_queries = pattern.shape[1:3]
        if rows and rows[-1] >= n_queries:
            raise ProbeError(f"query {rows[-1]} does not exist: the pattern has {n_queries}")
        if head is not None and not 0 <= head < n_heads:
            raise ProbeError(f"head {head} does not exist: the pattern has {n_heads}")
        if not rows:
            return pattern
        part = pattern if head is None else pattern[:, head : head + 1]
        index = torch.tensor(rows, device=pattern.device)
        # Half precision would lose the small weights that scaling up makes large.
        wide = part.index_select(2, index).to(torch.promote_types(part.dtype, torch.float32))
        changed = part.index_copy(2, index, change(wide).to(part.dtype))
        if head is None:
            return changed
        return torch.cat([pattern[:, :head], changed, pattern[:, head + 1 :]], dim=1)

    return edit


def _visible(rows: Sequence[int], part: Tensor) -> Tensor:
    """`[row key]`: the keys that causal attention lets each row see."""
    queries = torch.tensor(rows, device=part.device)
    return torch.arange(part.shape[-1], device=part.device) <= queries.unsqueeze(1)


def _mask(places: Sequence[tuple[int, int]], part: Tensor) -> Tensor:
    mask = torch.zeros(part.shape[-2:], dtype=torch.bool, device=part.device)
    index = torch.tensor(places, device=part.device)
    mask[index[:, 0], index[:, 1]] = True
    return mask


def _uniform(where: Tensor, part: Tensor) -> Tensor:
    return where.to(part.dtype) / where.sum(-1, keepdim=True).clamp(min=1)


def _check_order(query: int, key: int) -> None:
    if not 0 <= key <= query:
        raise ValueError(f"(query {query}, key {key}) is no pair: it needs 0 <= key <= query")
