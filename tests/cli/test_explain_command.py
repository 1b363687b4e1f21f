"""`mechcausal explain`: what it prints and leaves behind, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from mechcausal.records.wandb_fragments import count_wandb_rows
from mechcausal.studies.explanations import applications
from mechcausal.studies.explanations.sessions import ThemeRule
from mechcausal.studies.explanations.training import fit
from mechcausal.support.signals import StopRequested
from mechcausal.training.run import NonFiniteLossError, TrainingError
from probes.causal_discovery.explanation import METHODS
from tests.commands import Command, check_refused, command_in
from tests.studies.test_text_classifier import TEXT, save_bert

LISTED = ("causal", "random", "occlusion", "attention", "exhaustive", "minimum")


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """`mechcausal explain` in an empty folder, where a recommender trains in a second."""

    def short(model: Any, loss: Any, *, steps: int, lr: float) -> None:
        fit(model, loss, steps=12, lr=lr)

    def small() -> ThemeRule:
        return ThemeRule(themes=2, members=1, others=2, length=4, most=2)

    monkeypatch.setattr(applications, "fit", short)
    monkeypatch.setattr("mechcausal.studies.explanations.sessions.ThemeRule", small)
    monkeypatch.setattr(applications, "_HELD_OUT", 20)
    return command_in(tmp_path, monkeypatch, capsys, "explain")


def test_a_comparison_is_printed_written_drawn_tracked_and_repeats(command: Command) -> None:
    threads = torch.get_num_threads()
    sizes = ("recommender", "--seeds", "2", "--sequences", "2", "--budget", "40")
    code, output, errors = command(*sizes, "--out", "one", "--json")
    assert code == 0
    assert errors.count("\n") == 2  # a line a seed
    content = json.loads(output)
    assert content == json.loads(Path("one/explanations.json").read_text())
    assert [row["method"] for row in content["rows"]] == [*LISTED]
    for row in content["rows"]:
        assert 0 <= row["found"] <= 1
        assert row["verified"] in (1, None)
        assert row["calls"] <= 40 or row["method"] == "minimum"
    assert Path("one/explanations.png").stat().st_size > 10_000
    assert Path("one/seed-1/model/model.safetensors").is_file()
    (run,) = Path("one/wandb").glob("offline-run-*")
    assert count_wandb_rows(run) == 3  # a row a seed, and the table

    code, output, errors = command(*sizes, "--out", "two", "--wandb-mode", "disabled")
    assert code == 0
    for part in ("causal graph", "shuffled", "true minimum", "model runs", "explanations.png"):
        assert part in output
    repeated = json.loads(Path("two/explanations.json").read_text())
    assert repeated == content | {"folder": "two"}
    assert not Path("two/wandb").exists()
    assert torch.get_num_threads() == threads

    code, output, errors = command(*sizes, "--out", "one")
    assert (code, output) == (2, "")
    assert "already holds explanations.json" in errors


@pytest.mark.parametrize("step", ["log", "finish"])
def test_wandb_that_fails_on_the_way_does_not_cost_the_result(
    command: Command, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise wandb.errors.CommError("no connection\nat all")

    monkeypatch.setattr(wandb.Run, step, fail)
    sizes = ("--seeds", "1", "--sequences", "1", "--budget", "10", "--out", "here")
    code, output, errors = command("recommender", *sizes, "--json")
    assert code == 0
    assert json.loads(output) == json.loads(Path("here/explanations.json").read_text())
    (warning,) = (line for line in errors.splitlines() if "warning" in line)
    assert "no connection" in warning
    assert "the result is in explanations.json" in warning


def test_ratings_are_explained(command: Command) -> None:
    lines = [f"{u}\t{(u + i) % 9}\t3\t{i}\n" for u in range(6) for i in range(5)]
    Path("u.data").write_text("".join(lines))
    sizes = ("--seeds", "1", "--sequences", "1", "--budget", "20")
    code, output, _ = command(
        "recommender", "--data", "u.data", *sizes, "--json", "--wandb-mode", "disabled"
    )
    assert code == 0
    content = json.loads(output)
    assert content["data"] == "RatedSessions"
    assert content["rows"][0]["causes"] is None
    assert Path(content["folder"]).parent == Path("runs/explain_recommender")


def test_texts_are_explained_with_a_hugging_face_folder(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    save_bert(Path("bert"))
    capsys.readouterr()  # transformers shows its progress
    arguments = ("sentiment", "--model", "bert", "--text", TEXT, "film was")
    code, output, errors = command(*arguments, "--json")
    assert (code, errors) == (0, "")
    rows = json.loads(output)["explanations"]
    assert [(row["text"], row["method"]) for row in rows] == [
        (text, method) for text in (TEXT, "film was") for method in METHODS
    ]
    code, output, errors = command(*arguments)
    assert (code, errors) == (0, "")
    assert TEXT.split()[0] in output
    assert "LABEL_" in output


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (StopRequested("stopped while a/b trained", 15), 143, "stopped while a/b trained"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (NonFiniteLossError("the loss became nan"), 1, "the loss became nan"),
        (TrainingError("out of memory at step 3"), 1, "out of memory at step 3"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_training_that_does_not_end_is_one_line(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mechcausal.studies.explanations.bridge.train", fail)
    result = command("bridge", "--quick", "--wandb-mode", "disabled")
    assert result == (code, "", f"mechcausal: {message}\n")


BAD = [
    ([], ["an application", "recommender, sentiment, bridge"]),
    (["movies"], ["movies: no such application", "recommender"]),
    (["recommender", "random_tree"], ["a recipe goes with bridge"]),
    (["sentiment", "--data", "x"], ["--data goes with recommender"]),
    (["recommender", "--model", "x", "--text", "a"], ["--model goes with sentiment"]),
    (["sentiment", "--model", "x"], ["--model and --text go together"]),
    (["sentiment", "--text", "x"], ["--model and --text go together"]),
    (["sentiment", "--model", "gone", "--text", "x"], ["gone/config.json", "no such file"]),
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
@pytest.mark.usefixtures("command")
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    Path("bad.csv").write_text("a,b\n1,2\n")
    check_refused(capsys, ["explain", *arguments], parts, tmp_path)
