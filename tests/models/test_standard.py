"""The standard transformer: its starts, its files, and that it is one HookedTransformer."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mechcausal.models.standard import StandardTransformer, standard_config
from tests.oracles import seeded

S, T = 5, 9

SETTINGS: list[dict[str, Any]] = [
    {},
    {"d_mlp": 24},
    {"n_layers": 1, "n_heads": 4, "d_mlp": 24, "layer_norm": True},
    {"n_layers": 3, "positions": "shortformer"},
]


def build(seed: int = 0, fixed_embeddings: bool = False, **settings: Any) -> StandardTransformer:
    config = standard_config(S, T, d_model=16, **({"n_heads": 2} | settings))
    return StandardTransformer(config, seed=seed, fixed_embeddings=fixed_embeddings)


def random_tokens(n: int = 12) -> Tensor:
    return torch.randint(S, (n, T), generator=seeded(3))


def values(model: StandardTransformer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.hooked.named_parameters()}


def train_a_little(model: StandardTransformer) -> None:
    optimizer = torch.optim.AdamW(model.parameters_by_name.values(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(random_tokens())[:, 0].log().mean().neg().backward()
        optimizer.step()


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_settings_make_the_model_that_they_name(settings: dict[str, Any]) -> None:
    model = build(**settings)
    names = list(model.parameters_by_name)
    assert any(".mlp." in name for name in names) == ("d_mlp" in settings)
    # LayerNorm has weights and biases, or it is not there at all.
    assert any(".ln" in name for name in names) == settings.get("layer_norm", False)
    n_layers, n_heads = settings.get("n_layers", 2), settings.get("n_heads", 2)
    assert model.heads == (n_heads,) * n_layers
    assert (model.vocab_size, model.sequence_length) == (S, T)
    weight = model.hooked.blocks[0].attn.W_Q
    assert weight.shape == (n_heads, 16, 16 // n_heads)


def test_shortformer_positions_stay_out_of_the_residual_stream() -> None:
    tokens = torch.zeros(1, T, dtype=torch.int64)
    for positions, differ in (("standard", True), ("shortformer", False)):
        model = build(positions=positions)
        _, cache = model.hooked.run_with_cache(tokens)
        read = cache["blocks.0.attn.hook_v"]
        assert bool((read[:, 0] != read[:, 1]).any()) == differ
        queries = cache["blocks.0.attn.hook_q"]
        assert bool((queries[:, 0] != queries[:, 1]).any())


def test_fixed_embeddings_are_one_hot_and_not_trained() -> None:
    model = build(fixed_embeddings=True)
    expected = torch.eye(S + T, 16)
    tokens, positions = model.hooked.embed.W_E, model.hooked.pos_embed.W_pos
    assert torch.equal(torch.cat([tokens, positions]), expected)
    assert not {"embed.W_E", "pos_embed.W_pos"} & set(model.parameters_by_name)
    before = values(model)
    train_a_little(model)
    assert torch.equal(torch.cat([tokens, positions]), expected)
    after = values(model)
    assert not torch.equal(after["blocks.0.attn.W_Q"], before["blocks.0.attn.W_Q"])


def test_learned_embeddings_are_trained() -> None:
    model = build()
    before = values(model)
    train_a_little(model)
    for name, value in values(model).items():
        # The queries' part of the bias is the same for all keys of a row: softmax removes it.
        if not name.endswith(("b_K", "b_Q")):
            assert not torch.equal(value, before[name]), name


def test_fixed_embeddings_need_their_width() -> None:
    config = standard_config(S, T, d_model=13, n_heads=1)
    with pytest.raises(ValueError, match=r"d_model is 13: .* 5 tokens and 9 positions need 14"):
        StandardTransformer(config, fixed_embeddings=True)


@pytest.mark.parametrize("fixed", [False, True])
def test_the_seed_makes_the_weights_and_the_global_generator_stays(fixed: bool) -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = values(build(seed=1, fixed_embeddings=fixed, d_mlp=24))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = values(build(seed=1, fixed_embeddings=fixed, d_mlp=24))
    other = values(build(seed=2, fixed_embeddings=fixed, d_mlp=24))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.1.attn.W_V"], other["blocks.1.attn.W_V"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_seed_means_the_same_weights_on_cuda() -> None:
    state = torch.cuda.get_rng_state()
    for fixed in (False, True):
        on_cuda = values(build(seed=1, fixed_embeddings=fixed, device="cuda"))
        assert torch.equal(torch.cuda.get_rng_state(), state)
        for name, value in values(build(seed=1, fixed_embeddings=fixed)).items():
            assert on_cuda[name].device.type == "cuda"
            torch.testing.assert_close(on_cuda[name].cpu(), value)


def test_the_initial_scale_is_that_of_all_weights_or_transformer_lenss_own() -> None:
    for scale, expected in ((0.0, 0.8 / 64**0.5), (0.02, 0.02)):
        model = StandardTransformer(standard_config(10, 20, d_mlp=64, initial_scale=scale))
        spread = model.hooked.blocks[0].attn.W_Q.std().item()
        assert spread == pytest.approx(expected, rel=0.05)
