"""Read one head's attention and attention-weighted values on one sequence."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.reading.activation import Activation
from probes.reading.attach import attach
from probes.reading.hook_names import check_head, layers_with
from probes.reading.passes import checked_tokens, run, undisturbed


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
    layer = layers_with(model, "pattern", layer)[-1]
    check_head(model, (layer, head))
    pattern, z = Activation("pattern", layer), Activation("z", layer)
    with undisturbed(model), attach(model, pattern, *([z] if values else [])):
        run(model, tokens)
    mixed_values = z.reading().values[0, 0, :, head].cpu().double().numpy() if values else None
    return HeadReading(pattern.reading().values[0, 0, head], mixed_values, layer)
