"""Our HookedTransformer, used under TransformerLens 4.x, computes what that of 3.9 computes."""

import dataclasses
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_lens
from torch import Tensor

from mechcausal.models import CONFIG_FILE, WEIGHTS_FILE, adapter, hooked_config, hooked_transformer
from mechcausal.models.adapter import build_hooked, load_model, save_model
from mechcausal.models.wired_weights import plain_weights
from tests.lens_versions import needs_lens_3
from tests.models.test_every_kind import MAKERS, S, T, small_hooked, tokens_of, trained
from tests.oracles import seeded

close = torch.testing.assert_close
OWN = hooked_transformer.HookedTransformer
OWN_CONFIG = hooked_config.HookedTransformerConfig


def trained_hooked(make: Callable[[], Any]) -> Any:
    return trained(make).hooked


# Bound on the largest difference, relative to the largest value.
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}
MODELS: dict[str, Callable[[], Any]] = {
    **{name: partial(trained_hooked, make) for name, make in MAKERS.items()},
    "bidirectional": lambda: small_hooked(attention_dir="bidirectional"),
    "activations": lambda: small_hooked(act_fn="gelu_new", d_vocab_out=3),
    "SiLU": lambda: small_hooked(act_fn="silu", init_weights=True, seed=5),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def differ_at_most(ours: Tensor, theirs: Tensor, bound: float, scale: float = 1.0) -> None:
    """Compare, relative to the largest value, or to `scale` where values cancel."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    infinite = theirs.isinf()
    assert torch.equal(ours[infinite], theirs[infinite])
    finite = theirs[~infinite]
    error = (ours[~infinite] - finite).abs().max().item()
    assert error <= bound * max(scale, finite.abs().max().item())


def copy_as(model: Any, config_class: Any, model_class: Any, dtype: torch.dtype) -> Any:
    """The model again, as another class, in a dtype."""
    config = config_class(**model.cfg.to_dict() | {"dtype": dtype, "seed": None})
    other = model_class(config)
    # Weights that are computed from fewer parameters become parameters of the copy.
    buffers = dict(model.named_buffers())
    state = {name: value for name, value in model.state_dict().items() if name in buffers}
    other.load_state_dict(state | plain_weights(model))
    trained = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        parameter.requires_grad_(name not in trained or trained[name].requires_grad)
    return other


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@needs_lens_3
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@every_model
def test_outputs_activations_and_gradients_are_those_of_transformer_lens(
    make: Callable[[], Any], dtype: torch.dtype
) -> None:
    original, bound = make(), BOUNDS[dtype]
    theirs = copy_as(original, adapter.HookedTransformerConfig, build_hooked, dtype)
    ours = copy_as(original, OWN_CONFIG, OWN, dtype)
    length = original.cfg.n_ctx
    tokens = tokens_of(size=original.cfg.d_vocab, length=length)
    padding = torch.ones(len(tokens), length, dtype=torch.int64)
    padding[0, :2], padding[1, 3:] = 0, 0
    for mask in (None, padding):
        outputs = [model(tokens, attention_mask=mask) for model in (ours, theirs)]
        differ_at_most(outputs[0], outputs[1], bound)
        for model, output in zip((ours, theirs), outputs, strict=True):
            model.zero_grad()
            weights = torch.randn(output.shape, generator=seeded(4)).to(dtype)
            (output * weights).sum().backward()
        our_gradients, their_gradients = gradients(ours), gradients(theirs)
        assert our_gradients.keys() == their_gradients.keys()
        # Those of the keys' biases are 0 but for rounding in what they sum.
        largest = max(gradient.abs().max().item() for gradient in their_gradients.values())
        for name, gradient in our_gradients.items():
            differ_at_most(gradient, their_gradients[name], bound, largest)
        activations = [
            model.run_with_cache(tokens, attention_mask=mask)[1] for model in (ours, theirs)
        ]
        assert list(activations[0]) == list(activations[1])
        for name, our in activations[0].items():
            differ_at_most(our, activations[1][name], bound)
    if theirs.cfg.d_vocab_out == theirs.cfg.d_vocab:
        for mask in (None, padding):
            for per_token in (False, True):
                options = {"attention_mask": mask, "loss_per_token": per_token}
                ours_both = ours(tokens, return_type="both", **options)
                theirs_both = theirs(tokens, return_type="both", **options)
                differ_at_most(ours_both.loss, theirs_both.loss, bound)
                differ_at_most(ours(tokens, return_type="loss", **options), theirs_both.loss, bound)
    halfway = theirs(tokens, stop_at_layer=1)
    differ_at_most(ours(tokens, stop_at_layer=1), halfway, bound)
    if original.cfg.positional_embedding_type == "standard":
        rest = ours(halfway, start_at_layer=1)
        differ_at_most(rest, theirs(halfway, start_at_layer=1), bound)
    for name in ("W_E", "W_pos", "W_U", "b_U", "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_O"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert (ours(tokens, return_type=None), theirs(tokens, return_type=None)) == (None, None)


@needs_lens_3
@every_model
def test_the_seed_draws_the_weights_that_transformer_lens_draws(make: Callable[[], Any]) -> None:
    config = make().cfg.to_dict() | {"seed": 7, "init_weights": True}
    theirs = build_hooked(adapter.HookedTransformerConfig(**config)).state_dict()
    ours = OWN(OWN_CONFIG(**config)).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@needs_lens_3
def test_the_config_has_the_fields_and_defaults_of_transformer_lens() -> None:
    ours, theirs = (
        {field.name: field.default for field in dataclasses.fields(config)}
        for config in (OWN_CONFIG, adapter.HookedTransformerConfig)
    )
    assert ours == theirs


@pytest.fixture
def adapter_of_4(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter as it is imported where TransformerLens has no HookedTransformer."""
    for name in ("HookedTransformer", "HookedTransformerConfig"):
        monkeypatch.delattr(transformer_lens, name)
    spec = importlib.util.find_spec(adapter.__name__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_lens_3
@every_model
def test_a_model_saved_under_one_version_is_read_under_the_other(
    tmp_path: Path, adapter_of_4: Any, make: Callable[[], Any]
) -> None:
    theirs = make()
    save_model(theirs, tmp_path / "3.9", extra={"kind": "any"})
    ours = adapter_of_4.load_model(tmp_path / "3.9")
    assert type(ours) is OWN
    adapter_of_4.save_model(ours, tmp_path / "4", extra={"kind": "any"})
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "4" / name).read_bytes() == (tmp_path / "3.9" / name).read_bytes()
    again = load_model(tmp_path / "4")
    assert type(again) is type(theirs)
    tokens = tokens_of(size=theirs.cfg.d_vocab, length=theirs.cfg.n_ctx)
    for model in (ours, again):
        close(model(tokens), theirs(tokens), rtol=1e-6, atol=1e-6)


@needs_lens_3
def test_a_saved_model_that_ours_cannot_compute_is_refused(
    tmp_path: Path, adapter_of_4: Any
) -> None:
    save_model(small_hooked(positional_embedding_type="rotary", rotary_dim=8), tmp_path)
    with pytest.raises(
        adapter_of_4.ModelFileError, match=r"rotary_dim is 8, .*transformer-lens below 4"
    ):
        adapter_of_4.load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_key_value_heads": 1}, "n_key_value_heads is 1, which needs transformer-lens below 4"),
        ({"normalization_type": "RMS"}, "normalization_type is 'RMS'"),
        ({"act_fn": "solu_ln"}, "act_fn is 'solu_ln'"),
        ({"init_mode": "muP"}, "init_mode is 'muP'"),
        ({"attention_dir": "backwards"}, "attention_dir is 'backwards'"),
        ({"d_vocab": -1}, "d_vocab is -1"),
        ({"n_heads": -1, "d_head": 5}, "d_model is 16, not a multiple of 5"),
    ],
)
def test_a_config_that_ours_cannot_compute_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    sizes = {"n_layers": 1, "d_model": 16, "d_head": 8, "n_ctx": 4, "d_vocab": 3, "device": "cpu"}
    with pytest.raises(ValueError, match=message):
        OWN_CONFIG(**sizes | changes)


