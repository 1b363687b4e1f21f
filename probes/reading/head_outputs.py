"""What each head adds to the residual stream, and whether a model adds it up in that way."""

from functools import partial
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.reading.activation import Activation
from probes.reading.attach import attach
from probes.reading.errors import ProbeError
from probes.reading.hook_names import hook_name, hook_points
from probes.reading.hooking import Hooks, converted
from probes.reading.passes import run, undisturbed

_TOLERANCE = 1e-3
"""How far, as a share of the largest entry, rounding may put two ways to the same sum apart."""


def output_weights(model: nn.Module, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """W_O of a layer: head h adds `z_h W_O[h]` to the residual stream."""
    blocks: Any = model.blocks
    weights: Tensor = blocks[layer].attn.W_O.detach()
    return weights


def read_values(
    model: nn.Module, layers: tuple[int, ...], tokens: Int[Tensor, "batch pos"], rows: int
) -> dict[int, Float[Tensor, "batch pos head d_head"]]:
    """The mixed values z of every head, before W_O, by layer.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        layers: the layers to read.
        tokens: the sequences, as `checked_tokens` gives them.
        rows: sequences in one pass.

    Raises:
        ProbeError: a layer has no hook point for z.
    """
    if not layers:
        return {}
    values = Activation("z", layers)
    with undisturbed(model), attach(model, values):
        for batch in tokens.split(rows):
            run(model, batch)
    reading = values.reading()
    return {layer: reading.sel(layer=layer).values for layer in layers}


def check_sum_of_heads(
    model: nn.Module, layers: tuple[int, ...], tokens: Int[Tensor, "batch pos"]
) -> None:
    """Check that attention adds `Σ_h z_h W_O[h] + b_O` to the residual stream.

    Models that normalise or rescale what attention writes (Gemma 2 and 3, OLMo 2, BERT) do not.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        layers: the layers to check.
        tokens: the input of one pass, as `checked_tokens` gives them.

    Raises:
        ProbeError: a layer adds something else, or has no hook points to tell.
    """
    points = hook_points(model)
    names = ("z", "resid_pre", "resid_mid", "resid_post", "mlp_out")
    # Some hook points exist in a model that never runs them.
    by_layer: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}

    def keep(layer: int, name: str, point: nn.Module, _: Any, output: Tensor) -> None:
        by_layer[layer][name] = converted(point, output).clone()

    with undisturbed(model), Hooks() as hooks:
        for layer in layers:
            for name in names:
                if (point := points.get(hook_name(name, layer))) is not None:
                    hooks.add(point, partial(keep, layer, name))
        run(model, tokens)
    for layer, ran in by_layer.items():
        if not {"z", "resid_pre", "resid_post"} <= ran.keys():
            raise ProbeError(
                f"layer {layer} of {type(model).__name__} runs no hook points for z and the "
                "residual stream: single heads' contributions are not defined"
            )
        wide = torch.promote_types(ran["z"].dtype, torch.float32)
        after = ran.get("resid_mid", ran["resid_post"]).to(wide)
        added = after - ran["resid_pre"].to(wide)
        if "resid_mid" not in ran and "mlp_out" in ran:
            added = added - ran["mlp_out"].to(wide)
        written = sum_of_heads(model, layer, ran["z"].to(wide)).to(added)
        rounding = 64 * torch.finfo(ran["z"].dtype).eps * after.abs().max().item()
        allowed = _TOLERANCE * added.abs().max().item() + rounding
        if not (written - added).abs().max().item() <= allowed:
            raise ProbeError(
                f"layer {layer} of {type(model).__name__} does not add the sum of its heads' "
                "outputs to the residual stream (it normalises or rescales them): single heads' "
                "contributions are not defined"
            )


def sum_of_heads(
    model: nn.Module, layer: int, mixed: Float[Tensor, "batch pos head d_head"]
) -> Float[Tensor, "batch pos d_model"]:
    """`Σ_h z_h W_O[h] + b_O`, in the type of z."""
    weights = output_weights(model, layer).to(mixed)
    written = einsum(mixed, weights, "batch pos head i, head i model -> batch pos model")
    blocks: Any = model.blocks
    bias = getattr(blocks[layer].attn, "b_O", None)
    return written if bias is None else written + bias.detach().to(mixed)
