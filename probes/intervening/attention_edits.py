"""Change what heads attend to and measure the effect: whether the model uses that attention.

    with edit_attention(model, {0: knock_out([(5, 3)]), 1: redirect([(7, 2, 4)])}):
        model(tokens)

An edit is a function from attention patterns to attention patterns: rows stay distributions and
gradients flow through it. The edits in this module are for causal attention (key <= query).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.reading.errors import ProbeError
from probes.reading.hook_names import hook_name, hook_points, layers_with
from probes.reading.hooking import Hooks
from probes.reading.labelled import standard_error
from probes.reading.passes import undisturbed

Edit: TypeAlias = Callable[
    [Float[Tensor, "batch head query key"]], Float[Tensor, "batch head query key"]
]
"""Returns the new attention pattern of a layer; must not change its argument in place."""


@dataclass(frozen=True)
class AttentionEffect:
    """How a loss changes under one edit of a layer's attention.

    Attributes:
        label: name of the edit.
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

    Blocks nest: the inner edit receives the pattern from the outer edit, and a probe attached
    inside the block reads the edited pattern. Leaving the block, also by an exception, removes
    exactly these hooks.

    Args:
        model: a HookedTransformer or TransformerBridge.
        edits: the edit of each layer, from pattern to pattern `[batch head query key]`; its rows
            must stay distributions, which is not checked.

    Raises:
        ProbeError: a layer does not exist. In a pass inside the block: an edit does not fit the
            pattern or changes its shape, or the model computes z before it runs the pattern hook
            (as a bridge does where the original model computes attention): no edit has an effect.

    >>> from mechcausal.models.adapter import HookedTransformer
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
            layers_with(model, "pattern", layer)
            checked = _CheckedEdit(layer, edit)
            hooks.edit(points[hook_name("pattern", layer)], checked)
            if (z_point := points.get(hook_name("z", layer))) is not None:
                hooks.add(z_point, checked.at_z)
        yield


def attention_effects(
    model: nn.Module,
    layer: int,
    edits: Sequence[tuple[str, Edit]],
    loss: Callable[[], Float[Tensor, "batch"]],
) -> tuple[AttentionEffect, ...]:
    """How much a loss rises under each single edit of one layer's attention.

    `rise = mean over sequences of (loss with the edit - loss without it)`.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        layer: the layer to edit.
        edits: the edits, each as (label, edit).
        loss: runs the model and returns one loss for each sequence, the same sequences every
            time. Called without gradients, in evaluation mode.

    Returns:
        One effect per edit, in the order of `edits`. Cost: one call of `loss` per edit, and one.

    Raises:
        ProbeError: as `edit_attention`.
    """
    losses, rises = loss_rises(model, layer, [edit for _, edit in edits], loss)
    before = losses.mean().item()
    return tuple(
        AttentionEffect(label, rise.mean().item(), standard_error(rise).item(), before)
        for (label, _), rise in zip(edits, rises, strict=True)
    )


def loss_rises(
    model: nn.Module,
    layer: int,
    edits: Sequence[Edit],
    loss: Callable[[], Float[Tensor, "batch"]],
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "edit batch"]]:
    """The loss of every sequence without edits, and its rise under each single edit, in float64.

    Arguments and errors are those of `attention_effects`.
    """
    with undisturbed(model):
        losses = loss().double()
        rises = losses.new_empty(len(edits), len(losses))
        for number, edit in enumerate(edits):
            with edit_attention(model, {layer: edit}):
                rises[number] = loss().double() - losses
    return losses, rises


