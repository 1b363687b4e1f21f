"""Weights of a HookedTransformer that are computed from fewer parameters, such as tied ones.

`torch.nn.utils.parametrize` makes `attn.W_Q` a function of the parameters, so hooks, gradients and
TransformerLens's own code see an ordinary weight. Files hold the ordinary weight: `plain_weights`
and `load_plain_weights` translate, so that a bare HookedTransformer can read them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_MARK = ".parametrizations."


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight by TransformerLens's name, detached; those that are computed, computed.

    Example:
        >>> [name for name in plain_weights(nn.Linear(1, 2))]
        ['weight', 'bias']
    """
    weights = {}
    for name, parameter in model.named_parameters():
        owner, mark, rest = name.partition(_MARK)
        if mark:
            weight = rest.split(".")[0]
            parameter = getattr(model.get_submodule(owner), weight)
            name = f"{owner}.{weight}"
        weights[name] = parameter.detach()
    return weights


@torch.no_grad()
def load_plain_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set every weight by TransformerLens's name, in place; names must be those of `plain_weights`.

    Raises:
        ValueError: a name is missing or unknown.
        RuntimeError: a weight has another shape.
    """
    names = plain_weights(model).keys()
    if unmatched := sorted(names ^ weights.keys()):
        raise ValueError(f"{unmatched[0]} is not in both")
    computed = names - dict(model.named_parameters()).keys()
    model.load_state_dict({n: w for n, w in weights.items() if n not in computed}, strict=False)
    for name in computed:
        owner, _, weight = name.rpartition(".")
        shape = getattr(model.get_submodule(owner), weight).shape
        if weights[name].shape != shape:
            raise RuntimeError(f"{name} has the shape {tuple(weights[name].shape)}")
        setattr(model.get_submodule(owner), weight, weights[name])
