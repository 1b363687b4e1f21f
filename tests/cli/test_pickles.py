"""No file that a user names is unpickled, whatever its name is."""

import ast
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mechcausal.cli import main as cli
from mechcausal.models.adapter import save_model
from tests.hugging_face import save_gpt2
from tests.probes.wired import blank

EDGE_RECIPE = '[graph]\npreset = "edge_list"\nedge_list = "graph.txt"\n'
ROOT = Path(__file__).parents[2]


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def plain(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(marker)))


def of_torch(path: Path, marker: Path) -> None:
    """As torch.save writes it, an archive."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(marker)))
        archive.writestr("archive/version", "3\n")


@pytest.fixture(params=[plain, of_torch], ids=["plain", "archive"])
def poison(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Writes a malicious pickle; at the end it must not have run."""
    marker = tmp_path / "was_run"

    def write(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        request.param(path, marker)
        return path

    yield write
    assert not marker.exists()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the command refuses."""
    capsys.readouterr()
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("mechcausal: ")
    return captured.err


def test_the_payload_runs_where_it_is_unpickled(tmp_path: Path) -> None:
    for number, write in enumerate((plain, of_torch)):
        marker = tmp_path / f"was_run{number}"
        write(tmp_path / "file", marker)
        if write is plain:
            pickle.loads((tmp_path / "file").read_bytes())
        else:
            with zipfile.ZipFile(tmp_path / "file") as archive:
                pickle.loads(archive.read("archive/data.pkl"))
        assert marker.exists()


@pytest.mark.parametrize("command", ["train", "theory"])
@pytest.mark.parametrize("name", ["recipe.toml", "recipe.pkl", "recipe", "recipe.pt"])
def test_a_pickle_is_no_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], poison: Any, command: str, name: str
) -> None:
    assert name in refused(capsys, command, str(poison(tmp_path / name)))


@pytest.mark.parametrize("command", ["train", "theory"])
def test_a_pickle_is_no_edge_list(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    poison: Any,
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    poison(tmp_path / "graph.txt")
    (tmp_path / "mine.toml").write_text(EDGE_RECIPE)
    assert "graph.txt" in refused(capsys, command, "mine.toml")
    assert not (tmp_path / "runs").exists()


def test_a_pickle_is_no_edge_list_on_the_command_line_either(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    poison: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "graph.txt").write_text("0 1\n")
    (tmp_path / "good" / "mine.toml").write_text(EDGE_RECIPE)
    other = str(poison(tmp_path / "other.pkl"))
    assert "other.pkl" in refused(capsys, "train", "good/mine.toml", "--graph.edge-list", other)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "model.pt", "recipe.toml"]
)
def test_a_pickle_is_no_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], poison: Any, name: str
) -> None:
    path = poison(tmp_path / "folder" / name)
    refused(capsys, "detect", str(path))
    refused(capsys, "detect", str(path.parent))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("place", [".", "model", "checkpoints/00000002"])
def test_a_pickle_is_no_part_of_a_saved_model_or_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], poison: Any, place: str, name: str
) -> None:
    run = tmp_path / "run"
    save_model(blank(1, 1), run / place)
    step: tuple[str, ...] = ()
    if place != ".":
        (run / "recipe.toml").write_text("seed = 0\n")
        step = ("--step", "2") if place.startswith("checkpoints") else ()
    poison(run / place / name)
    assert name in refused(capsys, "detect", str(run), *step)


@pytest.mark.parametrize(
    "name", ["recipe.toml", "matrices.safetensors", "metrics.jsonl", "summary.json", "optimizer.pt"]
)
def test_a_pickle_beside_a_runs_weights_is_not_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], poison: Any, name: str
) -> None:
    run = tmp_path / "run"
    save_model(blank(1, 2), run / "model")
    (run / "recipe.toml").write_text("seed = 0\n")
    poison(run / name)
    capsys.readouterr()
    assert cli.main(["detect", str(run), "--sequences", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["heads"]


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
OTHERS = ("generation_config.json", "special_tokens_map.json", "merges.txt", "added_tokens.json")


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model.safetensors.index.json", *TOKENIZER, *OTHERS],
)
def test_a_pickle_in_a_hugging_face_folder_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], poison: Any, name: str
) -> None:
    folder = tmp_path / "gpt2"
    save_gpt2(folder, tokenizer=name not in ("config.json", "model.safetensors"))
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    poison(folder / name)
    capsys.readouterr()
    code = cli.main(["detect", str(folder), "--sequences", "2"])
    errors = capsys.readouterr().err
    # What is not needed may lie there; all else is refused.
    assert code == 2 or name in (*TOKENIZER, *OTHERS)
    assert code in (0, 2)
    if code == 2:
        assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    [
        *("pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt", "model.npz"),
        *("tf_model.h5", "flax_model.msgpack", "pytorch_model.bin.index.json", "adapter_model.bin"),
    ],
)
def test_a_pickle_in_place_of_the_weights_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    poison: Any,
    name: str,
) -> None:
    folder = tmp_path / "gpt2"
    save_gpt2(folder)
    (folder / "model.safetensors").unlink()
    poison(folder / name)

    def load(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", load)
    assert "torch.load" not in refused(capsys, "detect", str(folder))


# --- What our own code calls ---


def _calls(name: str) -> Iterator[tuple[Path, ast.Call]]:
    """Calls of a function or method of that name in both packages."""
    for path in sorted([*(ROOT / "mechcausal").rglob("*.py"), *(ROOT / "probes").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name):
                yield path, node


@pytest.mark.parametrize("name", ["pickle.load", "pickle.loads", "np.load", "joblib.load", "eval"])
def test_nothing_that_runs_what_it_reads_is_called(name: str) -> None:
    ours = [(path, ast.unparse(call)) for path, call in _calls(name)]
    # model.eval() takes no arguments; numpy reads plain arrays where it is told to.
    harmless = (".eval()", "allow_pickle=False)")
    assert [(path, text) for path, text in ours if not text.endswith(harmless)] == []


def test_torch_loads_weights_alone() -> None:
    for path, call in _calls("torch.load"):
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        assert options.get("weights_only") == "True", path


def test_code_of_a_hugging_face_model_is_never_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("from_pretrained", "from_config", "boot_transformers"):
        for path, call in _calls(name):
            options = {option.arg: ast.unparse(option.value) for option in call.keywords}
            assert options.get("trust_remote_code", "False") == "False", path
    from transformers import dynamic_module_utils

    seen: list[Any] = []
    whole = dynamic_module_utils.resolve_trust_remote_code

    def resolve(trust_remote_code: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(trust_remote_code)
        return whole(trust_remote_code, *arguments, **options)

    for module in ("models.auto.auto_factory", "models.auto.configuration_auto"):
        monkeypatch.setattr(f"transformers.{module}.resolve_trust_remote_code", resolve)
    folder = tmp_path / "gpt2"
    save_gpt2(folder)
    assert cli.main(["detect", str(folder), "--sequences", "2", "--json"]) == 0
    assert seen
    assert not any(seen)
