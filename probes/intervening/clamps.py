"""Hold parts of attention fixed while a model trains: what must form first?

    with clamp(model, {0: fixed_to(parents), 1: [previous_token(head=0), forbid([(7, 2)])]}):
        model(tokens, return_type="loss").backward()
        optimizer.step()

A clamp is an edit of attention patterns (`attention_edits`) that can be checked against a model
before any pass. Rows that it holds give their queries and keys no gradient; everything else trains
as usual.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.intervening.attention_edits import Edit, edit_attention
from probes.intervening.clamp_kinds import Clamp, Fixed, Forbidden, Previous
from probes.reading.activation import AttentionPattern
from probes.reading.attach import attach
from probes.reading.hook_names import config_of, layers_with
from probes.reading.passes import (
    MAX_BATCH_BYTES,
    attends_ahead,
    batch_rows,
    checked_tokens,
    run,
    split,
    undisturbed,
)

Parents: TypeAlias = Sequence[int | Sequence[int]]
"""The parent of every position, -1 for none, or a sequence of its parents."""


Clamps: TypeAlias = Mapping[int, Edit | Sequence[Edit]]
"""The clamps of each layer, or one; other edits of attention may stand among them."""


@contextmanager
def clamp(model: nn.Module, clamps: Clamps) -> Iterator[None]:
    """Hold parts of attention patterns fixed inside a `with` block, in which the model may train.

    Several clamps of a layer act in the given order. Gradients flow through every weight that is
    not held. Passes may be shorter than the clamps: what they lack is left out. Blocks nest, and a
    probe attached inside reads the clamped pattern: the gradient on a held row of it says what the
    loss would gain there, although no parameter gets it. Leaving the block, also by an exception,
    removes exactly these hooks; gradients, modes and parameters are not touched.

    Args:
        model: a HookedTransformer or TransformerBridge.
        clamps: by layer: `fixed_to`, `previous_token`, `frozen_pattern`, `forbid`, or any edit of
            `edit_attention`, one or a sequence of them.

    Raises:
        ValueError: a layer, head or position that the model lacks, a key after its query in a model
            that attends to earlier positions alone, or something that is no clamp.
        ProbeError: not a TransformerLens model, or as `edit_attention`, in a pass.

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    >>> with clamp(model, {0: previous_token()}):
    ...     model(tokens, return_type="loss").backward()
    >>> [bool(block.attn.W_Q.grad.any()) for block in model.blocks]
    [False, True]
    """
    by_layer = checked_clamps(model, clamps)
    with edit_attention(model, {layer: in_order(edits) for layer, edits in by_layer.items()}):
        yield


def checked_clamps(model: nn.Module, clamps: Clamps) -> dict[int, tuple[Edit, ...]]:
    """The clamps of every layer, checked against a model; errors as in `clamp`."""
    config = config_of(model)
    by_layer: dict[int, tuple[Edit, ...]] = {}
    for layer, given in clamps.items():
        _check_layer(model, layer)
        edits = (given,) if callable(given) else tuple(given)
        for edit in edits:
            if not callable(edit):
                raise ValueError(
                    f"layer {layer}: a {type(edit).__name__} is no clamp: pass fixed_to(...), "
                    "previous_token(), frozen_pattern(...) or forbid(...)"
                )
            if not isinstance(edit, Clamp):
                continue
            edit.check(layer, config.n_heads, config.n_ctx)
            if (ahead := edit.looks_ahead()) is not None and not attends_ahead(model):
                raise ValueError(
                    f"layer {layer}: query {ahead[0]} cannot attend to key {ahead[1]}: this model "
                    "attends to earlier positions and its own alone"
                )
        by_layer[layer] = edits
    return by_layer


def in_order(edits: Sequence[Edit]) -> Edit:
    """One edit that applies several, the first one first."""

    def edit(
        pattern: Float[Tensor, "batch head query key"],
    ) -> Float[Tensor, "batch head query key"]:
        for each in edits:
            pattern = each(pattern)
        return pattern

    return edit


def fixed_to(
    target: Float[Tensor, "query key"] | Float[Tensor, "head query key"] | Parents,
    *,
    head: int | None = None,
) -> Clamp:
    """Hold rows of attention at given weights; rows of zeros stay free.

    Args:
        target: a pattern `[query key]`, or `[head query key]` with one for each head; heads beyond
            them stay free. Or the parents of every position: its row attends to its parent alone
            (to several in equal parts), and a position without parents, -1 or `()`, stays free.
        head: the head to hold; None for all.

    Raises:
        ValueError: a row that is no distribution, a position that does not exist, or a pattern for
            every head together with `head`.

    >>> uniform = torch.ones(3, 3).tril() / torch.tensor([[1.0], [2.0], [3.0]])
    >>> fixed_to([-1, 0, -1])(uniform[None, None])[0, 0]
    tensor([[1.0000, 0.0000, 0.0000],
            [1.0000, 0.0000, 0.0000],
            [0.3333, 0.3333, 0.3333]])
    """
    if not isinstance(target, Tensor):
        return Fixed(_pattern_of(target).unsqueeze(0), head)
    if target.ndim not in (2, 3) or target.shape[-1] != target.shape[-2] or not target.numel():
        raise ValueError(
            f"the pattern has shape {tuple(target.shape)}; expected (query, key) or "
            "(head, query, key), with as many keys as queries"
        )
    weights = (target if target.ndim == 3 else target.unsqueeze(0)).detach().clone()
    _check_rows(weights)
    if head is not None and len(weights) > 1:
        raise ValueError(f"the pattern has {len(weights)} heads, and head {head} is one: slice it")
    return Fixed(weights, head)


def previous_token(head: int | None = None) -> Clamp:
    """Make a perfect previous-token head: every position attends to the one before it alone.

    Position 0, which has none, stays free.

    >>> previous_token()(torch.eye(3)[None, None])[0, 0]
    tensor([[1., 0., 0.],
            [1., 0., 0.],
            [0., 1., 0.]])
    """
    return Previous(head)


def frozen_pattern(
    model: nn.Module,
    layer: int,
    tokens: Int[Tensor, "batch pos"],
    *,
    head: int | None = None,
    max_batch_bytes: int = MAX_BATCH_BYTES,
) -> Clamp:
    """Hold a layer's attention as it is now: its mean pattern over a batch.

    Where attention follows positions alone, the mean is the pattern itself. Where it follows
    tokens, the clamp takes that away. Positions beyond those of the batch stay free.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        layer: the layer to read; hold the same one.
        tokens: sequences without padding.
        head: the head to hold; None for all, each at its own mean.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.

    Raises:
        ValueError: the layer or the head does not exist.
        ProbeError: the tokens do not fit the model.

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> as_now = frozen_pattern(model, 0, torch.randint(20, (16, 8)))
    >>> with clamp(model, {0: as_now}):
    ...     loss = model(torch.randint(20, (4, 8)), return_type="loss")
    """
    pattern = mean_pattern(model, layer, tokens, max_batch_bytes=max_batch_bytes)
    n_heads = len(pattern)
    if head is not None and not 0 <= head < n_heads:
        raise ValueError(f"head {head} does not exist: layer {layer} has heads 0 to {n_heads - 1}")
    return fixed_to(pattern if head is None else pattern[head], head=head)


def mean_pattern(
    model: nn.Module,
    layer: int,
    tokens: Int[Tensor, "batch pos"],
    *,
    max_batch_bytes: int = MAX_BATCH_BYTES,
) -> Float[Tensor, "head query key"]:
    """A layer's mean pattern over a batch; arguments and errors are those of `frozen_pattern`."""
    _check_layer(model, layer)
    tokens = checked_tokens(model, tokens)
    mean = AttentionPattern(layer, reduce="mean")
    with undisturbed(model), attach(model, mean):
        for (batch,) in split(batch_rows(model, tokens.shape[1], max_batch_bytes), tokens):
            run(model, batch)
    pattern: Tensor = mean.reading().sel(layer=layer).values
    return pattern


