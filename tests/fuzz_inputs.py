"""Mutated inputs: each is accepted and valid, or refused with one clear line.

    python tests/fuzz_inputs.py --n 2000

prints `2000/2000`, or the first input that broke that rule and where it lies. The default suite
runs a part of them (test_hostile_input.py). Every input is read as a user would have it read: the
recipes by the command too, with the training itself left out.

A kind of input is a function of a source of randomness and a folder that writes a mutated input
there and returns the check to run: add one to `KINDS` for a new kind of file.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import random
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mechcausal.cli import main as cli
from mechcausal.graphs import CausalGraph, GraphError, chain
from mechcausal.models.adapter import ModelFileError, load_model, save_model
from mechcausal.models.base import GraphModel
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.loading import load_graph_model
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.models.standard import StandardTransformer, standard_config
from mechcausal.recipes import (
    Recipe,
    RecipeError,
    load_recipe,
    packaged_recipes,
    parse_recipe,
    recipe_to_dict,
    recipe_to_toml,
)
from mechcausal.recipes.clamp_checks import is_on
from mechcausal.records.run_folder import RunFolderError
from mechcausal.studies.targets import TargetError, load_target
from mechcausal.tasks import build_task
from mechcausal.tasks.priors import PriorError
from mechcausal.training import checkpoints, resuming
from mechcausal.training import run as training
from mechcausal.training.checkpoints import CheckpointError
from mechcausal.training.experiments import Generators, build_experiment, check_experiment
from mechcausal.training.experiments.clamping import clamp_edits
from mechcausal.training.experiments.memory import experiment_needs
from mechcausal.training.experiments.models import build_model

Check = Callable[[], bool]
"""Reads the input; True where it was accepted, and is valid."""
Kind = Callable[[random.Random, Path], Check]

REFUSALS = (
    *(RecipeError, GraphError, PriorError, ModelFileError, TargetError),
    *(CheckpointError, RunFolderError),
)
LONGEST_LINE = 1000
LONGEST_SECONDS = 10
# What is accepted is also built, where that is cheap.
SMALL = 20 * 2**20

HOSTILE_TEXT = [
    *("", " ", "\0", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\nb", "\r", "\x7f"),
    *("\u202e", "\ud7ff", "../x", "/etc/passwd", "..", ".", "~", "a/b", "a\\b", "C:\\x"),
    *("x" * 5000, "ünï", "日本語", "💥", "{{7*7}}", "$(touch x)", "`touch x`", "%s%n"),
    *("__import__('os')", "nan", "null", "true", "[red]"),
]
HOSTILE_NUMBERS = [
    *(0, -1, 1, 2, 3, 7, 255, 10_000, 10_001, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 10**400),
    *(-(2**63), 0.5, -0.5, 1e-320, 1e308, -1e308, 0.1, 1.0, 1e9),
]
CLAMPS: dict[str, list[Any]] = {
    "pattern": ["free", "graph", "wrong_graph", "previous_token", "frozen"],
    "forbidden": [[], [[3, 1]], [[3, 1], [2, 2]], [[1, 2]], [[0, 0]], [[10**6, 1]], [[1]]],
    "layer": [0, 0, 1, 2, 99],
    "head": [0, 1, 5],
    "from_step": [0, 1, 10**9],
    "until_step": [1, 2, 0],
    "seed": [0, 2**40],
}


class BrokenError(Exception):
    """An input was neither accepted and valid nor refused with one clear line."""


def one_line(message: str) -> None:
    """Check a refusal."""
    if not message.strip():
        raise BrokenError("an empty message")
    if not message.isprintable():
        raise BrokenError(f"a message that does not print: {message[:200]!r}")
    if len(message) > LONGEST_LINE:
        raise BrokenError(f"a message of {len(message)} characters: {message[:200]!r}")


def refused_or(read: Callable[[], bool]) -> bool:
    """Read, and turn a refusal, if it is one line, into False."""
    try:
        return read()
    except REFUSALS as refusal:
        one_line(str(refusal))
        return False


# --- What a valid input is ---


def check_graph(graph: CausalGraph) -> None:
    """A causal graph: every parent comes before its child, once."""
    for child, parents in enumerate(graph.parents):
        assert list(parents) == sorted(set(parents))
        assert all(0 <= parent < child for parent in parents)
    if graph.query_parents is not None:
        assert all(0 <= parent < graph.n_positions for parent in graph.query_parents)
    assert 1 <= graph.n_positions <= 10_000


def check_recipe(recipe: Recipe, folder: Path) -> None:
    """A recipe that can be run: its parts are built where they are small."""
    check_experiment(recipe)
    copy = folder / "copy.toml"
    copy.write_text(recipe_to_toml(recipe), encoding="utf-8")
    if recipe.graph.preset != "edge_list":  # a copy names the file from another place
        assert load_recipe(copy) == recipe
    copy.unlink()
    if recipe.task.kind == "repeated_tokens":
        assert recipe.task.repeat_lengths is not None
        length = 2 * recipe.task.repeat_lengths[1] + 1
        if _is_small(recipe, None, length):
            build_experiment(recipe, Generators.from_seed(recipe.seed, torch.device("cpu")))
        return
    if recipe.task.kind == "text":
        return
    if recipe.task.kind in ("tree", "selective_lags", "in_context_graphs"):
        if _is_small(recipe, None, recipe.build_task().sequence_length):
            build_experiment(recipe, Generators.from_seed(recipe.seed, torch.device("cpu")))
        return
    graph = recipe.build_graph()
    check_graph(graph)
    task = build_task(graph, recipe.build_prior())
    assert task.vocab_size == recipe.task.vocab_size
    if not _is_small(recipe, graph, task.sequence_length):
        return
    batch = task.sample(2, generator=torch.Generator().manual_seed(0))
    assert batch.tokens.shape == (2, task.sequence_length)
    assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < task.vocab_size
    assert torch.allclose(batch.target.sum(1), torch.ones(2), atol=1e-3)
    model = build_model(recipe, task, seed=0, device=torch.device("cpu"))
    check_model(model)
    if is_on(recipe.clamp):
        frozen = model.layer1_attention(batch.tokens).mean(0)
        with model.clamped({recipe.clamp.layer: clamp_edits(recipe, frozen)}):
            check_model(model)


def _is_small(recipe: Recipe, graph: CausalGraph | None, length: int) -> bool:
    needs = experiment_needs(recipe, graph, length)
    parts = ("the model", "the evaluation sequences")
    return recipe.model.n_layers <= 8 and sum(n.size for n in needs if n.part in parts) < SMALL


@torch.no_grad()
def check_model(model: GraphModel) -> None:
    """Both ways to compute agree, and give distributions."""
    tokens = torch.arange(2 * model.sequence_length).view(2, -1) % model.vocab_size
    hooked = model.probabilities(model.hooked(tokens))
    closed = model(tokens)
    assert hooked.shape == closed.shape == (2, model.vocab_size)
    if closed.isfinite().all():  # weights of a file may overflow
        assert torch.allclose(hooked, closed, atol=1e-3)
        assert torch.allclose(closed.sum(1), torch.ones(2), atol=1e-3)


# --- Recipes ---


def mutated_recipe(source: random.Random, folder: Path) -> Check:
    """A recipe's file, changed as data or as text."""
    path = folder / source.choice(["recipe.toml", "a b.toml", "ü.toml", "x" * 200 + ".toml"])
    packaged = packaged_recipes()
    name = source.choice(sorted(packaged))
    if source.random() < 0.6:
        data = recipe_to_dict(load_recipe(name))
        for _ in range(source.choice([0, 1, 1, 1, 2, 3])):
            change_data(source, data)
        if source.random() < 0.2:
            edges = source.choice(["graph.txt", "../graph.txt", "/etc/passwd", "sub/graph.txt"])
            data["graph"] = {"preset": "edge_list", "edge_list": edges}
            mutated_edges(source, folder)
        if source.random() < 0.2:
            data["clamp"] = {name: source.choice(given) for name, given in CLAMPS.items()}
            for name in source.sample(sorted(CLAMPS), 4):
                del data["clamp"][name]
        text = to_toml(data)
    else:
        text = packaged[name].read_text(encoding="utf-8")
    content = text.encode("utf-8", "surrogatepass")
    if source.random() < 0.4:
        content = change_bytes(source, content)
    path.write_bytes(content)

    def read() -> bool:
        def valid() -> bool:
            check_recipe(load_recipe(path), folder)
            return True

        accepted = refused_or(valid)
        if source.random() < 0.3:
            command(accepted, "train", str(path))
        return accepted

    return read


