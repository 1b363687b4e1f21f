"""Take heads out of a model and see what it loses: whether a head matters, not how it looks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from probes.heads.head_table import Head
from probes.heads.in_context import repeated_pairs, standard_error
from probes.heads.stimuli import Bos, longest_stimulus
from probes.reading import hook_names
from probes.reading.attach import ForwardHook, attach
from probes.reading.errors import ProbeError
from probes.reading.hook_names import attention_layers, config_of, hook_points
from probes.reading.hooking import Hooks
from probes.reading.labelled import LabelledTensor
from probes.reading.padding import real_positions
from probes.reading.passes import (
    MAX_BATCH_BYTES,
    batch_rows,
    checked_tokens,
    run,
    split,
    token_losses,
    undisturbed,
)
from probes.reading.records import LayerProbe, Sum

NEGLIGIBLE = 0.05
"""Rise of the loss, in nats, which a head may cost, within two standard errors, to be removable."""


@dataclass(frozen=True)
class AblationEffect:
    """What the repeated half loses when one head is replaced by its mean.

    Attributes:
        layer: the head's layer.
        head: its number there.
        rise: mean rise of the loss, in nats per token.
        stderr: its standard error, paired over sequences (NaN for one sequence).
        loss: the loss before, in nats per token.
        removable: whether `rise + 2 stderr < negligible`; False where stderr is NaN.
    """

    layer: int
    head: int
    rise: float
    stderr: float
    loss: float
    removable: bool


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

    Every head's mixed values z (before W_O) become their mean over all sequences and positions
    of a reference batch, which one pass at the start of the block reads. The head then says the
    same everywhere: its information is gone, its average contribution stays. All heads of the
    list are replaced together. Leaving the block, by an exception too, removes exactly these hooks.

    Args:
        model: a HookedTransformer or TransformerBridge.
        heads: the heads as (layer, head); with an empty list nothing changes.
        tokens: the reference batch; None for 16 sequences of random tokens repeated twice.
        attention_mask: 0 at the reference's padding, which the mean leaves out; None for what
            the tokenizer's PAD token tells, see `padding.real_positions`.
        max_batch_bytes: bound on the estimated activations of one reference pass, in bytes.

    Raises:
        ProbeError: a head does not exist, or the tokens do not fit the model.

    >>> from transformer_lens import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    >>> before = model(tokens)
    >>> with mean_ablate(model, [(0, 1)], tokens=tokens):
    ...     assert not torch.equal(model(tokens), before)
    >>> torch.equal(model(tokens), before)
    True
    """
    by_layer = _by_layer(model, heads)
    if not by_layer:
        yield
        return
    reference, real = _text(model, tokens, attention_mask, n_sequences=16)
    means = _mean_z(model, tuple(by_layer), reference, real, max_batch_bytes)
    with _replaced(model, by_layer, means):
        yield


def ablation_effects(
    model: nn.Module,
    heads: Sequence[Head],
    *,
    tokens: Int[Tensor, "batch pos"] | None = None,
    attention_mask: Shaped[Tensor, "batch mask_pos"] | None = None,
    n_sequences: int = 32,
    repeat_length: int | None = None,
    generator: torch.Generator | None = None,
    negligible: float = NEGLIGIBLE,
    max_batch_bytes: int = MAX_BATCH_BYTES,
    bos: Bos = "auto",
) -> tuple[AblationEffect, ...]:
    """How much the loss on the repeated half rises when each head, alone, is mean-ablated.

    `rise = mean over sequences of (loss without the head - loss with it)`, each the mean over
    the tokens that induction can predict (`repeated_pairs`: in the second copy, from its second
    token on). The reference of the ablation is the same sequences.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        heads: the heads as (layer, head).
        tokens: sequences in which pairs of tokens recur; None for random tokens repeated twice.
        attention_mask: 0 at their padding, which counts nowhere; see `mean_ablate`.
        n_sequences: how many to draw.
        repeat_length: tokens in the block, at least 3; None for the longest that fits, at most 50.
        generator: the source of randomness; None for a new one with seed 0.
        negligible: a rise clearly below this many nats makes a head removable.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.
        bos: token in front: a token, None, or "auto" for what the tokenizer asks for.

    Returns:
        One effect per head, in the order of `heads`. Cost: one pass each, and two more.

    Raises:
        ValueError: `n_sequences` or `repeat_length` is too small.
        ProbeError: a head does not exist, a context too short for two repeats, tokens that do
            not fit or do not recur, or a model that does not predict the tokens it reads.
    """
    by_layer = _by_layer(model, heads)
    if not by_layer:
        return ()
    tokens, real = _text(
        model,
        tokens,
        attention_mask,
        n_sequences=n_sequences,
        repeat_length=repeat_length,
        generator=generator,
        bos=bos,
    )
    pairs = repeated_pairs(tokens, real)
    used = pairs.any(1)
    if not used.any():
        raise ProbeError("no pair of tokens recurs in the sequences given: there is no loss to ask")
    pairs = pairs[used]
    means = _mean_z(model, tuple(by_layer), tokens, real, max_batch_bytes)
    # Random tokens have no padding, whatever the tokenizer would take for it.
    mask = torch.ones_like(tokens[used]) if real is None else real[used]

    def loss() -> Float[Tensor, "batch"]:
        losses = token_losses(
            model, tokens[used], attention_mask=mask, max_batch_bytes=max_batch_bytes
        )
        weights = (pairs / pairs.sum(1, keepdim=True)).to(losses)
        return (losses.double().where(pairs.to(losses.device), 0.0) * weights).sum(1)

    whole = loss()
    effects = []
    for layer, head in heads:
        with _replaced(model, {layer: (head,)}, means):
            rises = loss() - whole
        rise, stderr = rises.mean().item(), standard_error(rises).item()
        removable = rise + 2 * stderr < negligible
        effects.append(AblationEffect(layer, head, rise, stderr, whole.mean().item(), removable))
    return tuple(effects)


