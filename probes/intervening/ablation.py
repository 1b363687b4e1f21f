"""Replace heads by their mean: whether a model needs them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from probes.heads.stimuli import longest_stimulus
from probes.reading.activation import Activation
from probes.reading.attach import attach
from probes.reading.hook_names import Head, check_head, hook_name, hook_points
from probes.reading.hooking import Hooks
from probes.reading.labelled import LabelledTensor
from probes.reading.padding import real_positions
from probes.reading.passes import (
    MAX_BATCH_BYTES,
    batch_rows,
    checked_tokens,
    run,
    split,
    undisturbed,
)


@contextmanager
def mean_ablate(
    model: nn.Module,
    heads: Sequence[Head],
    *,
    tokens: Int[Tensor, "batch pos"] | None = None,
    attention_mask: Shaped[Tensor, "batch mask_pos"] | None = None,
    max_batch_bytes: int = MAX_BATCH_BYTES,
) -> Iterator[None]:
    """Replace heads by their mean for the length of a `with` block.

    The mixed values z of each head (before W_O) become their mean over all sequences and positions
    of a reference batch, computed in one pass at the start of the block. The head then writes the
    same vector at every position: the mean stays, the information is gone. All heads of the list
    are replaced together. Leaving the block, also by an exception, removes exactly these hooks.

    Args:
        model: a HookedTransformer or TransformerBridge.
        heads: the heads as (layer, head); an empty list changes nothing.
        tokens: the reference batch; None for 16 sequences of random tokens repeated twice.
        attention_mask: 0 at padding of the reference, which the mean skips; None to find padding by
            the tokenizer's PAD token, see `padding.real_positions`.
        max_batch_bytes: bound on the estimated activations of one reference pass, in bytes.

    Raises:
        ProbeError: a head does not exist, or the tokens do not fit the model.

    >>> import torch
    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    >>> before = model(tokens)
    >>> with mean_ablate(model, [(0, 1)], tokens=tokens):
    ...     assert not torch.equal(model(tokens), before)
    >>> torch.equal(model(tokens), before)
    True
    """
    by_layer = heads_by_layer(model, heads)
    if not by_layer:
        yield
        return
    reference, real = tokens_and_real(model, tokens, attention_mask, n_sequences=16)
    means = mean_z(model, tuple(by_layer), reference, real, max_batch_bytes)
    with replaced(model, by_layer, means):
        yield


def tokens_and_real(
    model: nn.Module, tokens: Tensor | None, attention_mask: Tensor | None, **drawing: Any
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None]:
    """The given or random tokens, and where they are not padding (None: everywhere)."""
    if tokens is None:
        return longest_stimulus(model, **drawing)[0].tokens, None
    tokens = checked_tokens(model, tokens)
    return tokens, real_positions(model, tokens, attention_mask)


def heads_by_layer(model: nn.Module, heads: Sequence[Head]) -> dict[int, list[int]]:
    """The heads of each layer.

    Raises:
        ProbeError: a head does not exist.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        check_head(model, (layer, head))
        by_layer.setdefault(layer, []).append(head)
    return by_layer


def mean_z(
    model: nn.Module,
    layers: tuple[int, ...],
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"] | None,
    max_batch_bytes: int,
) -> LabelledTensor:
    """Mean over sequences and positions of every head's mixed values, without padding."""
    batch_real: Tensor | None = None

    def text_positions(z: Tensor) -> Tensor:
        return z.flatten(0, 1) if batch_real is None else z[batch_real.to(z.device)]

    mean = Activation("z", layers, reduce=text_positions, axes=("head", "d_head"))
    rows = batch_rows(model, tokens.shape[1], max_batch_bytes)
    with undisturbed(model), attach(model, mean):
        for batch, batch_real in split(rows, tokens, real):
            run(model, batch, batch_real)
    return mean.reading()


@contextmanager
def replaced(
    model: nn.Module, by_layer: Mapping[int, list[int]], means: LabelledTensor
) -> Iterator[None]:
    """Replace the mixed values of heads by their means inside the block."""
    points = hook_points(model)
    with Hooks() as hooks:
        for layer, heads in by_layer.items():
            replace = partial(_with_values, heads, means.sel(layer=layer).values[heads])
            hooks.edit(points[hook_name("z", layer)], replace)
        yield


def _with_values(heads: list[int], values: Float[Tensor, "head d_head"], z: Tensor) -> Tensor:
    replaced = z.clone()
    replaced[:, :, heads] = values.to(z)
    return replaced
