"""Hand the attention patterns of many sequences to a function, one layer of one pass at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from jaxtyping import Bool, Int
from torch import Tensor, nn

from probes.reading.errors import ProbeError
from probes.reading.hook_names import hook_name, hook_points
from probes.reading.hooking import Hooks, converted
from probes.reading.passes import batch_rows, run, split, undisturbed

ReadPattern: TypeAlias = Callable[[int, slice, Tensor], None]
"""Receives the layer, which of the sequences are in the pass, and their pattern."""


def read_patterns(
    model: nn.Module,
    layers: tuple[int, ...],
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"] | None,
    read: ReadPattern,
    *,
    max_batch_bytes: int,
) -> None:
    """Call `read(layer, rows, pattern)` for every layer of every pass over the sequences.

    The pattern is `[batch head query key]`, in evaluation mode and without gradients; it shares
    memory with the model and must not be written to.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        layers: the layers to read, as `layers_with` gives them.
        tokens: the sequences, as `checked_tokens` gives them.
        real: False at padding; None if there is no padding.
        read: receives each pattern.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.

    Raises:
        ProbeError: a layer runs no pattern hook.
    """
    points = hook_points(model)
    size = batch_rows(model, tokens.shape[1], max_batch_bytes)
    unread: set[int] = set()

    def at_pattern(layer: int, rows: slice, point: nn.Module, inputs: Any, weights: Tensor) -> None:
        unread.discard(layer)
        read(layer, rows, converted(point, weights))

    with undisturbed(model):
        for index, (batch, batch_real) in enumerate(split(size, tokens, real)):
            unread.update(layers)
            rows = slice(index * size, index * size + len(batch))
            with Hooks() as hooks:
                for layer in layers:
                    hooks.add(points[hook_name("pattern", layer)], partial(at_pattern, layer, rows))
                run(model, batch, batch_real)
            if unread:
                raise ProbeError(
                    f"{type(model).__name__} shows no attention pattern in layers {sorted(unread)}"
                )