def test_a_pass_without_the_tokens_that_it_needs_is_refused() -> None:
    sizes = {"n_layers": 1, "d_model": 16, "d_head": 8, "n_ctx": 4, "d_vocab": 3, "device": "cpu"}
    shortformer = OWN(sizes | {"positional_embedding_type": "shortformer"})
    for model, return_type in ((OWN(sizes), "loss"), (shortformer, "logits")):
        with pytest.raises(ValueError, match="start_at_layer is 0: this pass needs tokens"):
            model(torch.zeros(1, 4, 16), start_at_layer=0, return_type=return_type)


def test_a_mask_of_another_shape_is_refused() -> None:
    sizes = {"n_layers": 1, "d_model": 16, "d_head": 8, "n_ctx": 4, "d_vocab": 3, "device": "cpu"}
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 4\], tokens \[2, 4\]"):
        OWN(sizes)(tokens, attention_mask=torch.ones(1, 4))


def numbers(make: Callable[[], Any]) -> tuple[Tensor, Tensor, float]:
    """Weighted sums of outputs and of gradients in float64, and the sum of their sizes.

    Weights are sines of counters, so that no random generator has a part in the numbers.
    """
    model = make()
    hooked = model.hooked.to(torch.float64)
    with torch.no_grad():
        for number, block in enumerate(model._trained_blocks()):
            block.copy_(wave(block, 1.0 + number))
    tokens = (7 * torch.arange(3 * T) % 5 % S).view(3, T)
    output = hooked(tokens)
    (output * wave(output, 2.0)).sum().backward()
    parts = [p.grad * wave(p, 3.0) for p in hooked.parameters() if p.grad is not None]
    sums = (output * wave(output, 0.5)).sum().detach(), torch.stack([p.sum() for p in parts]).sum()
    return *sums, sum(part.abs().sum().item() for part in (output, *parts))


def wave(like: Tensor, speed: float) -> Tensor:
    return torch.arange(like.numel(), dtype=torch.float64).mul(speed).sin().view(like.shape)


@pytest.mark.parametrize(
    ("name", "output", "gradient"),
    [
        ("simplified", 0.08643670609027598, -1.9498728028940489),
        ("disentangled (2, 1)", -2.9933108745349535, 32.34788630134247),
        ("standard", -1645.7655506038518, 50777.481075000964),
        ("LayerNorm", -3.4372992000286517, -28.387589590109688),
        ("fixed shortformer", -3.0416164478586567, -342.8352650452024),
    ],
)
def test_the_numbers_are_those_of_3_9(name: str, output: float, gradient: float) -> None:
    """Computed with transformer-lens 3.9.0; every version has to give them."""
    *computed, size = numbers(MAKERS[name])
    for value, expected in zip(computed, (output, gradient), strict=True):
        assert abs(value.item() - expected) <= 1e-12 * size
