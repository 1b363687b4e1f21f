"""Read one head's attention and attention-weighted values on one sequence."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.reading import hook_names
from probes.reading.attach import ForwardHook, attach
from probes.reading.attention import AttentionPattern
from probes.reading.errors import ProbeError
from probes.reading.labelled import LabelledTensor
from probes.reading.passes import checked_tokens, run, undisturbed
from probes.reading.records import Concatenated, LayerProbe


@dataclass(frozen=True, eq=False)
class HeadReading:
    """One head's attention on one sequence.

    Attributes:
        attention: the pattern after the softmax.
        mixed_values: attention-weighted values A V (`hook_z`); None if not requested.
        layer: index of the layer.
    """

    attention: Float[Tensor, "query key"]
    mixed_values: Float[np.ndarray, "query d_head"] | None
    layer: int


def read_head(
    model: nn.Module,
    tokens: Int[Tensor, "*batch pos"],
    *,
    layer: int | None = None,
    head: int = 0,
    values: bool = False,
) -> HeadReading:
    """Run the model on one sequence and read one head.

    Args:
        model: the model; unchanged.
        tokens: `[pos]` or `[1 pos]`.
        layer: default: the deepest layer with attention.
        head: index of the head.
        values: whether to read the attention-weighted values too.

    Raises:
        ValueError: the tokens are not one sequence.
        ProbeError: an unknown layer or head, tokens that the model cannot take, or hooks that did
            not fire.
    """
    if tokens.ndim == 1:
        tokens = tokens[None]
    tokens = checked_tokens(model, tokens)
    if len(tokens) != 1:
        raise ValueError(f"tokens hold {len(tokens)} sequences; discovery reads one at a time")
    layer = hook_names.attention_layers(model, layer)[-1]
    config: Any = model.cfg
    if not 0 <= head < config.n_heads:
        raise ProbeError(
            f"head {head} does not exist: layer {layer} has {config.n_heads} heads, "
            f"0 to {config.n_heads - 1}"
        )
    pattern = AttentionPattern(layer)
    mixed = _MixedValues(layer)
    with undisturbed(model), attach(model, pattern):
        if values:
            with attach(model, mixed):
                run(model, tokens)
        else:
            run(model, tokens)
    attention = pattern.reading().values[0, 0, head]
    if not values:
        return HeadReading(attention, None, layer)
    z = mixed.reading().values[0, 0, :, head].cpu().double().numpy()
    return HeadReading(attention, z, layer)


class _MixedValues(LayerProbe[Concatenated]):
    """Attention-weighted values of every head, `[layer batch pos head d_head]`."""

    def __init__(self, layers: hook_names.Layers = None) -> None:
        super().__init__(layers, Concatenated)

    def hooks(self, model: nn.Module) -> Mapping[str, ForwardHook]:
        return {hook_names.z(layer): partial(self._read, layer) for layer in self._layers(model)}

    def _read(self, layer: int, z: Tensor) -> None:
        self._records[layer].add(z)

    def _seen(self) -> str:
        return "forward pass"

    def reading(self) -> LabelledTensor:
        records = self._complete_records()
        values = self._stack({layer: record.values() for layer, record in records.items()})
        axes = ("layer", "batch", "pos", "head", "d_head")
        return LabelledTensor("mixed_values", values, axes, {"layer": tuple(records)})