def _text(
    model: nn.Module, tokens: Tensor | None, attention_mask: Tensor | None, **drawing: Any
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None]:
    """The tokens given, or random ones, and where they are no padding (None: everywhere)."""
    if tokens is None:
        return longest_stimulus(model, **drawing)[0].tokens, None
    tokens = checked_tokens(model, tokens)
    return tokens, real_positions(model, tokens, attention_mask)


class _MeanZ(LayerProbe[Sum]):
    """Mean over sequences and positions of every head's mixed values.

    Attributes:
        real: False at positions of the next pass that are left out; None for none.
    """

    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__(layers, Sum)
        self.real: Tensor | None = None

    def hooks(self, model: nn.Module) -> Mapping[str, ForwardHook]:
        return {hook_names.z(layer): partial(self._read, layer) for layer in self._layers(model)}

    def _read(self, layer: int, z: Tensor) -> None:
        positions = z.flatten(0, 1)
        if self.real is not None:
            positions = positions[self.real.flatten().to(z.device)]
        self._records[layer].add(positions)

    def _seen(self) -> str:
        return "forward pass"

    def reading(self) -> LabelledTensor:
        records = self._complete_records()
        values = self._stack({layer: record.mean() for layer, record in records.items()})
        axes = ("layer", "head", "d_head")
        return LabelledTensor("mean_z", values, axes, {"layer": tuple(records)})


def _by_layer(model: nn.Module, heads: Sequence[Head]) -> dict[int, tuple[int, ...]]:
    """The heads of each layer, checked to exist."""
    config = config_of(model)
    by_layer: dict[int, tuple[int, ...]] = {}
    for layer, head in heads:
        attention_layers(model, layer)
        if not 0 <= head < config.n_heads:
            raise ProbeError(
                f"head {layer}.{head} does not exist: layers have {config.n_heads} heads, "
                f"0 to {config.n_heads - 1}"
            )
        by_layer[layer] = (*by_layer.get(layer, ()), head)
    return by_layer


def _mean_z(
    model: nn.Module,
    layers: tuple[int, ...],
    tokens: Tensor,
    real: Tensor | None,
    max_batch_bytes: int,
) -> LabelledTensor:
    rows = batch_rows(model, tokens.shape[1], max_batch_bytes)
    with undisturbed(model), attach(model, _MeanZ(layers)) as (mean,):
        for batch, there in split(rows, tokens, real):
            mean.real = there
            run(model, batch, there)
    return mean.reading()


@contextmanager
def _replaced(
    model: nn.Module, by_layer: Mapping[int, tuple[int, ...]], means: LabelledTensor
) -> Iterator[None]:
    points = hook_points(model)
    with Hooks() as hooks:
        for layer, heads in by_layer.items():
            hook = _replaces(heads, means.sel(layer=layer).values[list(heads)])
            hooks.add(points[hook_names.z(layer)], hook)
        yield


def _replaces(
    heads: tuple[int, ...], values: Float[Tensor, "head d_head"]
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def replace(point: nn.Module, inputs: tuple[Any, ...], activation: Tensor) -> Tensor:
        # Bridges keep z as [batch, pos, head · d_head].
        conversion: Any = getattr(point, "hook_conversion", None)
        z = activation if conversion is None else conversion.convert(activation)
        z = z.clone()
        z[:, :, list(heads)] = values.to(z)
        replaced: Tensor = z if conversion is None else conversion.revert(z)
        return replaced

    return replace
