"""Sensitivity to the order of tokens: exact zeros, enumeration of permutations, and what stays."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from mechcausal.models.adapter import HookedTransformer
from probes import order_sensitivity, repeated_tokens
from tests.oracles import seeded
from tests.probes.conftest import Build
from tests.probes.families import some_tokens, tiny
from tests.probes.wired import VOCAB, planted


def without_positions(build: Build, **sizes: Any) -> HookedTransformer:
    model = softened(build, **sizes)
    model.pos_embed.W_pos.data.zero_()
    return model


def softened(build: Build, **sizes: Any) -> HookedTransformer:
    """A model in float64 whose predictions are less sharp than the fixture's."""
    model = build(dtype=torch.float64, **sizes)
    for parameter in model.parameters():
        parameter.data.mul_(0.3)
    return model


def some(batch: int, pos: int, seed: int = 0) -> Tensor:
    return torch.randint(7, (batch, pos), generator=seeded(seed))


@pytest.mark.parametrize(
    ("sizes", "zero"),
    [
        ({"n_layers": 1}, True),
        ({"n_layers": 1, "attention_dir": "bidirectional"}, True),
        ({"n_layers": 3, "attention_dir": "bidirectional"}, True),
        ({"n_layers": 2}, False),
    ],
)
def test_without_positions_only_more_than_one_causal_layer_knows_the_order(
    build: Build, sizes: dict[str, Any], zero: bool
):
    result = order_sensitivity(without_positions(build, **sizes), some(64, 8))
    if zero:
        assert abs(result.kl) < 1e-12
    else:
        assert result.kl > 3 * result.stderr > 0


def test_positions_show_the_order_in_one_layer(build: Build):
    result = order_sensitivity(softened(build, n_layers=1), some(64, 8))
    assert result.kl > 3 * result.stderr > 0


def test_equals_the_mean_over_all_permutations(build: Build):
    model, tokens = softened(build), some(1, 5, seed=2)
    before = model(tokens)[0, -1].log_softmax(-1)
    divergences = {}
    for order in itertools.permutations(range(4)):
        after = model(tokens[:, [*order, 4]])[0, -1].log_softmax(-1)
        divergences[order] = (before.exp() * (before - after)).sum().item()
    # A first token that stays leaves the six permutations of the other three.
    staying = [value for order, value in divergences.items() if order[0] == 0]
    assert len(staying) == 6
    copies = tokens.expand(4000, -1)
    for keep_first, values in ((False, list(divergences.values())), (True, staying)):
        exact = torch.tensor(values)
        result = order_sensitivity(model, copies, n_permutations=1, keep_first=keep_first)
        error = exact.std(correction=0).item() / 4000**0.5
        assert abs(result.kl - exact.mean().item()) < 3 * error
        assert result.stderr == pytest.approx(error, rel=0.2)


def test_the_standard_error_is_over_sequences(build: Build):
    model, tokens = softened(build), some(200, 8)
    parts = [
        order_sensitivity(model, tokens[i : i + 20], generator=seeded(i)) for i in range(0, 200, 20)
    ]
    means = torch.tensor([part.kl for part in parts])
    everything = order_sensitivity(model, tokens)
    assert abs(everything.kl - means.mean().item()) < 3 * 2**0.5 * everything.stderr
    assert 0.4 < means.std().item() / 10**0.5 / everything.stderr < 2.0
    assert torch.tensor(order_sensitivity(model, tokens[:1]).stderr).isnan()


def test_an_induction_circuit_rests_on_the_order():
    circuit = planted(0, n_layers=2, n_heads=6).model
    tokens = repeated_tokens(32, 8, VOCAB, generator=seeded(0))[:, :12]
    result = order_sensitivity(circuit, tokens)
    assert result.kl > 1
    assert result.kl > 10 * result.stderr


def test_the_first_token_stays_if_all_sequences_share_it(build: Build):
    model = build()
    seen: list[Tensor] = []
    handle = model.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with_bos = torch.nn.functional.pad(some(8, 6), (1, 0), value=3)
    assert order_sensitivity(model, with_bos).keeps_first
    assert len(seen) == 5
    for tokens in seen:
        assert (tokens[:, 0] == 3).all()
        assert torch.equal(tokens[:, -1], with_bos[:, -1])
        assert torch.equal(tokens.sort(1).values, with_bos.sort(1).values)
    assert not torch.equal(seen[1], seen[2])
    assert not order_sensitivity(model, some(8, 6)).keeps_first
    handle.remove()


def test_padding_stays_and_the_prediction_is_that_of_the_last_text(build: Build):
    model, tokens = softened(build), some(6, 6)
    padded = torch.nn.functional.pad(tokens, (0, 3), value=4)
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (0, 3))
    seen: list[Tensor] = []
    handle = model.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    result = order_sensitivity(model, padded, attention_mask=mask, n_permutations=2)
    handle.remove()
    for permuted in seen:
        assert torch.equal(permuted[:, 5:], padded[:, 5:])
    # The same permutations of the text alone.
    before, *after = (model(permuted[:, :6])[:, -1].log_softmax(-1) for permuted in seen)
    divergences = [(before.exp() * (before - each)).sum(-1).mean().item() for each in after]
    assert result.kl == pytest.approx(sum(divergences) / 2, abs=1e-12)
    assert not result.keeps_first


def test_left_padding_stays_too(build: Build):
    model, tokens = build(), some(6, 9)
    mask = torch.ones_like(tokens)
    mask[:3, :4] = 0
    seen: list[Tensor] = []
    handle = model.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    order_sensitivity(model, tokens, attention_mask=mask, keep_first=True)
    handle.remove()
    for permuted in seen:
        assert torch.equal(permuted[:3, :5], tokens[:3, :5])  # padding and the first token of text
        assert torch.equal(permuted[3:, :1], tokens[3:, :1])
    assert any(not torch.equal(permuted[:3], tokens[:3]) for permuted in seen)


@pytest.mark.parametrize("family", ["GPT-2", "BERT", "native bridge"])
def test_through_a_bridge(family: str):
    with warnings.catch_warnings(action="ignore"):
        result = order_sensitivity(tiny(family), some_tokens(4, 7))
    assert result.kl > 0
    assert (result.n_permutations, result.n_sequences) == (4, 4)


def test_the_same_generator_gives_the_same_permutations(build: Build):
    model, tokens = build(), some(4, 8)
    first, second = (order_sensitivity(model, tokens, generator=seeded(5)) for _ in range(2))
    assert first == second != order_sensitivity(model, tokens, generator=seeded(6))
