"""Clamped models: hooks and closed form hold the same rows, and give the same gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mechcausal.models.base import GraphModel, ModelError
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.models.standard import StandardTransformer, standard_config
from mechcausal.tasks.base import cross_entropies
from probes import AttentionPattern, attach, fixed_to, forbid, frozen_pattern, previous_token
from tests.left_as_found import left_as_found
from tests.oracles import seeded
from tests.refusals import raises_one_line

S, T = 3, 6
PARENTS = [-1, 0, 0, 2, -1, -1]
CLAMPS: dict[str, Any] = {
    "graph": {0: fixed_to(PARENTS)},
    "previous token in a head": {0: previous_token(head=0)},
    "forbidden": {0: forbid([(3, 2), (5, 5)]), 1: forbid([(5, 1)])},
    "the last row": {1: fixed_to([-1, -1, -1, -1, -1, (0, 3)])},
    "both layers": {0: [fixed_to(PARENTS), forbid([(4, 0)])], 1: [previous_token()]},
}
MODELS = {
    "simplified": lambda: SimplifiedTransformer(S, T),
    **{f"disentangled {n}": lambda n=n: DisentangledTransformer(S, T, n) for n in ((1, 1), (2, 1))},
    "three layers": lambda: DisentangledTransformer(S, T, (1, 2, 1)),
}


def drawn(make: Any) -> Any:
    """A random model in float64."""
    model: GraphModel = make()
    model.hooked.double()
    with torch.no_grad():
        for number, block in enumerate(model._trained_blocks()):
            block.add_(0.5 * torch.randn(block.shape, generator=seeded(number)))
    return model


def tokens_of(n: int = 12) -> Tensor:
    return torch.randint(S, (n, T), generator=seeded(3))


def outputs_and_gradients(model: GraphModel, hooked: bool) -> list[Tensor]:
    """The predictions, and the gradients in the trained blocks."""
    tokens = tokens_of()
    prediction = model.probabilities(model.hooked(tokens)) if hooked else model(tokens)
    target = torch.rand(12, S, generator=seeded(5), dtype=torch.float64).softmax(-1)
    model.hooked.zero_grad()
    cross_entropies(prediction, target, epsilon=1e-3).mean().backward()
    result = [prediction.detach()]
    for name, parameter in model.parameters_by_name.items():
        gradient = parameter.grad
        assert gradient is not None, name
        if isinstance(model, SimplifiedTransformer):  # hooks reach entries outside of A1 and A2
            block = model._position_block if name == "A1" else model._token_block
            gradient = block(gradient)
        elif name != "W":
            width = model.widths[int(name[1:]) - 1]  # type: ignore[attr-defined]
            gradient = gradient[: model.heads[int(name[1:]) - 1], :width, :width]
        result.append(gradient.clone())
    return result


@pytest.mark.parametrize("clamps", CLAMPS.values(), ids=CLAMPS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_hooks_and_closed_form_agree(make: Any, clamps: Any):
    model = drawn(make)
    free = outputs_and_gradients(model, hooked=False)
    with model.clamped(clamps):
        closed = outputs_and_gradients(model, hooked=False)
        hooked = outputs_and_gradients(model, hooked=True)
    for ours, theirs in zip(closed, hooked, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)
    assert not torch.allclose(closed[0], free[0])
    assert torch.equal(outputs_and_gradients(model, hooked=False)[0], free[0])


def test_held_rows_of_layer_1_get_no_gradient():
    model = drawn(MODELS["simplified"])
    with model.clamped({0: fixed_to(PARENTS)}):
        _, gradient, second = outputs_and_gradients(model, hooked=False)
    rows = gradient.any(1).tolist()
    # Position 0 sees one key, so that its row has no gradient anyway.
    assert rows == [False, False, False, False, True, True]
    assert second.any()


def test_a_frozen_pattern_stays_while_weights_move():
    model = drawn(MODELS["simplified"])
    with torch.no_grad():
        before = model.attention1()
        with model.clamped({0: frozen_pattern(model.hooked, 0, tokens_of())}):
            model.A1.mul_(-3)
            torch.testing.assert_close(model.attention1(), before)
        assert not torch.allclose(model.attention1(), before)


def test_blocks_nest_and_several_models_are_clamped_one_by_one():
    model, other = drawn(MODELS["simplified"]), drawn(MODELS["simplified"])
    tokens = torch.stack([tokens_of(), tokens_of().flip(0)])
    with model.clamped({0: fixed_to(PARENTS)}):
        with model.clamped({0: forbid([(5, 4)]), 1: forbid([(5, 5)])}):
            inner = model(tokens[0])
        outer = model(tokens[0])
        together = SimplifiedTransformer.predict_each([model, other], tokens)
    with model.clamped({0: [fixed_to(PARENTS), forbid([(5, 4)])], 1: forbid([(5, 5)])}):
        assert torch.equal(model(tokens[0]), inner)
    assert not torch.allclose(outer, inner)
    assert torch.equal(together[0], outer)
    assert torch.equal(together[1], other(tokens[1]))


def test_a_standard_model_is_clamped_through_its_hooks():
    model = StandardTransformer(standard_config(S, T, d_model=8, n_heads=2))
    with model.clamped({1: previous_token(head=1)}):
        with attach(model.hooked, AttentionPattern(1)) as (pattern,):
            model(tokens_of())
        row = pattern.reading().sel(layer=1).values[0, :, 5]
    assert row[1].tolist() == [0, 0, 0, 0, 1, 0]
    assert row[0].all()


def test_nothing_is_left_and_mistakes_are_one_line():
    model = drawn(MODELS["disentangled (2, 1)"])
    mistake = raises_one_line(ValueError, "head 1 does not exist: layer 1 has 1 heads")
    with left_as_found(model.hooked):
        with model.clamped(CLAMPS["both layers"]), torch.no_grad():
            assert model.is_clamped
            model(tokens_of())
        with mistake, model.clamped({1: previous_token(head=1)}):  # of the hooked model's two
            pass
        assert not model.is_clamped

    class Own(SimplifiedTransformer):
        kind = "own"
        closed_form_is_clamped = False

    with (
        raises_one_line(ModelError, "Own computes attention in a closed form"),
        Own(S, T).clamped({0: previous_token()}),
    ):
        pass
