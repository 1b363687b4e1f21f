"""What holds for every kind of model: its files, its random state, and what is trained."""

import contextlib
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mechcausal.models import CONFIG_FILE, WEIGHTS_FILE, adapter
from mechcausal.models.adapter import (
    HookedTransformer,
    HookedTransformerConfig,
    ModelFileError,
    build_hooked,
    load_model,
    save_model,
)
from mechcausal.models.base import GraphModel
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.in_context_graphs import InContextGraphTransformer
from mechcausal.models.loading import KINDS, load_graph_model
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.models.standard import StandardTransformer, standard_config
from tests.lens_versions import needs_lens_3
from tests.oracles import seeded
from tests.refusals import raises_one_line

S, T = 3, 6


def simplified() -> GraphModel:
    return SimplifiedTransformer(S, T)


def disentangled(*heads: int) -> Callable[[], GraphModel]:
    return lambda: DisentangledTransformer(S, T, heads)


def standard(fixed: bool = False, **settings: Any) -> Callable[[], GraphModel]:
    return lambda: StandardTransformer(
        standard_config(S, T, **({"d_model": 16, "n_heads": 2} | settings)), fixed_embeddings=fixed
    )


def in_context_graphs() -> GraphModel:
    model = InContextGraphTransformer(S, n_positions=3, n_examples=1, n_heads=2)
    model.initialise(generator=seeded(0))
    return model


MAKERS: dict[str, Callable[[], GraphModel]] = {
    "simplified": simplified,
    **{f"disentangled {n}": disentangled(*n) for n in ((1, 1), (2, 1), (1, 2), (2, 1, 2), (3,))},
    "standard": standard(),
    "MLPs": standard(d_mlp=24),
    "LayerNorm": standard(n_layers=1, n_heads=4, d_mlp=24, layer_norm=True),
    "shortformer": standard(n_layers=3, positions="shortformer"),
    "in-context graphs": in_context_graphs,
    "fixed": standard(fixed=True, d_mlp=24),
    "fixed shortformer": standard(fixed=True, n_layers=3, positions="shortformer"),
}
every_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def tokens_of(n: int = 12, size: int = S, length: int = T) -> Tensor:
    return torch.randint(size, (n, length), generator=seeded(3))


def trained(make: Callable[[], GraphModel]) -> GraphModel:
    """A model after steps in closed form and through hooks.

    Through hooks the simplified model's W_Q has gradients outside of A1 and A2, too.
    """
    model = make()
    with torch.no_grad():
        for number, block in enumerate(model._trained_blocks()):
            block.add_(0.1 * torch.randn(block.shape, generator=seeded(number)))
    optimizer = torch.optim.AdamW(model.parameters_by_name.values(), lr=0.01, weight_decay=0.1)
    hooked = model if model.kind == "simplified" else lambda x: model.probabilities(model.hooked(x))
    for compute in (model, hooked) * 2:
        optimizer.zero_grad()
        compute(tokens_of())[:, 0].log().mean().neg().backward()
        optimizer.step()
    return model


def weights(model: GraphModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.hooked.named_parameters()}


@every_kind
def test_a_model_survives_its_files_bit_by_bit(
    tmp_path: Path, make: Callable[[], GraphModel]
) -> None:
    model, tokens = trained(make), tokens_of()
    folder = tmp_path / "new" / "folder"
    model.save(folder)
    assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    for loaded in (type(model).load(folder), load_graph_model(folder)):
        assert type(loaded) is type(model)
        assert loaded.heads == model.heads
        for (name, ours), (_, theirs) in zip(
            model.hooked.named_parameters(), loaded.hooked.named_parameters(), strict=True
        ):
            assert torch.equal(ours, theirs), name
            assert ours.requires_grad == theirs.requires_grad
        assert list(loaded.parameters_by_name) == list(model.parameters_by_name)
        assert torch.equal(loaded(tokens), model(tokens))
        assert torch.equal(loaded.hooked(tokens), model.hooked(tokens))
    assert torch.equal(load_model(folder)(tokens), model.hooked(tokens))


@every_kind
def test_only_what_is_trained_moves(make: Callable[[], GraphModel]) -> None:
    """Neither weight decay nor Adam's normalised steps move the wiring or idle heads."""
    before, model = make(), trained(make)
    with torch.no_grad():
        for block, moved in zip(before._trained_blocks(), model._trained_blocks(), strict=True):
            # Softmax removes a bias of the keys, and the queries' part of it.
            assert block.ndim == 2 or not torch.equal(block, moved)
            block.copy_(moved)
    for name, value in weights(model).items():
        assert torch.equal(value, weights(before)[name]), name