def command(accepted: bool, *arguments: str) -> None:
    """The command says of an input what the library said of it."""
    out, err = io.StringIO(), io.StringIO()
    stop = RecipeError("left out")
    with (
        mock.patch.object(training, "train", side_effect=_checked_only(stop)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = cli.main(arguments)
    lines = err.getvalue().splitlines()
    if code != 2 or len(lines) != 1 or not lines[0].startswith("mechcausal: "):
        raise BrokenError(f"{arguments}: exit code {code}, stderr {err.getvalue()[:500]!r}")
    one_line(lines[0])
    if accepted != lines[0].endswith("left out"):
        raise BrokenError(
            f"{arguments}: the command says {lines[0]!r}, the library accepts: {accepted}"
        )


def _checked_only(stop: Exception) -> Callable[..., None]:
    def train(recipe: Recipe, **options: Any) -> None:
        check_experiment(recipe)
        raise stop

    return train


def change_data(source: random.Random, data: dict[str, Any]) -> None:
    """Change, remove, add or move one key of nested data."""
    tables = [data]
    for table in tables:
        tables += [value for value in table.values() if isinstance(value, dict)]
    table = source.choice(tables)
    keys = sorted(table)
    key = source.choice(keys) if keys else "seed"
    action = source.randrange(6)
    if action == 0 and keys:
        del table[key]
    elif action == 1:
        table[source.choice([*HOSTILE_TEXT, "steps", "lr", "kind", "__class__"])] = value(source)
    elif action == 2 and keys:
        with contextlib.suppress(RecursionError):  # lists in lists in lists: it stays as it is
            source.choice(tables)[key] = copy.deepcopy(table[key])
    elif action == 3 and keys and isinstance(table[key], list) and table[key]:
        index = source.randrange(len(table[key]))
        table[key] = [*table[key]]
        table[key][index] = value(source)
    else:
        old: Any = table.get(key)
        near = isinstance(old, int | float) and not isinstance(old, bool) and source.random() < 0.5
        table[key] = (
            old * source.choice([-1, 0, 2, 10, 1000, 10**6, 0.5]) if near else value(source)
        )


def value(source: random.Random, depth: int = 0) -> Any:
    """Any value that TOML or JSON can hold."""
    kind = source.randrange(7 if depth < 3 else 4)
    if kind == 0:
        return source.choice(HOSTILE_TEXT)
    if kind in (1, 2):
        return source.choice([*HOSTILE_NUMBERS, math.nan, math.inf, -math.inf])
    if kind == 3:
        return source.choice([True, False, "chain", "adam", "standard", "cpu", "cuda:0"])
    if kind == 4:
        return {source.choice(["a", "steps", *HOSTILE_TEXT]): value(source, depth + 1)}
    if kind == 5:
        nested: Any = 1
        for _ in range(source.choice([2, 50, 2000])):
            nested = [nested]
        return nested
    if source.random() < 0.1:
        return [value(source, 3)] * 2000
    return [value(source, depth + 1) for _ in range(source.choice([0, 1, 2, 5]))]


def to_toml(data: dict[str, Any]) -> str:
    """Data as TOML, whatever it holds; tables inline, so that any nesting can be written."""
    return "\n".join(f"{_toml(key)} = {_toml(item)}" for key, item in data.items()) + "\n"


def _toml(item: Any) -> str:
    # Without recursion into lists: they may be nested deeper than Python's stack.
    depth = 0
    while isinstance(item, list) and len(item) == 1:
        item, depth = item[0], depth + 1
    if isinstance(item, bool):
        text = "true" if item else "false"
    elif isinstance(item, int | float):
        text = repr(item)
    elif isinstance(item, str):
        text = json.dumps(item).replace("\x7f", "\\u007f")
    elif isinstance(item, dict):
        text = "{" + ", ".join(f"{_toml(key)} = {_toml(part)}" for key, part in item.items()) + "}"
    else:
        text = "[" + ", ".join(map(_toml, item)) + "]"
    return "[" * depth + text + "]" * depth


def change_bytes(source: random.Random, content: bytes) -> bytes:
    """Cut, flip, double, or put something in."""
    changed = bytearray(content)
    for _ in range(source.choice([1, 1, 2, 10])):
        index = source.randrange(len(changed) + 1)
        action = source.randrange(6)
        if action == 0:
            del changed[index:]
        elif action == 1 and index < len(changed):
            changed[index] ^= 1 << source.randrange(8)
        elif action == 2:
            end = index + source.randrange(1, 200)
            changed[index:index] = changed[index:end]
        elif action == 3:
            del changed[index : index + source.randrange(1, 40)]
        elif action == 4:
            text = source.choice([*HOSTILE_TEXT, "[" * 3000, "a." * 3000, "0x" + "f" * 5000])
            changed[index:index] = text.encode("utf-8")
        else:
            changed[index:index] = source.randbytes(source.choice([1, 4, 300]))
    return bytes(changed)


# --- Edge lists ---


def mutated_edges(source: random.Random, folder: Path) -> Check:
    """An edge list, changed line by line or as bytes."""
    path = folder / "graph.txt"
    n = source.choice([1, 3, 12, 300])
    lines = [f"{source.randrange(i)} {i}" for i in range(1, n)] + ["0"]
    lines += [f"{source.randrange(n)} query"] * (source.random() < 0.3)
    for _ in range(source.choice([0, 0, 1, 2])):
        numbers = [str(number) for number in HOSTILE_NUMBERS]
        odd = source.choice(
            [*HOSTILE_TEXT, *numbers, "1 0", "2 2", "1 2 3", "0 -> 1", "-1 0", "٣ 4"]
        )
        joined = f"{source.choice(['', '0 ', '0,', '0 -> '])}{odd}"
        lines.insert(source.randrange(len(lines) + 1), joined)
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if source.random() < 0.3:
        content = change_bytes(source, content)
    path.write_bytes(content)

    def read() -> bool:
        def valid() -> bool:
            check_graph(CausalGraph.from_edge_list(path))
            return True

        return refused_or(valid)

    return read


# --- Model folders ---


def save_small(kind: str, folder: Path, seed: int = 0) -> GraphModel:
    """Save a small model: simplified, disentangled, standard, or standard with fixed embeddings."""
    model: GraphModel
    if kind == "simplified":
        model = SimplifiedTransformer(3, 6)
        model.set_ideal(chain(5), strength=3.0)
    elif kind == "disentangled":
        model = DisentangledTransformer(3, 5, (2, 1))
        model.initialise(scale=0.5, generator=torch.Generator().manual_seed(seed))
    else:
        fixed = kind == "fixed"
        sizes: dict[str, Any] = {"n_heads": 2, "d_model": 16, "d_mlp": 8, "layer_norm": not fixed}
        model = StandardTransformer(standard_config(3, 5, **sizes), fixed_embeddings=fixed)
    model.save(folder)
    return model


def mutated_model(source: random.Random, folder: Path) -> Check:
    """A folder of `save_model`, its config or its weights changed."""
    path = folder / "model"
    kind = source.choice(["simplified", "disentangled", "standard", "fixed"])
    model = save_small(kind, path, seed=source.randrange(2**31))
    if kind == "standard" and source.random() < 0.3:
        save_model(model.hooked, path)  # a model of someone else's
    for _ in range(source.choice([1, 1, 2])):
        if source.random() < 0.5:
            change_config(source, path / "config.json")
        else:
            change_weights(source, path / "model.safetensors")

    def read_any() -> bool:
        read = load_model(path)
        with torch.no_grad():
            read(torch.zeros((1, 2), dtype=torch.int64))
        return True

    def read_ours() -> bool:
        ours = load_graph_model(path)
        if ours.sequence_length <= 50:
            check_model(ours)
        return True

    def read() -> bool:
        loaded, ours = refused_or(read_any), refused_or(read_ours)
        target = refused_or(lambda: load_target(str(path)) is not None)
        assert not ours or (loaded and target)
        return target

    return read


def change_config(source: random.Random, path: Path) -> None:
    """Change a JSON file as data or as bytes."""
    content = path.read_bytes()
    changed = change_bytes(source, content)
    if source.random() < 0.7:
        with contextlib.suppress(RecursionError, ValueError):  # changed as bytes before
            data = json.loads(content)
            change_data(source, data)
            changed = json.dumps(data).encode()
    path.write_bytes(changed)


def change_weights(source: random.Random, path: Path) -> None:
    """Change a safetensors file: its bytes, its header, or its tensors."""
    content = path.read_bytes()
    action = source.randrange(4)
    tensors = None
    if action > 1:
        with contextlib.suppress(SafetensorError, TypeError):  # changed as bytes before
            tensors = load_file(path)
    if action == 1 and len(content) > 8:  # a header that lies
        (size,) = struct.unpack("<Q", content[:8])
        with contextlib.suppress(RecursionError, ValueError):
            header = json.loads(content[8 : 8 + size])
            change_data(source, header)
            text = json.dumps(header).encode()
            claimed = source.choice([len(text), size, 0, 2**40, 2**63])
            path.write_bytes(struct.pack("<Q", claimed) + text + content[8 + size :])
            return
    if not tensors:
        path.write_bytes(change_bytes(source, content))
        return
    name = source.choice(sorted(tensors))
    if action == 2 and tensors[name].numel():
        flat = tensors[name].flatten()
        index = source.randrange(flat.numel())
        odd = [-1.0, 2.0, 1e30, math.nan, math.inf] if flat.is_floating_point() else [0, 1, 255]
        flat[index] = source.choice(odd)
    else:
        kinds = [torch.float64, torch.int64, torch.bool, torch.float16]
        changed = [
            tensors[name].to(source.choice(kinds)),
            torch.zeros(0),
            torch.zeros(1, 1, 1, 1, 1),
            torch.zeros(tensors[name].numel()),
        ]
        tensors[source.choice([name, name, "\x1b[31m", "y" * 3000])] = source.choice(changed)
        if source.random() < 0.3:
            tensors.pop(source.choice(sorted(tensors)))
    save_file(tensors, path)


# --- Hugging Face folders ---


def mutated_hugging_face(source: random.Random, folder: Path) -> Check:
    """A small GPT-2 as transformers writes it, its config or weights changed."""
    from transformers.utils import logging

    from tests.hugging_face import save_gpt2

    made_quiet: Any = logging
    made_quiet.disable_progress_bar()
    path = folder / "gpt2"
    save_gpt2(path)
    if source.random() < 0.7:
        change_config(source, path / "config.json")
    else:
        change_weights(source, path / "model.safetensors")

    def read() -> bool:
        def load() -> bool:
            target = load_target(str(path))
            with torch.no_grad():
                target.model(torch.zeros((1, 2), dtype=torch.int64))
            return True

        return refused_or(load)

    return read


# --- Checkpoints and run folders ---


@cache
def _run_files() -> dict[str, bytes]:
    """What a run that was killed leaves: a recipe, rows, and a checkpoint, by path."""
    data = {
        "graph": {"preset": "chain", "sequence_length": 4},
        "task": {"vocab_size": 2},
        "training": {"batch_size": 4, "algorithm": "joint", "joint": {"steps": 4}},
        "evaluation": {"n_sequences": 4, "bayes_draws": 2, "theory_priors": 4},
        "probing": {"every": 1, "images": 2},
        "checkpoints": {"every": 2},
        "wandb": {"mode": "disabled"},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = training.train(parse_recipe(data, source="fuzz"), out=Path(name) / "run").folder
        for gone in ("summary.json", ".lock"):
            (folder / gone).unlink()
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _write_run(folder: Path) -> Path:
    for name, content in _run_files().items():
        (folder / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "run" / name).write_bytes(content)
    return folder / "run"


def mutated_checkpoint(source: random.Random, folder: Path) -> Check:
    """A checkpoint, a file of it changed; its checksums may be those of the change."""
    run = _write_run(folder)
    path = run / "checkpoints" / "00000002"
    for _ in range(source.choice([1, 1, 2])):
        name = source.choice(["checkpoint.json", "config.json", *["state", "model"] * 2])
        if name.endswith("json"):
            change_config(source, path / name)
        else:
            change_weights(source, path / f"{name}.safetensors")
    if source.random() < 0.5:
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
            forge(path)
    recipe = load_recipe(run / "recipe.toml")

    def read() -> bool:
        def valid() -> bool:
            checkpoint = checkpoints.read_checkpoint(path)
            generators = Generators.from_seed(0, torch.device("cpu"))
            experiment = build_experiment(recipe, generators)
            optimizer = torch.optim.Adam(experiment.parameters(["all"]))
            checkpoint.restore(experiment, optimizer, generators)
            experiment.training_loss(2).backward()
            optimizer.step()
            return True

        return refused_or(valid)

    return read


def forge(folder: Path) -> None:
    """Give a changed checkpoint the checksums that belong to the change."""
    path = folder / "checkpoint.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name in manifest["files"]:
        with contextlib.suppress(OSError, ValueError):
            manifest["files"][name] = checkpoints._digest((folder / name).read_bytes())
    manifest.pop("sha256", None)
    manifest["sha256"] = checkpoints._digest(checkpoints._canonical(manifest))
    path.write_text(json.dumps(manifest), encoding="utf-8")


def mutated_run(source: random.Random, folder: Path) -> Check:
    """A run folder, one of its files changed: listed always, resumed or refused."""
    run = _write_run(folder)
    (run / "summary.json").write_text(json.dumps({"state": source.choice(["failed", "odd"])}))
    for _ in range(source.choice([1, 1, 2])):
        name = source.choice(["metrics.jsonl", "run.json", "summary.json", "recipe.toml"])
        content = (run / name).read_bytes()
        if name == "run.json":
            change_config(source, run / name)
        else:
            (run / name).write_bytes(change_bytes(source, content))

    def read() -> bool:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert cli.main(["runs", str(folder)]) == 0

            def valid() -> bool:
                with mock.patch.object(resuming, "train_runs", side_effect=RecipeError("left out")):
                    try:
                        resuming.resume(run)
                    except RecipeError as refusal:
                        if str(refusal) == "left out":
                            return True
                        raise
                return False

            accepted = refused_or(valid)
            assert cli.main(["sync", str(folder), "--dry-run"]) in (0, 2)
        one_line(err.getvalue() or "nothing")
        # What resuming does to the run folder itself is not what is looked for.
        (run / ".lock").unlink(missing_ok=True)
        (run / "summary.json").touch()
        return accepted

    return read


KINDS: dict[str, tuple[Kind, int]] = {
    "recipe": (mutated_recipe, 10),
    "edge list": (mutated_edges, 6),
    "model folder": (mutated_model, 5),
    "Hugging Face folder": (mutated_hugging_face, 1),
    "checkpoint": (mutated_checkpoint, 4),
    "run folder": (mutated_run, 4),
}
"""Every kind of input, and how often it comes up beside the others."""


def try_input(kind: str, source: random.Random, parent: Path) -> bool:
    """Make one input in a folder of its own and read it; True where it was accepted.

    Raises:
        BrokenError: neither accepted and valid nor refused with one clear line, slow, or a file was
            written beside the input.
    """
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        with quiet(folder):
            check = KINDS[kind][0](source, folder)
            before = sorted(parent.rglob("*"))
            start = time.process_time()
            accepted = check()
            if time.process_time() - start > LONGEST_SECONDS:
                raise BrokenError(f"took {time.process_time() - start:.0f} s")
            if sorted(parent.rglob("*")) != before:
                raise BrokenError("a file was written")
    return accepted


@contextmanager
def quiet(folder: Path) -> Iterator[None]:
    """In the folder, without warnings, the generators of torch as they were."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices=[]):
            yield
    finally:
        os.chdir(here)


def plan(n: int, seed: int = 0) -> list[tuple[str, int]]:
    """The kind and the seed of n inputs."""
    source = random.Random(seed)
    kinds, weights = zip(*((kind, often) for kind, (_, often) in KINDS.items()), strict=True)
    return [(source.choices(kinds, weights)[0], seed * 10**6 + i) for i in range(n)]


def main() -> int:
    """Try n inputs and say how many kept the rule."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2000, help="inputs to try")
    parser.add_argument("--seed", type=int, default=0, help="other inputs")
    options = parser.parse_args()
    kept, accepted = 0, dict.fromkeys(KINDS, 0)
    tried = dict.fromkeys(KINDS, 0)
    with tempfile.TemporaryDirectory() as parent:
        for kind, seed in plan(options.n, options.seed):
            tried[kind] += 1
            try:
                accepted[kind] += try_input(kind, random.Random(seed), Path(parent))
                kept += 1
            except Exception as error:
                print(
                    f"{kind}, seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True
                )
                if os.environ.get("FUZZ_TRACEBACK"):
                    import traceback

                    traceback.print_exc()
    for kind, number in tried.items():
        print(f"{kind}: {number} tried, {accepted[kind]} accepted, the others refused")
    print(f"{kept}/{options.n}")
    return 0 if kept == options.n else 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, `tests` is no package
    sys.exit(main())
