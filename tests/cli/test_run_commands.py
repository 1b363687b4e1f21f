"""`mechcausal resume`, `runs` and `sync` as a user types them."""

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mechcausal.cli.main import main
from mechcausal.cli.sweep import _report
from mechcausal.cli.train import _print_result
from mechcausal.recipes import RecipeError, load_recipe, recipe_to_toml
from mechcausal.records.run_folder import RunFolderError, hold, read_metrics, read_summary
from mechcausal.records.tracking import RecordError
from mechcausal.sweeps.definition import load_sweep
from mechcausal.sweeps.driver import SweepResult
from mechcausal.sweeps.plan import plan
from mechcausal.training.errors import explained
from mechcausal.training.run import RunResult, TrainingError, train
from tests.commands import check_refused, refused
from tests.training.test_resuming import crashed, killed, tiny


def test_a_killed_run_is_listed_resumed_and_listed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = killed(tmp_path / "run", 17)
    assert main(["runs", str(tmp_path)]) == 0
    assert re.search(r"run .* interrupted .* 16/24", capsys.readouterr().out)
    assert main(["resume", str(folder), "--quiet"]) == 0
    output = capsys.readouterr().out
    assert "finished after 24 steps, resumed at 15" in output
    assert main(["runs", str(tmp_path), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["state"], entry["step"], entry["n_steps"]) == ("finished", 24, 24)
    assert entry["figures"] == read_metrics(folder)[-1]
    assert main(["runs", str(tmp_path), "--state", "failed"]) == 0
    assert "no runs" in capsys.readouterr().out


def test_a_failed_run_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.toml").write_text(recipe_to_toml(tiny()))
    folder = tmp_path / "run"
    options = ["--training.epsilon", "0.0", "--training.stage1.lr", "1e9", "--quiet"]
    assert main(["train", str(tmp_path / "r.toml"), "--out", str(folder), *options]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    command = re.search(r"mechcausal (resume .*--allow-change)", line)
    assert command
    assert main(command[1].split()) in (0, 1)
    assert (folder / "before-step-0-1" / "recipe.toml").is_file()


ODD = "my run's [bold]folder[/]"
"""A name that a shell would take apart, and that rich would take for markup."""


def told(pattern: str, text: str) -> list[str]:
    """The words of the command that a message tells the user to copy, as a shell reads them."""
    command = re.search(pattern, text)
    assert command, text
    return shlex.split(command[0])


def test_commands_to_copy_are_quoted_for_the_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ODD
    resume = ["mechcausal", "resume", str(folder)]
    unstable = tiny(training__epsilon=0.0, training__stage1__lr=1e9)
    with pytest.raises(TrainingError) as failed:
        train(unstable, out=folder)
    words = told("mechcausal resume .*--allow-change", str(failed.value))
    assert words == [*resume, "--training.stage1.lr", "1e+08", "--allow-change"]
    with pytest.raises(RunFolderError) as taken:
        train(tiny(), out=folder)
    assert told("mechcausal resume .*", str(taken.value)) == resume
    full = explained(RecordError("no space"), folder, tiny(), "at step 3")
    assert told("mechcausal resume .*", str(full)) == resume

    result = SimpleNamespace(state="interrupted", start=0, summary={"train/steps": 1})
    vars(result).update(folder=folder, url=None, wandb_folder=None)
    _print_result(cast(Any, result))
    output = capsys.readouterr().out
    assert told("mechcausal resume .*", output) == resume
    assert f"run:    {folder}\n" in output

    fragment = folder / "wandb" / "offline-run-1"
    for name, value in (("fragments", [fragment]), ("is_uploaded", False), ("wandb_steps", [1])):
        monkeypatch.setattr(f"mechcausal.records.wandb_fragments.{name}", lambda *_, v=value: v)
    monkeypatch.setattr("mechcausal.cli.sync.read_process", lambda run: {"wandb_id": "id"})
    assert main(["sync", str(folder), "--dry-run"]) == 0
    assert told(".*", capsys.readouterr().out) == ["wandb", "sync", str(fragment)]

    (tmp_path / "s.toml").write_text('recipe = "manual"\nseeds = 2')
    file = tmp_path / ODD / "w.yaml"
    assert main(["sweep", str(tmp_path / "s.toml"), "--as-wandb", str(file)]) == 0
    output = capsys.readouterr().out
    assert told("wandb sweep .*(?=, then)", output) == ["wandb", "sweep", str(file)]
    unfinished = SweepResult(folder, plan(load_sweep(tmp_path / "s.toml"), folder), {})
    assert _report(unfinished) == 1
    again = told("mechcausal sweep .*", capsys.readouterr().err)
    assert again == ["mechcausal", "sweep", str(folder)]


def test_a_change_is_refused_until_it_is_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = crashed(tmp_path / "run", 17)
    line = refused(capsys, "resume", folder, "--training.stage2.lr", "0.01")
    assert "training.stage2.lr was 0.05, is 0.01" in line
    assert "--allow-change" in line
    text = (folder / "recipe.toml").read_text().replace("lr = 0.05", "lr = 0.02")
    (folder / "recipe.toml").write_text(text)
    assert "training.stage2.lr was 0.05, is 0.02" in refused(capsys, "resume", folder)
    assert read_summary(folder)["state"] == "failed"
    assert main(["resume", str(folder), "--allow-change", "--quiet"]) == 0
    assert load_recipe(folder / "recipe.toml").training.stage2.lr == 0.02


@pytest.fixture
def finished(finished_run: RunResult) -> Path:
    return finished_run.folder


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["resume"], "required"),
        (["resume", "{tmp}/nowhere"], "nowhere: not a run folder: no recipe.toml"),
        (["resume", "{tmp}/file"], "file: not a run folder"),
        (["resume", "{run}"], "has finished; there is nothing to resume"),
        (["resume", "{run}", "--training.stage1.steps", "no"], "no"),
        (["resume", "{run}", "--bogus"], "--bogus"),
        (["resume", "{run}", "--wandb-mode", "sometimes"], "sometimes"),
        (["runs", "{tmp}/nowhere"], "nowhere: no such folder"),
        (["runs", "{run}", "--state", "tired"], "tired"),
        (["sync"], "required"),
        (["sync", "{tmp}/nowhere"], "nowhere: no run folder there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    part: str,
) -> None:
    (tmp_path / "file").touch()
    words = [word.format(tmp=tmp_path, run=finished) for word in arguments]
    check_refused(capsys, words, [part], finished)


def test_a_run_that_is_being_written_is_left_alone(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = killed(tmp_path / "run", 7)
    with hold(folder):
        assert "is writing this run" in refused(capsys, "resume", folder)
        assert main(["sync", str(folder)]) == 0
        assert "still running" in capsys.readouterr().out
        assert main(["runs", str(tmp_path)]) == 0
        assert "running" in capsys.readouterr().out


def test_a_damaged_run_is_listed_with_what_is_wrong(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "summary.json").write_text("{")
    (folder / "metrics.jsonl").write_text("nonsense\n[1]\n")
    assert main(["runs", str(tmp_path)]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "metrics.jsonl, line 1: not a row" in output
    assert "interrupted" in output


DAMAGES = [
    ("summary.json", b'{"a":' * 10_000),
    ("summary.json", b'{"a":' * 500 + b"1" + b"}" * 500),
    ("summary.json", b'{"state": "finished", "train/steps": "x"}'),
    ("summary.json", b'{"state": "finished", "warnings": 5}'),
    ("summary.json", b'{"state": []}'),
    ("summary.json", b"{}"),
    ("summary.json", b"\xff"),
    ("run.json", b"[" * 10_000),
    ("run.json", b'{"a":' * 500 + b"1" + b"}" * 500),
    ("run.json", b"\xff"),
    ("metrics.jsonl", b'{"train/step": 1, "loss/eval": ' + b"1" * 400 + b"}\n"),
    ("metrics.jsonl", b'{"train/step": ' + b"1" * 400 + b"}\n"),
    ("metrics.jsonl", b'{"train/step": 1, "a": ' + b"[" * 500 + b"]" * 500 + b"}\n"),
    ("metrics.jsonl", b'{"train/step": "x"}\n'),
    ("recipe.toml", b"a = " + b"[" * 10_000),
    ("matrices.safetensors", b"\xff" * 100),
]


def test_damaged_runs_keep_no_other_from_being_listed_and_compared(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "good")
    for number, (name, content) in enumerate(DAMAGES):
        (shutil.copytree(finished, tmp_path / f"bad{number:02}") / name).write_bytes(content)
    assert main(["runs", str(tmp_path)]) == 0
    assert "good" in capsys.readouterr().out
    assert main(["runs", str(tmp_path), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    names = [Path(run["folder"]).name for run in listed]
    assert names == [*(f"bad{number:02}" for number in range(len(DAMAGES))), "good"]
    assert listed[-1]["state"] == "finished"
    assert main(["report", str(tmp_path)]) == 0
    assert "comparison.html" in capsys.readouterr().out
    assert main(["sync", str(tmp_path), "--dry-run"]) == 0


@pytest.mark.parametrize(("name", "content"), DAMAGES, ids=lambda v: str(v)[:40])
def test_a_damaged_run_is_drawn_or_refused_in_one_line(
    tmp_path: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
) -> None:
    def train_runs(*arguments: Any) -> None:
        raise RecipeError("left out")

    monkeypatch.setattr("mechcausal.training.resuming.train_runs", train_runs)
    folder = shutil.copytree(finished, tmp_path / "bad")
    (folder / name).write_bytes(content)
    code = main(["report", str(folder)])
    assert (code, capsys.readouterr().err.count("\n")) in ((0, 0), (2, 1))
    refused(capsys, "resume", folder, "--quiet")


def test_a_run_without_wandb_has_nothing_to_upload(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("wandb"))
    assert main(["sync", str(copy)]) == 0
    assert "no W&B run in it" in capsys.readouterr().out
