"""Activations against the model's own cache, at every hook point, for both kinds of model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from probes import Activation, attach
from probes.reading.hook_names import LAYER_HOOKS, hook_name
from tests.probes.families import some_tokens, tiny

close = torch.testing.assert_close


@pytest.mark.parametrize("hook", LAYER_HOOKS)
@pytest.mark.parametrize("family", ["HookedTransformer", "GPT-2", "Llama"])
def test_every_hook_point_is_read_as_the_model_caches_it(family: str, hook: str):
    model, tokens = tiny(family), some_tokens()
    apart, mean = Activation(hook), Activation(hook, reduce="mean")
    with torch.no_grad(), attach(model, apart, mean):
        _, cache = model.run_with_cache(tokens)
        model(tokens)
    for layer in (0, 1):
        reading = apart.reading().sel(layer=layer)
        assert reading.axes == LAYER_HOOKS[hook][1]
        cached = cache[hook_name(hook, layer)].reshape(reading.values[:2].shape)
        close(reading.values, torch.cat([cached, cached]))
        averaged = mean.reading().sel(layer=layer).values
        close(averaged, cached.double().mean(0).float())  # masked scores overflow in float32
    assert mean.reading().axes == ("layer", *LAYER_HOOKS[hook][1][1:])


def test_a_function_chooses_the_rows_of_the_mean(model: Any, tokens: Tensor):
    def last_two(z: Tensor) -> Tensor:
        return z[:, -2:].flatten(0, 1)

    chosen = Activation("z", 1, reduce=last_two, axes=("head", "d_head"))
    with attach(model, chosen):
        _, cache = model.run_with_cache(tokens)
        model(tokens[:1])
    rows = torch.cat([cache["z", 1][:, -2:].flatten(0, 1), cache["z", 1][0, -2:]])
    reading = chosen.reading()
    assert reading.shape == {"layer": 1, "head": 2, "d_head": 4}
    close(reading.sel(layer=1).values, rows.mean(0))