def knock_out(pairs: Sequence[tuple[int, int]], head: int | None = None) -> Edit:
    """Set the attention of (query, key) pairs to 0 and rescale the other keys of the row.

    `pattern[q, j] / sum of pattern[q, j'] over kept keys j'`: the softmax with the pairs' scores
    masked. A row with all its attention on the pairs becomes uniform over its other keys j <= q. A
    row without another key stays unchanged.

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
    entries = [(rows.index(query), key) for query, key in pairs]

    def change(part: Tensor) -> Tensor:
        removed = _mask(entries, part)
        kept = part.masked_fill(removed, 0.0)
        total = kept.sum(-1, keepdim=True)
        # A divisor below the smallest normal number would make gradients infinite.
        empty = total <= torch.finfo(part.dtype).tiny
        scaled = kept / torch.where(empty, 1.0, total)
        others = _visible(rows, part) & ~removed
        replaced = torch.where(empty, _uniform(others, part), scaled)
        return torch.where(others.any(-1, keepdim=True), replaced, part)

    return _on_rows(rows, head, change)


def redirect(pairs: Sequence[tuple[int, int, int]], head: int | None = None) -> Edit:
    """Swap the attention weights of an old and a new key in the query's row.

    Several swaps in one row are applied in the given order.

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
    """Make the rows of queries uniform over all keys j <= q.

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
    """Replace the pattern of a layer by a given one.

    Args:
        pattern: `[query key]`, `[head query key]` or `[batch head query key]`; missing axes and
            axes of size 1 are expanded. Gradients flow to it and not to the replaced pattern.

    Raises:
        ValueError: there are more axes, a weight is below 0 by more than rounding (the number of
            keys times the type's epsilon, at most 1e-3), or a row sum differs from 1 by over 1e-3.
    """
    if pattern.ndim > 4:
        raise ValueError(f"the pattern has {pattern.ndim} axes; at most 4: batch, head, query, key")
    with torch.no_grad():
        sum_error = (pattern.sum(-1) - 1).abs().max().item() if pattern.numel() else 0.0
        lowest = pattern.min().item() if pattern.numel() else 0.0
    epsilon = torch.finfo(pattern.dtype).eps if pattern.is_floating_point() else 0.0
    rounding = min(pattern.shape[-1] * epsilon, 1e-3)
    # `not (... and ...)` also rejects NaN.
    if not (lowest >= -rounding and sum_error <= 1e-3):
        raise ValueError(
            f"the pattern has a lowest weight of {lowest:g} and row sums that differ from 1 by up "
            f"to {sum_error:g}; weights must be >= 0 and rows sum to 1 within 0.001"
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


class _CheckedEdit:
    """An edit of one layer that fails in a pass where it cannot have an effect."""

    def __init__(self, layer: int, edit: Edit) -> None:
        self._layer = layer
        self._edit = edit
        self._done = False

    def __call__(self, before: Tensor) -> Tensor:
        """The edited pattern."""
        after = self._edit(before)
        if after.shape != before.shape:
            raise ProbeError(
                f"the edit of layer {self._layer} changes the pattern's shape from "
                f"{tuple(before.shape)} to {tuple(after.shape)}"
            )
        self._done = True
        return after.to(before)

    def at_z(self, point: nn.Module, inputs: Any, z: Tensor) -> None:
        """Check that the layer has run its pattern hook before it computes z."""
        if not self._done:
            raise ProbeError(
                f"layer {self._layer} computes z before it runs its hook_pattern, or never runs "
                "it: an edit would change nothing"
            )
        self._done = False


def _on_rows(rows: Sequence[int], head: int | None, change: Callable[[Tensor], Tensor]) -> Edit:
    """An edit that applies `change` to the rows, `[batch head row key]`, of one head or all."""

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
        # Rescaling enlarges small weights, which half precision would have rounded too far.
        wide = part.index_select(2, index).to(torch.promote_types(part.dtype, torch.float32))
        changed = part.index_copy(2, index, change(wide).to(part.dtype))
        if head is None:
            return changed
        return torch.cat([pattern[:, :head], changed, pattern[:, head + 1 :]], dim=1)

    return edit


def _visible(rows: Sequence[int], part: Tensor) -> Tensor:
    """The keys that each row may attend to under causal attention, `[row key]`."""
    queries = torch.tensor(rows, device=part.device)
    return torch.arange(part.shape[-1], device=part.device) <= queries.unsqueeze(1)


def _mask(entries: Sequence[tuple[int, int]], part: Tensor) -> Tensor:
    mask = torch.zeros(part.shape[-2:], dtype=torch.bool, device=part.device)
    index = torch.tensor(entries, device=part.device)
    mask[index[:, 0], index[:, 1]] = True
    return mask


def _uniform(keys: Tensor, part: Tensor) -> Tensor:
    return keys.to(part.dtype) / keys.sum(-1, keepdim=True).clamp(min=1)


def _check_order(query: int, key: int) -> None:
    if not 0 <= key <= query:
        raise ValueError(f"(query {query}, key {key}) is not allowed: it needs 0 <= key <= query")
