"""`mechcausal explain`: what it prints and leaves behind, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from mechcausal.records.wandb_fragments import count_wandb_rows
from mechcausal.studies.explanations import catalogue
from mechcausal.studies.explanations.recommender import RecommenderSettings, train_recommender
from mechcausal.studies.explanations.sessions import ThemeRule
from mechcausal.support.signals import StopRequested
from mechcausal.training.run import NonFiniteLossError, TrainingError
from probes.causal_discovery.explanation import METHODS
from tests.commands import outcome
from tests.studies.test_sentiment import TEXT, save_bert


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a command, in which a recommender trains in a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    settings = RecommenderSettings(steps=5, batch_size=16)

    def short(source: Any, **options: Any) -> Any:
        return train_recommender(source, **{**options, "settings": settings})

    monkeypatch.setattr(catalogue, "train_recommender", short)

    def small() -> ThemeRule:
        return ThemeRule(themes=2, members=1, others=2, length=4, most=2)

    monkeypatch.setattr("mechcausal.studies.explanations.sessions.ThemeRule", small)
    monkeypatch.setattr(catalogue, "_HELD_OUT", 20)
    return tmp_path


def test_a_comparison_is_printed_written_drawn_and_tracked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--seeds", "2", "--sequences", "3", "--budget", "40")
    code, output, errors = outcome(
        capsys, "explain", "recommender", *sizes, "--out", "here", "--json"
    )
    assert code == 0
    assert errors.count("\n") == 2  # a line a seed
    content = json.loads(output)
    assert content == json.loads(Path("here/explanations.json").read_text())
    assert [row["method"] for row in content["rows"]] == [*LISTED]
    for row in content["rows"]:
        assert 0 <= row["found"] <= 1
        assert row["verified"] in (1, None)
        assert row["calls"] <= 40 or row["method"] == "minimum"
    assert Path("here/explanations.png").stat().st_size > 10_000
    assert Path("here/seed-1/model/model.safetensors").is_file()
    (run,) = Path("here/wandb").glob("offline-run-*")
    assert count_wandb_rows(run) == 3  # a row a seed, and the table
    code, output, errors = outcome(capsys, "explain", "recommender", *sizes, "--out", "here")
    assert (code, output) == (2, "")
    assert "already holds explanations.json" in errors


@pytest.mark.parametrize("step", ["log", "finish"])
def test_wandb_that_fails_on_the_way_does_not_cost_the_result(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise wandb.errors.CommError("no connection\nat all")

    monkeypatch.setattr(wandb.Run, step, fail)
    sizes = ("--seeds", "1", "--sequences", "2", "--budget", "20", "--out", "here")
    code, output, errors = outcome(capsys, "explain", "recommender", *sizes, "--json")
    assert code == 0
    assert json.loads(output) == json.loads(Path("here/explanations.json").read_text())
    (warning,) = (line for line in errors.splitlines() if "warning" in line)
    assert "no connection" in warning
    assert "the result is in explanations.json" in warning


LISTED = ("causal", "random", "occlusion", "attention", "exhaustive", "minimum")


def test_a_comparison_repeats_and_prints_a_table(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    sizes = ("--seeds", "1", "--sequences", "2", "--wandb-mode", "disabled")
    tables = []
    for out in ("one", "two"):
        code, output, _ = outcome(capsys, "explain", "recommender", *sizes, "--out", out)
        assert code == 0
        tables.append(output.replace(f"{out}/", ""))
    assert tables[0] == tables[1]
    for part in ("causal graph", "shuffled", "true minimum", "model runs", "explanations.png"):
        assert part in tables[0]
    assert torch.get_num_threads() == threads
    assert not Path("one/wandb").exists()


def test_ratings_are_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{u}\t{(u + i) % 9}\t3\t{i}\n" for u in range(6) for i in range(5)]
    Path("u.data").write_text("".join(lines))
    arguments = ("--data", "u.data", "--seeds", "1", "--sequences", "2", "--budget", "30")
    code, output, _ = outcome(
        capsys, "explain", "recommender", *arguments, "--json", "--wandb-mode", "disabled"
    )
    assert code == 0
    content = json.loads(output)
    assert content["data"] == "RatedSessions"
    assert content["rows"][0]["causes"] is None
    assert Path(content["folder"]).parent == Path("runs/explain_recommender")


def test_texts_are_explained_with_a_hugging_face_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_bert(folder / "bert")
    capsys.readouterr()  # transformers shows its progress
    arguments = ("sentiment", "--model", "bert", "--text", TEXT, "film was")
    code, output, errors = outcome(capsys, "explain", *arguments, "--json")
    assert (code, errors) == (0, "")
    rows = json.loads(output)["explanations"]
    assert [(row["text"], row["method"]) for row in rows] == [
        (text, method) for text in (TEXT, "film was") for method in METHODS
    ]
    code, output, errors = outcome(capsys, "explain", *arguments)
    assert (code, errors) == (0, "")
    assert TEXT.split()[0] in output
    assert "LABEL_" in output


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (StopRequested("stopped while a/b trained", 15), 143, "stopped while a/b trained"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (NonFiniteLossError("the loss became nan"), 1, "the loss became nan"),
        (TrainingError("out of memory at step 3"), 1, "out of memory at step 3"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_training_that_does_not_come_to_its_end_is_one_line(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    said: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mechcausal.studies.explanations.bridge.train", fail)
    found = outcome(capsys, "explain", "bridge", "--quick", "--wandb-mode", "disabled")
    assert found == (code, "", f"mechcausal: {said}\n")


BAD = [
    ([], ["an application", "recommender, sentiment, bridge"]),
    (["movies"], ["movies: no such application", "recommender"]),
    (["recommender", "random_tree"], ["a recipe goes with bridge"]),
    (["sentiment", "--data", "x"], ["--data goes with recommender"]),
    (["recommender", "--model", "x", "--text", "a"], ["--model goes with sentiment"]),
    (["sentiment", "--model", "x"], ["--model and --text go together"]),
    (["sentiment", "--text", "x"], ["--model and --text go together"]),
    (["sentiment", "--model", "gone", "--text", "x"], ["gone/config.json", "No such file"]),
    (["sentiment", "--model", "x", "--text", "x", "--seeds", "2"], ["--seeds goes with training"]),
    (["bridge", "--budget", "9"], ["--budget goes with recommender or sentiment"]),
    (["recommender", "--seeds", "0"], ["--seeds is 0: at least 1"]),
    (["recommender", "--sequences", "0"], ["--sequences is 0"]),
    (["recommender", "--budget", "2"], ["--budget is 2: at least 3"]),
    (["recommender", "--n-eff", "3"], ["--n-eff is 3"]),
    (["recommender", "--n-eff", "nan"], ["--n-eff is nan"]),
    (["recommender", "--data", "gone.dat"], ["gone.dat: No such file"]),
    (["recommender", "--data", "bad.csv"], ["bad.csv, line 1"]),
    (["recommender", "--device", "gpu"], ["gpu", "cuda"]),
    (["recommender", "--out", "bad.csv"], ["bad.csv: not writable"]),
    (["recommender", "--wandb-mode", "bogus"], ["bogus", "offline"]),
    (["recommender", "--quik"], ["--quik", "did you mean --quick"]),
    (["bridge", "gone.toml"], ["gone.toml"]),
    (["bridge", "repeated_tokens"], ["no causal graph"]),
    (["bridge", "--device", "gpu"], ["gpu"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD, ids=lambda v: " ".join(v)[:60])
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    Path("bad.csv").write_text("a,b\n1,2\n")
    before = sorted(folder.rglob("*"))
    code, output, errors = outcome(capsys, "explain", *arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("mechcausal: ")
    assert errors.count("\n") == 1
    for part in parts:
        assert part in errors
    assert sorted(folder.rglob("*")) == before