@every_kind
def test_training_only_and_frozen_choose_what_takes_gradients(
    make: Callable[[], GraphModel],
) -> None:
    model = make()
    parameters = model.parameters_by_name
    chosen = next(iter(parameters))
    with model.training_only((chosen,)):
        assert [name for name, p in parameters.items() if p.requires_grad] == [chosen]
        with contextlib.suppress(KeyError), model.frozen():
            assert not any(p.requires_grad for p in model.hooked.parameters())
            raise KeyError
        assert [name for name, p in parameters.items() if p.requires_grad] == [chosen]
    assert all(p.requires_grad for p in parameters.values())
    assert {id(p) for p in model.hooked.parameters() if p.requires_grad} == {
        id(p) for p in parameters.values()
    }


@every_kind
def test_predictions_are_those_of_the_hooked_model(make: Callable[[], GraphModel]) -> None:
    state = torch.get_rng_state()
    model, tokens = trained(make), tokens_of()
    assert torch.equal(torch.get_rng_state(), state)
    prediction = model(tokens)
    assert (model.vocab_size, model.sequence_length) == (S, T)
    torch.testing.assert_close(prediction.sum(1), torch.ones(12))
    output, cache = model.hooked.run_with_cache(tokens)
    torch.testing.assert_close(model.probabilities(output), prediction, atol=1e-6, rtol=1e-4)
    pattern = model.layer1_attention(tokens)
    assert pattern.shape == (12, model.heads[0], T, T)
    assert not pattern.requires_grad
    expected = cache["blocks.0.attn.hook_pattern"][:, : model.heads[0]]
    torch.testing.assert_close(pattern, expected)


# --- Files of any HookedTransformer ---


