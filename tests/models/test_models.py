"""The closed form, the wired HookedTransformer and the formula itself are one function."""

import contextlib
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from mechcausal.graphs import CausalGraph, chain, icl_pairs, random_tree
from mechcausal.models import CONFIG_FILE, WEIGHTS_FILE, adapter
from mechcausal.models.adapter import ModelFileError, build_hooked, load_model, save_model
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.tasks import Batch, SingleParentTask, soft_cross_entropy
from mechcausal.tasks.priors import DirichletPrior, FixedTransition
from tests.oracles import forest, seeded

SIZES = [(2, 4), (3, 20), (10, 20), (10, 100)]


def random_model(vocab_size: int, length: int, seed: int = 0) -> SimplifiedTransformer:
    model, generator = SimplifiedTransformer(vocab_size, length), seeded(seed)
    with torch.no_grad():
        model.A1.copy_(torch.randn(length, length, generator=generator))
        model.A2.copy_(2 * torch.randn(vocab_size, vocab_size, generator=generator))
    return model


def random_batch(vocab_size: int, length: int, n_sequences: int = 64) -> Batch:
    task = SingleParentTask(chain(length - 1), DirichletPrior.symmetric(0.5, vocab_size))
    return task.sample(n_sequences, generator=seeded(1))


def blocks(model: SimplifiedTransformer) -> tuple[Tensor, Tensor]:
    """The gradients of A1 and A2 as they lie in the parameters."""
    s, t = model.vocab_size, model.sequence_length
    first, second = (model.parameters_by_name[name].grad for name in ("A1", "A2"))
    assert first is not None
    assert second is not None
    return first[0, s : s + t, :t].clone(), second[0, :s, :s].T.clone()


def formula(A1: Tensor, A2: Tensor, tokens: Tensor) -> Tensor:
    """`X^T softmax(softmax(causal_mask(A1)) X A2 x_query)` for one sequence, word for word."""
    length = len(tokens)
    X = torch.nn.functional.one_hot(tokens, len(A2)).to(A1.dtype)
    mask = torch.full((length, length), -torch.inf, dtype=A1.dtype).triu(1)
    return X.T @ torch.softmax(torch.softmax(A1 + mask, dim=1) @ X @ A2 @ X[-1], dim=0)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("vocab_size", "length"), SIZES)
def test_closed_form_equals_the_hooked_transformer(vocab_size: int, length: int) -> None:
    model, batch = random_model(vocab_size, length), random_batch(vocab_size, length)
    outputs, gradients = [], []
    for compute in (lambda x: model.hooked(x)[:, -1], model):
        model.hooked.zero_grad()
        output = compute(batch.tokens)
        soft_cross_entropy(output, batch.target, epsilon=1e-3).backward()
        outputs.append(output.detach())
        gradients.append(blocks(model))
    difference = (outputs[0] - outputs[1]).abs().max().item()
    errors = [relative_error(closed, wired) for wired, closed in zip(*gradients, strict=True)]
    print(f"\nS={vocab_size}, T={length}: output {difference:.1e}, gradients {max(errors):.1e}")
    assert difference < 1e-6
    assert max(errors) < 1e-6


@pytest.mark.parametrize(("vocab_size", "length"), SIZES)
def test_closed_form_equals_the_formula(vocab_size: int, length: int) -> None:
    model, batch = random_model(vocab_size, length), random_batch(vocab_size, length, 16)
    A1, A2 = (block.detach().double().requires_grad_() for block in (model.A1, model.A2))
    expected = torch.stack([formula(A1, A2, tokens) for tokens in batch.tokens])
    soft_cross_entropy(expected, batch.target.double(), epsilon=1e-3).backward()
    output = model(batch.tokens)
    soft_cross_entropy(output, batch.target, epsilon=1e-3).backward()
    assert (output - expected).abs().max() < 1e-6
    torch.testing.assert_close(output.sum(1), torch.ones(16))
    for found, exact in zip(blocks(model), (A1.grad, A2.grad), strict=True):
        assert relative_error(found.double(), exact) < 2e-6


def test_the_formula_by_hand() -> None:
    """Two tokens, three positions, A1 one-hot: layer 2 compares the query with position 0."""
    model = SimplifiedTransformer(2, 3)
    with torch.no_grad():
        model.A1[1, 0] = model.A1[2, 0] = 100.0
        model.A2.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    # Copies of tokens (1, 0, 1): 1, 1, 1. All match the query with 3: uniform attention.
    torch.testing.assert_close(model(torch.tensor([[1, 0, 1]])), torch.tensor([[1 / 3, 2 / 3]]))
    with torch.no_grad():
        model.A1[1, 0], model.A1[1, 1] = 0.0, 100.0
    # Copies 1, 0, 1: matches 3, 0, 3.
    weight = torch.tensor([3.0, 0.0, 3.0]).softmax(0)
    expected = torch.tensor([[weight[1], weight[0] + weight[2]]])
    torch.testing.assert_close(model(torch.tensor([[1, 0, 1]])), expected)


