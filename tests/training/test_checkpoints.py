"""Checkpoints: what is read back is what was written, or it is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from mechcausal.recipes import Recipe, parse_recipe, recipe_to_dict
from mechcausal.training import checkpoints
from mechcausal.training.checkpoints import (
    Checkpoint,
    CheckpointError,
    checkpoint_folders,
    differences,
    newest_checkpoint,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from mechcausal.training.experiments import Experiment, Generators, build_experiment
from tests.refusals import raises_one_line

CPU = torch.device("cpu")


def recipe(kind: str = "simplified", **overrides: Any) -> Recipe:
    data = {
        "graph": {"preset": "chain", "sequence_length": 6},
        "task": {"vocab_size": 3},
        "model": {"kind": kind} | ({"d_model": 8, "n_heads": 1} if kind == "standard" else {}),
        "training": {"algorithm": "joint", "joint": {"steps": 5, "optimizer": "adam"}},
        "evaluation": {"n_sequences": 8, "bayes_draws": 2, "theory_priors": 10},
    }
    return parse_recipe(data, source="test").with_overrides(**overrides)


class Started:
    """An experiment with its optimizer, after some steps."""

    def __init__(self, values: Recipe, *, steps: int = 0) -> None:
        self.generators = Generators.from_seed(values.seed, CPU)
        self.experiment: Experiment = build_experiment(values, self.generators)
        self.optimizer = torch.optim.Adam(self.experiment.parameters(["all"]), lr=0.1)
        for _ in range(steps):
            self.step()

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.experiment.training_loss(16)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def write(self, folder: Path, *, step: int = 3) -> Path:
        write_checkpoint(
            folder,
            step=step,
            stage="joint",
            experiment=self.experiment,
            optimizer=self.optimizer,
            generators=self.generators,
        )
        return folder

    def restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.restore(self.experiment, self.optimizer, self.generators)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Started(recipe(), steps=3).write(tmp_path_factory.mktemp("run") / "00000003")


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(good, tmp_path / "checkpoints" / good.name))


@pytest.mark.parametrize("kind", ["simplified", "disentangled", "standard"])
def test_training_goes_on_with_the_same_numbers(tmp_path: Path, kind: str) -> None:
    original = Started(recipe(kind), steps=3)
    original.write(tmp_path / "3")
    other = Started(recipe(kind))
    other.restore(read_checkpoint(tmp_path / "3"))
    assert [other.step() for _ in range(3)] == [original.step() for _ in range(3)]
    for ours, theirs in zip(
        other.experiment.parameters(["all"]), original.experiment.parameters(["all"]), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_says_what_it_is(good: Path) -> None:
    checkpoint = read_checkpoint(good)
    assert (checkpoint.step, checkpoint.stage) == (3, "joint")
    assert checkpoint.recipe == recipe_to_dict(recipe())
    assert checkpoint.environment["torch"] == torch.__version__
    assert set(checkpoint.generators) == {"data", "evaluation", "theory"}
    assert not [path for path in good.parent.iterdir() if path.name.startswith(".")]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "state.safetensors", "checkpoint.json"]
)
def test_a_damaged_file_is_named_and_refused(copied: Path, name: str) -> None:
    path = copied / name
    content, foreign = path.read_bytes(), save({"x": torch.zeros(3)})
    for damaged in (content[:-7], b"", flipped(content), foreign, None, "a folder"):
        path.unlink()
        if isinstance(damaged, bytes):
            path.write_bytes(damaged)
        elif damaged:
            path.mkdir()
        with raises_one_line(CheckpointError) as caught:
            read_checkpoint(copied)
        assert str(path) in str(caught.value)
        path.touch(exist_ok=True)


def test_every_single_bit_of_a_manifest_counts(copied: Path) -> None:
    path = copied / "checkpoint.json"
    content = path.read_bytes()
    before = read_checkpoint(copied)
    generator = torch.Generator().manual_seed(0)
    for position in torch.randperm(len(content), generator=generator)[:150].tolist():
        bit = 1 << int(torch.randint(8, (1,), generator=generator))
        path.write_bytes(
            content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :]
        )
        try:
            after = read_checkpoint(copied)
        except CheckpointError:
            continue
        assert (after.step, after.stage, after.recipe) == (before.step, before.stage, before.recipe)


def forged(folder: Path, **changes: Any) -> None:
    """Change a manifest and give it the checksum that belongs to the change."""
    path = folder / "checkpoint.json"
    manifest = json.loads(path.read_text()) | changes
    manifest["files"] = {
        name: checkpoints._digest((folder / name).read_bytes()) for name in checkpoints._FILES
    } | changes.get("files", {})
    del manifest["sha256"]
    manifest["sha256"] = checkpoints._digest(checkpoints._canonical(manifest))
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": "3"},
        {"step": 3.0},
        {"stage": None},
        {"recipe": []},
        {"files": {"../escape": "0" * 64}, "environment": None},
        {"format": "mechcausal-checkpoint-0"},
    ],
    ids=str,
)
def test_a_manifest_of_wrong_values_is_refused(copied: Path, changes: dict[str, Any]) -> None:
    forged(copied, **changes)
    with pytest.raises(CheckpointError, match=r"checkpoint.json: not a checkpoint"):
        read_checkpoint(copied)


def test_state_that_nobody_asked_for_is_refused(copied: Path) -> None:
    save_file({"generator/elsewhere": torch.zeros(3)}, copied / "state.safetensors")
    forged(copied)
    with pytest.raises(CheckpointError, match="generator/elsewhere"):
        read_checkpoint(copied)


@pytest.mark.parametrize(
    "tensors",
    [
        {"optimizer/0/exp_avg": torch.zeros(3, 4)},
        {"optimizer/99/exp_avg": torch.zeros(6, 6)},
        {"generator/data": torch.zeros(3)},
        {"generator/data": torch.zeros(7, dtype=torch.uint8)},
    ],
    ids=lambda tensors: next(iter(tensors)),
)
def test_state_that_does_not_fit_is_refused(copied: Path, tensors: dict[str, Any]) -> None:
    save_file(tensors, copied / "state.safetensors")
    forged(copied)
    with pytest.raises(CheckpointError, match="does not fit the recipe"):
        Started(recipe()).restore(read_checkpoint(copied))


@pytest.mark.parametrize(
    "other",
    [
        recipe("disentangled"),
        recipe(graph__sequence_length=7),
        recipe(task__vocab_size=4),
    ],
    ids=["kind", "length", "vocabulary"],
)
def test_weights_of_another_model_are_refused(good: Path, other: Recipe) -> None:
    with raises_one_line(CheckpointError, match="does not fit the recipe"):
        Started(other).restore(read_checkpoint(good))


def test_an_interrupted_write_leaves_the_old_one(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save", fail)
    with pytest.raises(OSError, match="No space"):
        Started(recipe(), steps=1).write(copied)
    assert read_checkpoint(copied).step == 3
    assert [path.name for path in copied.parent.iterdir()] == ["00000003"]


def test_the_newest_good_one_is_found_and_bad_ones_are_named(tmp_path: Path) -> None:
    started = Started(recipe())
    for step in (2, 4, 6, 8):
        started.write(tmp_path / "checkpoints" / f"{step:08d}", step=step)
    (tmp_path / "checkpoints" / "00000008" / "config.json").write_text("{}")
    (tmp_path / "checkpoints" / "00000006").rename(tmp_path / "checkpoints" / "00000007")
    warnings: list[str] = []
    newest = newest_checkpoint(tmp_path, warnings)
    assert newest is not None
    assert newest.step == 4
    assert "00000008/config.json" in warnings[0]
    assert "holds step 6" in warnings[1]
    assert newest_checkpoint(tmp_path / "none", warnings) is None


def test_pruning_keeps_the_newest_and_the_named(tmp_path: Path) -> None:
    for step in range(6):
        (tmp_path / "checkpoints" / f"{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes").mkdir()
    prune(tmp_path, keep=2, kept={1, 9})
    assert list(checkpoint_folders(tmp_path)) == [1, 4, 5]
    assert (tmp_path / "checkpoints" / "notes").is_dir()


def test_differences_are_found_at_any_depth() -> None:
    before = {"a": {"b": 1, "c": [1]}, "d": 1}
    assert differences(before, before) == {}
    assert differences(before, {"a": {"b": 2, "c": [1]}, "e": 0}) == {
        "a.b": (1, 2),
        "d": (1, None),
        "e": (None, 0),
    }
