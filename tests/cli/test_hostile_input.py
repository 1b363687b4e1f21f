"""Input that nobody should have written: one clear line each, and nothing done on its account.

`fuzz_inputs.py` makes such inputs at random; those that went wrong once are named here.
"""

import json
import os
import random
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mechcausal.cli import main as cli
from mechcausal.graphs import CausalGraph, GraphError
from mechcausal.models.adapter import ModelFileError, load_model, save_model
from mechcausal.models.loading import load_graph_model
from mechcausal.recipes import RecipeError, load_recipe, parse_recipe
from mechcausal.studies.targets import TargetError, load_target
from mechcausal.training.experiments import check_experiment, memory
from tests.fuzz_inputs import KINDS, one_line, plan, save_small, try_input
from tests.hugging_face import save_gpt2
from tests.probes.wired import blank

CHAIN: dict[str, Any] = {"preset": "chain", "sequence_length": 8}
JOINT = {"algorithm": "joint"}


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_inputs_are_valid_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    """Of the 2,000 inputs that `python tests/fuzz_inputs.py` tries."""
    for _, seed in [planned for planned in plan(400) if planned[0] == kind][:25]:
        try_input(kind, random.Random(seed), tmp_path)


@pytest.mark.parametrize("kind", ["recipe", "edge list"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=st.randoms(use_true_random=False))
def test_inputs_that_hypothesis_mutates_are_valid_or_refused(
    kind: str, source: random.Random, tmp_path: Path
) -> None:
    try_input(kind, source, tmp_path)


def refusal(error: type[Exception], read: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        read()
    message = str(caught.value)
    one_line(message)
    return message


def recipe_refusal(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return refusal(RecipeError, lambda: load_recipe(path)).removeprefix(f"{path}: ")


# --- Text of a file in a message ---


HOSTILE_RECIPES = {
    "control character in a key": ('"\\u001b[31mred" = 1', "\\"),
    "control character in a value": ('seed = "\\u001b]0;title\\u0007"', "\\"),
    "direction mark": ('[graph]\n"\\u202epreset" = 1', "\\"),
    "delete character": ('name = "a\\u007fb"', "\\"),
    "control character in a path": (
        "[graph]\npreset = 'edge_list'\nedge_list = \"\\u001b[2J.txt\"",
        "\\",
    ),
    "long key": (f"{'k' * 5000} = 1", ""),
    "long value": (f"seed = '{'v' * 5000}'", ""),
    "long table": (f"[{'t' * 5000}]\n[{'t' * 5000}]", ""),
    "long path": (f"[graph]\npreset = 'edge_list'\nedge_list = '/{'p' * 5000}'", ""),
    "long length": (f"[graph]\nsequence_length = 1{'0' * 4000}", ""),
    "long number in a list": (
        f"[model]\nkind = 'disentangled'\nheads = [1{'0' * 4000}]",
        "",
    ),
    "long count": (f"[training]\naccumulation = 1{'0' * 4000}", ""),
    "long parent": (f"[graph]\npreset = 'manual'\nparents = [1{'0' * 4000}]", ""),
    "hexadecimal": ("seed = 0x" + "f" * 5000, "4300 digits"),
    "dotted key": ("a." * 3000 + "b = 1", "nested too deeply"),
    "dotted key of a section": ("graph." * 3000 + "b = 1", "nested too deeply"),
    "nested list": ("a = " + "[" * 400 + "]" * 400, ""),
    "many keys": ("\n".join(f"k{i} = 1" for i in range(3000)), "and at least 99 more"),
}


@pytest.mark.parametrize(("text", "part"), HOSTILE_RECIPES.values(), ids=HOSTILE_RECIPES)
def test_a_hostile_recipe_is_refused_in_a_short_printable_line(
    tmp_path: Path, text: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = recipe_refusal(tmp_path, text)
    assert part in message
    assert len(message) < 300
    assert cli.main(["train", str(tmp_path / "mine.toml")]) == 2
    one_line(capsys.readouterr().err.removesuffix("\n"))


def test_a_control_character_of_an_argument_does_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in (["\x1b[31mtrain"], ["train", "\x1b[31m.toml"], ["detect", "./\x1b[31m"]):
        assert cli.main(arguments) == 2
        one_line(capsys.readouterr().err.removesuffix("\n"))


def test_a_line_of_an_edge_list_is_shown_short_and_printable(tmp_path: Path) -> None:
    path = tmp_path / "graph.txt"
    for line in ("\x1b[31m 1", f"0 {'9' * 4000}", f"0 1 {'x' * 4000}", "0 \u202e1"):
        path.write_text(line, encoding="utf-8")
        message = refusal(GraphError, lambda: CausalGraph.from_edge_list(path))
        assert len(message) - len(str(path)) < 200


# --- Recipes that went wrong once ---


def test_a_recipe_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    assert "bytes" in recipe_refusal(tmp_path, "# " + "x" * 5 * 2**20)


@pytest.mark.parametrize(
    ("graph", "part"),
    [
        ({"preset": "k_gram", "sequence_length": 10_000, "k": 5000}, "25,000,000 edges"),
        ({"preset": "k_gram", "sequence_length": 50, "k": 40}, "41 entries"),
    ],
)
def test_a_graph_of_too_many_edges_is_refused_before_it_is_built(
    graph: dict[str, Any], part: str
) -> None:
    recipe = parse_recipe(
        {
            "graph": graph,
            "model": {"kind": "disentangled"},
            "training": JOINT,
        },
        source="test",
    )
    assert part in refusal((GraphError, RecipeError), lambda: check_experiment(recipe))


# --- More than fits into memory ---

STANDARD = {"kind": "standard"}
REPEATED = {"kind": "repeated_tokens", "repeat_lengths": [3, 5000]}
TOO_LARGE: list[tuple[dict[str, Any], list[str]]] = [
    ({"task": {"vocab_size": 10_000}}, ["task.vocab_size", "training.batch_size"]),
    ({"graph": CHAIN | {"sequence_length": 10_000}}, ["graph.sequence_length"]),
    ({"training": {"batch_size": 10_000_000}}, ["training.batch_size"]),
    ({"evaluation": {"n_sequences": 10**9}}, ["evaluation.n_sequences"]),
    ({"evaluation": {"bayes_draws": 10**9}}, ["evaluation.bayes_draws"]),
    ({"probing": {"images": 10**9, "every": 1}, "training": {"stage1": {"steps": 900_000}},
      "graph": CHAIN | {"sequence_length": 500}}, ["probing.images"]),
    ({"training": {"stage1": {"steps": 10**9}}}, ["probing.every", "probe steps"]),
    ({"training": {"stage1": {"steps": 10**9}}, "probing": {"dense": 10**9}}, ["probing.dense"]),
    ({"model": STANDARD | {"d_model": 100_000}, "training": JOINT}, ["model.d_model"]),
    ({"model": STANDARD | {"d_mlp": 1_000_000, "d_model": 6000, "n_layers": 100},
      "training": JOINT}, ["model.d_mlp", "model.n_layers"]),
    ({"model": {"kind": "disentangled", "heads": [7, 7, 7], "initial_scale": 1.0},
      "training": JOINT, "graph": CHAIN | {"sequence_length": 100}}, ["model.heads"]),
    ({"model": STANDARD, "task": REPEATED, "training": JOINT, "graph": {}},
     ["task.repeat_lengths"]),
]  # fmt: skip


@pytest.mark.parametrize(("values", "fields"), TOO_LARGE, ids=lambda value: str(value)[:50])
def test_a_recipe_that_asks_for_too_much_is_refused_before_memory_is(
    values: dict[str, Any], fields: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device="cpu": 8 * 2**30)
    recipe = parse_recipe({"graph": CHAIN} | values, source="test")
    message = refusal(RecipeError, lambda: check_experiment(recipe))
    assert message.startswith("too large: ")
    for field in fields:
        assert field in message


def test_what_comes_along_fits_into_two_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device="cpu": 2 * 2**30)
    from mechcausal.recipes import packaged_recipes

    for name in packaged_recipes():
        check_experiment(load_recipe(name))


def test_a_machine_has_some_memory() -> None:
    assert 2**28 < memory.available_memory() < 2**50


def test_a_recipe_too_large_is_refused_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "available_memory", lambda device="cpu": 2**30)
    for command in ("train", "theory"):
        arguments = [command, "markov_chain"]
        (tmp_path / "long.toml").write_text('[graph]\npreset = "chain"\nsequence_length = 10000\n')
        arguments[1] = "long.toml"
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        one_line(error.removesuffix("\n"))
        assert "too large" in error
    assert os.listdir(tmp_path) == ["long.toml"]  # noqa: PTH208


# --- Paths ---


@pytest.mark.parametrize(
    "name",
    ["/etc/hostname", "../graph.txt", "sub/../../graph.txt", "link", "sub/link", "~/x\\u0000"],
)
def test_a_recipe_names_no_file_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "graph.txt").write_text("0 1\n")
    folder = tmp_path / "recipes"
    (folder / "sub").mkdir(parents=True)
    for link in (folder / "link", folder / "sub" / "link"):
        link.symlink_to(tmp_path / "graph.txt")
    text = f'[graph]\npreset = "edge_list"\nedge_list = "{name}"\n'
    assert "in the recipe's folder or below" in recipe_refusal(folder, text)


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    text = '[graph]\npreset = "edge_list"\nedge_list = "a"\n'
    (tmp_path / "mine.toml").write_text(text)
    refusal((RecipeError, GraphError), lambda: load_recipe(tmp_path / "mine.toml").build_graph())


def test_any_edge_list_is_read_that_the_user_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edges = tmp_path / "elsewhere" / "graph.txt"
    edges.parent.mkdir()
    edges.write_text("0 1\n1 2\n")
    data = {"graph": {"preset": "edge_list", "edge_list": str(edges)}}
    assert parse_recipe(data, source="test").build_graph().edges == ((0, 1), (1, 2))
    folder = tmp_path / "recipes"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "graph.txt").write_text("0 1\n")
    mine = folder / "mine.toml"
    mine.write_text('[graph]\npreset = "edge_list"\nedge_list = "sub/graph.txt"\n')
    assert load_recipe(mine).build_graph().edges == ((0, 1),)
    monkeypatch.chdir(tmp_path)
    given: list[Any] = []

    def train(recipe: Any, **options: Any) -> None:
        given.append(recipe.build_graph().edges)
        raise RecipeError("left out")

    monkeypatch.setattr("mechcausal.training.run.train", train)
    assert cli.main(["train", str(mine), "--graph.edge-list", str(edges)]) == 2
    assert given == [((0, 1), (1, 2))]