def small_hooked(**changes: Any) -> HookedTransformer:
    values: dict[str, Any] = {
        "n_layers": 2,
        "d_model": 16,
        "n_heads": 2,
        "d_head": 8,
        "d_mlp": 32,
        "d_vocab": 11,
        "n_ctx": 12,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "default_prepend_bos": False,
        "seed": 3,
    }
    return build_hooked(HookedTransformerConfig(**(values | changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {"normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 8},
            marks=needs_lens_3,
        ),
        {"attention_dir": "bidirectional", "positional_embedding_type": "shortformer"},
        {"dtype": torch.float64, "attn_only": True, "d_mlp": None, "act_fn": None},
    ],
)
def test_any_hooked_transformer_survives_its_files(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Its tokenizer is not read: nothing may be fetched, nor code from it be run."""
    model = small_hooked(**changes)
    model.cfg.tokenizer_name = "no-such-organisation/no-such-tokenizer"
    model.cfg.trust_remote_code = True
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(number)))
    save_model(model, tmp_path)
    loaded, tokens = load_model(tmp_path), tokens_of(4, size=11, length=12)
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.cfg.dtype == model.cfg.dtype


def test_each_kind_is_loaded_as_what_it_is(tmp_path: Path) -> None:
    for make in (simplified, disentangled(2, 1), standard()):
        model = make()
        model.save(tmp_path / model.kind)
        for other in set(KINDS) - {type(model)}:
            with pytest.raises(ModelFileError, match=f"not a {other.kind} model but {model.kind}"):
                other.load(tmp_path / model.kind)
    for extra, message in (
        ({"kind": "pretrained"}, "'pretrained' is none of simplified, disentangled"),
        ({}, "None is none of"),
        ({"kind": "simplified"}, "a simplified model of this size has"),
    ):
        save_model(small_hooked(), tmp_path / "foreign", extra=extra)
        with pytest.raises(ModelFileError, match=message):
            load_graph_model(tmp_path / "foreign")
    with pytest.raises(ModelFileError, match="not a standard model but simplified"):
        StandardTransformer.load(tmp_path / "foreign")


# --- Damaged files ---


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    disentangled(2, 1)().save(tmp_path)
    return tmp_path


def refusal(folder: Path, *, of_graph_models: bool = False) -> str:
    """The message of every way to load the folder, which must be one line."""
    messages = set()
    loads: list[Callable[[Path], Any]] = [DisentangledTransformer.load, load_graph_model]
    for load in loads if of_graph_models else [*loads, load_model]:
        with raises_one_line(ModelFileError) as caught:
            load(folder)
        messages.add(str(caught.value))
    (message,) = messages
    assert str(folder) in message
    return message


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_or_a_folder_in_its_place_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert refusal(saved) == f"{saved / name}: no such file"
    (saved / name).mkdir()
    assert str(saved / name) in refusal(saved)


def test_damaged_weights_are_refused_and_a_pickle_is_not_run(saved: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (saved / "sprung",)

    path = saved / WEIGHTS_FILE
    content = path.read_bytes()
    torch.save({"weights": Trap()}, path)
    pickles = path.read_bytes(), pickle.dumps({"weights": Trap()})
    for damaged in (*pickles, content[:0], content[:4], content[:100], content[:-8]):
        path.write_bytes(damaged)
        assert refusal(saved).startswith(f"{path}: ")
    assert not (saved / "sprung").exists()


@pytest.mark.parametrize(
    "text",
    [
        *("not json", "\udcff", "[]", "5", "null", "{}", "[" * 100_000),
        '{"format": "another", "config": {}}',
        '{"format": "mechcausal-hooked-transformer-1"}',
        '{"format": "mechcausal-hooked-transformer-1", "config": 5}',
        '{"format": "mechcausal-hooked-transformer-1", "config": {"dtype": "float32"}}',
        '{"format": "mechcausal-hooked-transformer-1", "config": {"dtype": 5}}',
    ],
    ids=lambda text: text[-30:],
)
def test_a_foreign_config_is_refused(saved: Path, text: str) -> None:
    (saved / CONFIG_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert refusal(saved).startswith(f"{saved / CONFIG_FILE}: ")


def change_config(folder: Path, section: str, values: Any) -> None:
    content = json.loads((folder / CONFIG_FILE).read_text())
    content[section] = content[section] | values if isinstance(values, dict) else values
    (folder / CONFIG_FILE).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *(("d_model", 99, ""), ("d_model", -1, ""), ("d_model", "many", "d_model is")),
        *(("n_layers", 1, ""), ("n_layers", 3, ""), ("n_heads", 1, ""), ("d_vocab", 4, "")),
        *(("n_ctx", 7, ""), ("dtype", "no_such_type", ""), ("dtype", "save", "")),
        *(("normalization_type", "no such", ""), ("no_such_key", 1, "")),
        # Values that a forward pass alone would read.
        ("output_logits_soft_cap", [30], "output_logits_soft_cap is"),
        ("attn_scale", "8", "attn_scale is"),
        ("use_attn_scale", 1, "use_attn_scale is"),
        ("eps", {}, "eps is"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    saved: Path, key: str, value: object, message: str
) -> None:
    change_config(saved, "config", {key: value})
    assert message in refusal(saved)


@needs_lens_3
def test_a_huge_context_allocates_nothing(tmp_path: Path) -> None:
    """Without learned positions the weights do not limit the context, with which tables grow."""
    save_model(small_hooked(positional_embedding_type="rotary", rotary_dim=8), tmp_path)
    change_config(tmp_path, "config", {"n_ctx": 10**9})
    assert sum(buffer.numel() for buffer in load_model(tmp_path).buffers()) < 10**6


@pytest.mark.parametrize("extra", [5, ["kind"], "disentangled", None])
def test_extra_that_is_no_table_is_refused(saved: Path, extra: object) -> None:
    change_config(saved, "extra", extra)
    refusal(saved)


@pytest.mark.parametrize(
    "heads",
    [
        *([1, 1], [2, 2], [2], [2, 1, 1], [0, 1], [-1, -1], [], [[2], 1]),
        *(None, 5, "21", ["2", "1"], [2.5, 1], [float("inf"), 1], [float("nan"), 1]),
        *({"2": 0, "1": 0}, [2, True], [2, 10**30], [2] * 200),
    ],
    ids=str,
)
def test_heads_that_are_not_the_saved_ones_are_refused(saved: Path, heads: object) -> None:
    change_config(saved, "extra", {"heads": heads})
    assert "not a disentangled model's" in refusal(saved, of_graph_models=True)


def test_loading_builds_two_models_at_most(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []

    def counted(*args: Any, **options: Any) -> HookedTransformer:
        built.append(args)
        return build_hooked(*args, **options)

    monkeypatch.setattr(adapter, "build_hooked", counted)
    load_graph_model(saved)
    assert len(built) == 2  # one of them on the meta device, for the sizes


def test_building_silences_the_deprecation_notice_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    build = HookedTransformer

    def noisy(*args: Any, **kwargs: Any) -> HookedTransformer:
        warnings.warn("something else is deprecated", DeprecationWarning, stacklevel=1)
        warnings.warn("look out", UserWarning, stacklevel=1)
        return build(*args, **kwargs)

    monkeypatch.setattr(adapter, "HookedTransformer", noisy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SimplifiedTransformer(2, 3)
    messages = [str(warning.message) for warning in caught]
    assert messages == ["something else is deprecated", "look out"]