def test_blocks_are_views_of_the_parameters() -> None:
    model = SimplifiedTransformer(3, 5)
    with torch.no_grad():
        model.A1[4, 2] = 7.0
        model.A2[0, 1] = 9.0  # copied token 0, query token 1
    assert model.hooked.blocks[0].attn.W_Q[0, 3 + 4, 2] == 7.0
    assert model.hooked.blocks[1].attn.W_Q[0, 1, 0] == 9.0
    with torch.no_grad():
        model.hooked.blocks[0].attn.W_Q[0, 3 + 1, 0] = 5.0
    assert model.A1[1, 0] == 5.0


def test_training_the_closed_form_changes_the_blocks_and_nothing_else() -> None:
    model, batch = random_model(3, 6), random_batch(3, 6)
    s, t = 3, 6
    before = {name: p.detach().clone() for name, p in model.hooked.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.hooked.parameters() if p.requires_grad], lr=1.0)
    assert len(optimizer.param_groups[0]["params"]) == 2
    for _ in range(3):
        optimizer.zero_grad()
        soft_cross_entropy(model(batch.tokens), batch.target, epsilon=1e-3).backward()
        optimizer.step()
    changed = {
        name: parameter.detach() != before[name]
        for name, parameter in model.hooked.named_parameters()
    }
    inside = {
        "blocks.0.attn.W_Q": (0, slice(s, s + t), slice(0, t)),
        "blocks.1.attn.W_Q": (0, slice(0, s), slice(0, s)),
    }
    for name, where in inside.items():
        assert changed[name][where].any()
        changed[name][where] = False
    assert not any(entries.any() for entries in changed.values())


def test_training_only_and_frozen_choose_what_takes_gradients() -> None:
    model = SimplifiedTransformer(3, 4)
    parameters = model.parameters_by_name
    with model.training_only(("A1",)):
        assert parameters["A1"].requires_grad
        assert not parameters["A2"].requires_grad
        with contextlib.suppress(KeyError), model.frozen():
            assert not any(p.requires_grad for p in model.hooked.parameters())
            raise KeyError
        assert parameters["A1"].requires_grad
        assert not parameters["A2"].requires_grad
    assert all(p.requires_grad for p in parameters.values())


def test_initialisation_is_that_of_algorithm_1() -> None:
    model = random_model(3, 5)
    model.initialise(beta0=0.5)
    assert torch.equal(model.A1, torch.zeros(5, 5))
    assert torch.equal(model.A2, 0.5 * torch.eye(3))
    expected = torch.ones(5, 5).tril() / torch.arange(1, 6).unsqueeze(1)
    torch.testing.assert_close(model.attention1(), expected)


@pytest.mark.parametrize("graph", [chain(19), icl_pairs(19), random_tree(19, generator=seeded(1))])
def test_the_ideal_solution_attends_to_parents(graph: CausalGraph) -> None:
    model = SimplifiedTransformer(10, 20)
    model.set_ideal(graph)
    attention = model.attention1()
    for parent, child in graph.edges:
        assert attention[child, parent] > 1 - 1e-6


def test_the_ideal_solution_predicts_what_follows_from_the_sequence() -> None:
    """Every token has one successor: nearly all that is to be known is read off the context."""
    rows = tuple(tuple(float(p) for p in row) for row in torch.eye(5).roll(1, dims=1).tolist())
    task = SingleParentTask(chain(19), FixedTransition(rows))
    batch = task.sample(500, generator=seeded(2))
    model = SimplifiedTransformer(5, 20)
    model.initialise(beta0=1.0)
    start = soft_cross_entropy(model(batch.tokens), batch.target, epsilon=1e-3).item()
    model.set_ideal(task.graph)
    assert start > 1.0
    assert soft_cross_entropy(model(batch.tokens), batch.target, epsilon=1e-3).item() < 0.1


def test_the_ideal_solution_finds_the_successors_of_the_query() -> None:
    model = SimplifiedTransformer(4, 7)
    model.set_ideal(forest(-1, 0, 1, -1, 1, 0))
    # Positions 2 and 4 have a parent that holds 1, and 1 and 5 one that holds 0.
    f = model(torch.tensor([[0, 1, 2, 3, 0, 3, 1]]))
    torch.testing.assert_close(f, torch.tensor([[0.5, 0.0, 0.5, 0.0]]))


def test_the_ideal_solution_refuses_a_graph_of_another_length() -> None:
    with pytest.raises(ValueError, match="sequences of 5 tokens, the model of 6"):
        SimplifiedTransformer(3, 6).set_ideal(chain(4))


def test_building_leaves_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    SimplifiedTransformer(3, 6)
    assert torch.equal(torch.get_rng_state(), state)


# --- Files ---


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