def forbid(pairs: Sequence[tuple[int, int]], head: int | None = None) -> Clamp:
    """Keep the attention of (query, key) pairs at 0, see `knock_out`; the other keys share it.

    Args:
        pairs: (query, key), key <= query.
        head: the head to hold; None for all.

    Raises:
        ValueError: a negative position, a key after its query, or a row without a key left.

    >>> forbid([(1, 0)])(torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]]))[0, 0, 1]
    tensor([0., 1.])
    """
    return Forbidden(pairs, head)


def _pattern_of(parents: Parents) -> Float[Tensor, "query key"]:
    """The pattern of a graph: 1 / (number of parents) on every parent, in float64."""
    n_positions = len(parents)
    if not n_positions:
        raise ValueError("no positions: fixed_to needs the parents of at least one")
    pattern = torch.zeros(n_positions, n_positions, dtype=torch.float64)
    for position, given in enumerate(parents):
        row = [given] if isinstance(given, int) else list(given)
        row = [] if row == [-1] else row
        for parent in row:
            if not 0 <= parent < n_positions:
                raise ValueError(
                    f"position {position}: parent {parent} does not exist: 0 to {n_positions - 1}, "
                    "or -1 for none"
                )
            pattern[position, parent] = 1 / len(set(row))
    return pattern


def _check_rows(weights: Float[Tensor, "head query key"]) -> None:
    sums, lowest = weights.double().sum(-1), weights.double().amin(-1)
    rounding = min(weights.shape[-1] * torch.finfo(weights.dtype).eps, 1e-3)
    is_free = ~weights.any(-1)
    # `~(... & ...)` also rejects NaN.
    bad = ~((lowest >= -rounding) & ((sums - 1).abs() <= 1e-3)) & ~is_free
    if bad.any():
        head, row = bad.nonzero()[0].tolist()
        raise ValueError(
            f"row {row} of the pattern{'' if len(weights) == 1 else f' of head {head}'} sums to "
            f"{sums[head, row]:g}, its lowest weight is {lowest[head, row]:g}; rows must sum to 1 "
            "within 0.001, or be 0 to stay free"
        )


def _check_layer(model: nn.Module, layer: int) -> None:
    n_layers = config_of(model).n_layers
    if not 0 <= layer < n_layers:
        raise ValueError(
            f"layer {layer} does not exist: the model has {n_layers} layers, 0 to {n_layers - 1}"
        )
    layers_with(model, "pattern", layer)
