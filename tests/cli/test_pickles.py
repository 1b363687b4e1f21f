"""No file that a user names is unpickled, whatever its name is."""

import ast
import json
import pickle
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mechcausal.cli import main as cli
from mechcausal.models.adapter import save_model
from tests.hugging_face import Payload, save_gpt2
from tests.probes.wired import blank

EDGE_RECIPE = '[graph]\npreset = "edge_list"\nedge_list = "graph.txt"\n'
ROOT = Path(__file__).parents[2]


def plain(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(marker)))


def of_torch(path: Path, marker: Path) -> None:
    """As torch.save writes it, an archive."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(marker)))
        archive.writestr("archive/version", "3\n")


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


RECIPES = ("recipe.toml", "recipe.pkl", "recipe", "recipe.pt")
TARGETS = ("model.safetensors", "pytorch_model.bin", "config.json", "model.pt", "recipe.toml")
BESIDE = ("recipe.toml", "matrices.safetensors", "metrics.jsonl", "summary.json", "optimizer.pt")
PICKLES = ("pytorch_model.bin", "model.pt", "model.ckpt")
WEIGHTS = (
    *("model.pth", "model.pkl", "model.npz"),
    *("tf_model.h5", "flax_model.msgpack", "pytorch_model.bin.index.json", "adapter_model.bin"),
)
NEEDED = ("config.json", "model.safetensors", "model.safetensors.index.json")
OPTIONAL = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model"),
    *("generation_config.json", "special_tokens_map.json", "merges.txt", "added_tokens.json"),
)
DETECT = ("detect", ".", "--sequences", "2", "--json")
# What the working folder holds, the file whose place the pickle takes, the command, and whether it
# names the file in a refusal, refuses, accepts, or may do either.
READERS = [
    *(("nothing", name, (word, name), "named") for word in ("train", "theory") for name in RECIPES),
    *(("edges", "graph.txt", (word, "mine.toml"), "named") for word in ("train", "theory")),
    ("edges", "other.pkl", ("train", "mine.toml", "--graph.edge-list", "other.pkl"), "named"),
    *(("nothing", f"a/{name}", ("detect", f"a/{name}"), "refused") for name in TARGETS),
    *(("nothing", f"a/{name}", ("detect", "a"), "refused") for name in TARGETS),
    *((".", name, DETECT, "named") for name in NEEDED[:2]),
    *(("model", f"model/{name}", DETECT, "named") for name in NEEDED[:2]),
    *(
        ("checkpoints/00000002", f"checkpoints/00000002/{name}", (*DETECT, "--step", "2"), "named")
        for name in NEEDED[:2]
    ),
    *(("model", name, DETECT, "accepted") for name in BESIDE),
    *(("gpt2", name, DETECT, "refused") for name in NEEDED),
    *(("gpt2", name, DETECT, "either") for name in OPTIONAL),
    *(("gpt2 without weights", name, DETECT, "named") for name in PICKLES),
    *(("gpt2 without weights", name, DETECT, "refused") for name in WEIGHTS),
]


def prepare(folder: str, name: str) -> None:
    """Make what the working folder holds beside the pickle."""
    if folder == "edges":
        Path("graph.txt").write_text("0 1\n")
        Path("mine.toml").write_text(EDGE_RECIPE)
    elif folder.startswith("gpt2"):
        save_gpt2(Path(), tokenizer=name in OPTIONAL)
        if folder != "gpt2" or name == "model.safetensors.index.json":
            Path("model.safetensors").unlink()
    elif folder != "nothing":
        save_model(blank(1, 2), Path(folder))
        if folder != ".":
            Path("recipe.toml").write_text("seed = 0\n")


@pytest.mark.parametrize(
    ("folder", "name", "arguments", "expected", "write"),
    [
        (*reader, write)
        for reader in READERS
        for write in (plain, of_torch)
        if reader[3] != "either" or write is plain  # no tokenizer's file is an archive
    ],
)
def test_no_file_is_unpickled(
    folder: str,
    name: str,
    arguments: tuple[str, ...],
    expected: str,
    write: Callable[[Path, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    prepare(folder, name)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    write(Path(name), tmp_path / "was_run")

    def load(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", load)
    capsys.readouterr()
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert not (tmp_path / "was_run").exists()
    assert code == {"accepted": 0, "either": code}.get(expected, 2)
    if code == 0:
        assert json.loads(captured.out)["heads"]
    else:
        assert code == 2
        assert captured.err.startswith("mechcausal: ")
        assert captured.err.count("\n") == 1
        assert expected != "named" or Path(name).name in captured.err
        assert not Path("runs").exists()


# --- What our own code calls ---


@cache
def _all_calls() -> list[tuple[Path, str, ast.Call]]:
    """File, function and call of every call in both packages."""
    paths = [*(ROOT / "mechcausal").rglob("*.py"), *(ROOT / "probes").rglob("*.py")]
    return [
        (path, ast.unparse(node.func), node)
        for path in sorted(paths)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


def _calls(name: str) -> list[tuple[Path, ast.Call]]:
    """Calls of a function or method of that name."""
    return [(path, call) for path, function, call in _all_calls() if function.endswith(name)]


def test_nothing_that_runs_what_it_reads_is_called() -> None:
    for name in ("pickle.load", "pickle.loads", "np.load", "joblib.load", "eval"):
        ours = [(path, ast.unparse(call)) for path, call in _calls(name)]
        # model.eval() takes no arguments; numpy reads plain arrays when told to.
        harmless = (".eval()", "allow_pickle=False)")
        assert [(path, text) for path, text in ours if not text.endswith(harmless)] == []
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
    original = dynamic_module_utils.resolve_trust_remote_code

    def resolve(trust_remote_code: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(trust_remote_code)
        return original(trust_remote_code, *arguments, **options)

    for module in ("models.auto.auto_factory", "models.auto.configuration_auto"):
        monkeypatch.setattr(f"transformers.{module}.resolve_trust_remote_code", resolve)
    folder = tmp_path / "gpt2"
    save_gpt2(folder)
    assert cli.main(["detect", str(folder), "--sequences", "2", "--json"]) == 0
    assert seen
    assert not any(seen)