def test_a_simplified_model_survives_its_files(tmp_path: Path) -> None:
    model, tokens = random_model(3, 7), random_batch(3, 7).tokens
    model.save(tmp_path / "new" / "folder")
    loaded = SimplifiedTransformer.load(tmp_path / "new" / "folder")
    assert torch.equal(loaded(tokens), model(tokens))
    assert torch.equal(loaded.A1, model.A1)
    assert torch.equal(loaded.A2, model.A2)
    assert [p.requires_grad for p in loaded.hooked.parameters()] == [
        p.requires_grad for p in model.hooked.parameters()
    ]
    again = load_model(tmp_path / "new" / "folder")
    assert torch.equal(again(tokens), model.hooked(tokens))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 8},
        {"dtype": torch.float64, "attn_only": True, "d_mlp": None, "act_fn": None},
    ],
)
def test_any_hooked_transformer_survives_its_files(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = small_hooked(**changes)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(number)))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    tokens = torch.randint(11, (4, 12), generator=seeded())
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.cfg.dtype == model.cfg.dtype


def test_a_model_that_names_a_tokenizer_loads_without_it(tmp_path: Path) -> None:
    """A pretrained model's config names one; nothing may be fetched, nor code from it be run."""
    model = small_hooked()
    model.cfg.tokenizer_name = "no-such-organisation/no-such-tokenizer"
    model.cfg.trust_remote_code = True
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    tokens = torch.randint(11, (2, 12), generator=seeded())
    assert torch.equal(loaded(tokens), model(tokens))


def refusal(folder: Path, kind: str = "any") -> str:
    load = load_model if kind == "any" else SimplifiedTransformer.load
    with pytest.raises(ModelFileError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    SimplifiedTransformer(3, 5).save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert refusal(saved) == f"{saved / name}: no such file"


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_folder_in_place_of_a_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    (saved / name).mkdir()
    assert str(saved / name) in refusal(saved)


@pytest.mark.parametrize("size", [0, 4, 100, -8])
def test_truncated_weights_are_refused(saved: Path, size: int) -> None:
    content = (saved / WEIGHTS_FILE).read_bytes()
    (saved / WEIGHTS_FILE).write_bytes(content[:size])
    assert refusal(saved).startswith(f"{saved / WEIGHTS_FILE}: ")


def test_a_pickle_is_refused_and_not_run(saved: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (saved / "sprung",)

    (saved / WEIGHTS_FILE).write_bytes(pickle.dumps({"weights": Trap()}))
    assert refusal(saved).startswith(f"{saved / WEIGHTS_FILE}: ")
    torch.save({"weights": Trap()}, saved / WEIGHTS_FILE)
    assert refusal(saved).startswith(f"{saved / WEIGHTS_FILE}: ")
    assert not (saved / "sprung").exists()


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "\udcff",
        "[]",
        "5",
        "null",
        "{}",
        '{"format": "another", "config": {}}',
        '{"format": "mechcausal-hooked-transformer-1"}',
        '{"format": "mechcausal-hooked-transformer-1", "config": 5}',
        '{"format": "mechcausal-hooked-transformer-1", "config": {"dtype": "float32"}}',
        '{"format": "mechcausal-hooked-transformer-1", "config": {"dtype": 5}}',
    ],
)
def test_a_foreign_config_is_refused(saved: Path, text: str) -> None:
    (saved / CONFIG_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert refusal(saved).startswith(f"{saved / CONFIG_FILE}: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("d_model", 99),
        ("d_model", -1),
        ("d_model", "many"),
        ("n_layers", 1),
        ("n_layers", 3),
        ("dtype", "no_such_type"),
        ("dtype", "save"),
        ("normalization_type", "no such"),
        ("no_such_key", 1),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(
    saved: Path, key: str, value: object
) -> None:
    content = json.loads((saved / CONFIG_FILE).read_text())
    content["config"][key] = value
    (saved / CONFIG_FILE).write_text(json.dumps(content))
    assert str(saved) in refusal(saved)


@pytest.mark.parametrize("extra", [5, ["kind"], "simplified", None])
def test_extra_that_is_no_table_is_refused(saved: Path, extra: object) -> None:
    content = json.loads((saved / CONFIG_FILE).read_text())
    (saved / CONFIG_FILE).write_text(json.dumps(content | {"extra": extra}))
    assert str(saved) in refusal(saved, "simplified")


@pytest.mark.parametrize(
    ("name", "value"),
    [("output_logits_soft_cap", [30]), ("attn_scale", "8"), ("use_attn_scale", 1), ("eps", {})],
)
def test_a_value_of_another_type_is_refused(saved: Path, name: str, value: object) -> None:
    """Some of them would be looked at in a forward pass alone."""
    content = json.loads((saved / CONFIG_FILE).read_text())
    content["config"][name] = value
    (saved / CONFIG_FILE).write_text(json.dumps(content))
    with pytest.raises(ModelFileError, match=f"{name} is") as error:
        load_model(saved)
    assert len(str(error.value).splitlines()) == 1


def test_another_model_is_no_simplified_model(tmp_path: Path) -> None:
    save_model(small_hooked(), tmp_path / "unmarked")
    assert "not a simplified model" in refusal(tmp_path / "unmarked", "simplified")
    save_model(small_hooked(), tmp_path / "marked", extra={"kind": "simplified"})
    assert str(tmp_path / "marked") in refusal(tmp_path / "marked", "simplified")


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