def test_a_runs_recipe_needs_no_edge_list(tmp_path: Path) -> None:
    edges = tmp_path / "graph.txt"
    edges.write_text("0 1\n1 2\n0 3\n1 3\n3 query\n")
    data = {"graph": {"preset": "edge_list", "edge_list": str(edges)}}
    joint = {"model": {"kind": "disentangled"}, "training": JOINT}
    recipe = parse_recipe(data | joint, source="test")
    graph = recipe.build_graph()
    kept = recipe.self_contained()
    edges.unlink()
    assert kept.build_graph() == graph


def test_a_model_that_is_a_link_to_elsewhere_is_refused(tmp_path: Path) -> None:
    save_model(blank(1, 1), tmp_path / "secret")
    for name in ("config.json", "model.safetensors"):
        save_model(blank(1, 1), tmp_path / "model")
        (tmp_path / "model" / name).unlink()
        (tmp_path / "model" / name).symlink_to(tmp_path / "secret" / name)
        message = refusal(ModelFileError, lambda: load_model(tmp_path / "model"))
        assert name in message
        assert "link" in message
        (tmp_path / "model" / name).unlink()
    (tmp_path / "latest").symlink_to(tmp_path / "secret")  # the folder itself may be one
    load_model(tmp_path / "latest")


@pytest.mark.parametrize(
    "name", ["../shard.safetensors", "/tmp/shard.safetensors", "a/b.safetensors"]
)
def test_weights_outside_of_a_hugging_face_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "gpt2"
    save_gpt2(folder)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside of the folder" in refusal(TargetError, lambda: load_target(str(folder)))
    (folder / "model.safetensors.index.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    assert "outside of the folder" in refusal(TargetError, lambda: load_target(str(folder)))


def test_a_target_with_brackets_in_its_name_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.chdir(tmp_path)
    save_model(blank(1, 1), tmp_path / "[bold]a[" / "]")
    assert cli.main(["detect", "[bold]a[/]", "--sequences", "2"]) == 0
    assert "[bold]a[/]: 1 heads" in capsys.readouterr().out


# --- Models that were changed ---


@pytest.mark.parametrize(
    ("kind", "name", "index"),
    [
        ("simplified", "embed.W_E", (0, 1)),
        ("simplified", "blocks.0.attn.W_K", (0, 4, 1)),
        ("simplified", "blocks.0.attn.W_Q", (0, 0, 0)),
        ("simplified", "blocks.1.attn.W_Q", (0, 9, 0)),
        ("simplified", "blocks.1.attn.b_V", (0, 2)),
        ("simplified", "unembed.W_U", (0, 0)),
        ("disentangled", "pos_embed.W_pos", (1, 4)),
        ("disentangled", "blocks.0.attn.W_O", (1, 0, 20)),
        ("disentangled", "blocks.1.attn.W_Q", (1, 0, 0)),
        ("fixed", "embed.W_E", (0, 1)),
    ],
)
@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_changed_wiring_is_refused(
    tmp_path: Path, kind: str, name: str, index: tuple[int, ...], value: float
) -> None:
    save_small(kind, tmp_path)
    load_graph_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights[name][index] = value
    save_file(weights, tmp_path / "model.safetensors")
    message = refusal(ModelFileError, lambda: load_graph_model(tmp_path))
    assert name in message or kind == "fixed"
    assert "changed or is damaged" in message
    refusal(TargetError, lambda: load_target(str(tmp_path)))


@pytest.mark.parametrize(
    "change",
    [
        {"normalization_type": "LNPre"},
        {"use_attn_scale": True},
        {"attention_dir": "bidirectional"},
        {"attn_scores_soft_cap": 1.0},
    ],
)
@pytest.mark.parametrize("kind", ["simplified", "disentangled"])
def test_another_architecture_under_a_known_name_is_refused(
    tmp_path: Path, kind: str, change: dict[str, Any]
) -> None:
    save_small(kind, tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["config"] |= change
    path.write_text(json.dumps(content))
    assert next(iter(change)).removeprefix("use_") in refusal(
        ModelFileError, lambda: load_graph_model(tmp_path)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": 10**9},
        {"d_model": 10**9},
        {"d_vocab": 10**12},
        {"n_ctx": 10**9},
        {"n_heads": 10**9},
        {"n_layers": "2"},
        {"n_layers": -1},
        {"dtype": "complex64"},
        {"dtype": "load"},
        {"dtype": []},
        {"d_head": 0},
        {"num_experts": 10**9},
        {"positional_embedding_type": "alibi", "n_ctx": 10**6},
        {"\x1b[31m" * 1000: 1},
    ],
    ids=lambda change: str(change)[:30],
)
def test_a_config_that_asks_for_what_the_weights_are_not_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    save_model(blank(2, 1), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(content))
    message = refusal(ModelFileError, lambda: load_model(tmp_path))
    assert len(message) - 2 * len(str(tmp_path)) < 200


@pytest.mark.parametrize("size", [0, 10, 2**40, 2**63])
def test_weights_whose_header_lies_about_its_size_are_refused(tmp_path: Path, size: int) -> None:
    save_model(blank(1, 1), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    assert "not a safetensors file" in refusal(ModelFileError, lambda: load_model(tmp_path))


def test_weights_that_are_no_floats_are_refused(tmp_path: Path) -> None:
    save_model(blank(1, 1), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["embed.W_E"] = weights["embed.W_E"].to(torch.int64)
    save_file(weights, tmp_path / "model.safetensors")
    assert "I64" in refusal(ModelFileError, lambda: load_model(tmp_path))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        folder = tmp_path / name
        save_model(blank(1, 1), folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refusal(ModelFileError, partial(load_model, folder))
        refusal(TargetError, partial(load_target, str(folder)))


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 10**9},
        {"vocab_size": 10**9},
        {"n_embd": 10**6},
        {"n_positions": 10**6},
        {"n_inner": 10**9},
    ],
    ids=str,
)
def test_a_hugging_face_config_that_asks_for_too_much_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    save_gpt2(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    refusal(TargetError, lambda: load_target(str(tmp_path)))
