"""The record of a run: W&B beside plain files, rows counted on both sides, nothing lost unsaid."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechcausal.cli.main import main
from mechcausal.recipes import Recipe, WandbMode, load_recipe, parse_recipe, recipe_to_dict
from mechcausal.records import tracking
from mechcausal.records.run_folder import RunFolderError, new_run_folder, read_metrics, read_summary
from mechcausal.records.tracking import RunRecord
from mechcausal.records.wandb_fragments import count_wandb_rows
from mechcausal.records.wandb_runs import TrackingError, resolve_mode
from mechcausal.support.signals import StopRequested, stop_on_signals
from tests.refusals import raises_one_line


def recipe(**overrides: Any) -> Recipe:
    data = {"name": "tiny", "graph": {"preset": "chain", "sequence_length": 5}}
    return parse_recipe(data, source="test").with_overrides(**overrides)


def made(values: Recipe, out: Path | None) -> Path:
    """A new run folder that nobody holds any more."""
    with new_run_folder(values, out) as folder:
        return folder


def inspect(folder: Path) -> list[dict[str, Any]]:
    """Every record of a W&B run's log, read by wandb's own tool."""
    (log,) = folder.glob("*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log.resolve())]
    # It leaves a log where it is run.
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return [json.loads(line) for line in done.stdout.splitlines()]


# --- Which mode ---


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without any W&B setting, and a process that has none from before."""
    import wandb

    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_netrc(path: Path, host: str) -> None:
    path.write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
    path.chmod(0o600)


def write_settings(path: Path, **values: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{name} = {value}" for name, value in values.items()]
    path.write_text("\n".join(["[default]", *lines]) + "\n")


@pytest.mark.parametrize(
    "location", [".config/wandb/settings", "config/settings", "wandb/settings"]
)
def test_the_server_of_the_settings_file_is_the_one_whose_key_counts(
    bare: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    if location.startswith("config"):
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(bare / "config"))
    write_settings(bare / location, base_url="http://wandb.example.org:8080")
    write_netrc(bare / ".netrc", "api.wandb.ai")
    assert resolve_mode(None) == "offline"
    write_netrc(bare / ".netrc", "wandb.example.org:8080")
    assert resolve_mode(None) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")  # which beats the file
    assert resolve_mode(None) == "offline"


def test_the_server_and_the_key_of_the_process_count(bare: Path) -> None:
    import wandb

    write_netrc(bare / ".netrc", "wandb.example.org")
    wandb.setup(wandb.Settings(base_url="https://wandb.example.org", silent=True))
    assert resolve_mode(None) == "online"
    wandb.teardown()
    assert resolve_mode(None) == "offline"
    wandb.login(key="0" * 40, verify=False)
    assert resolve_mode(None) == "online"


KEY = {"WANDB_API_KEY": "0" * 40}
OURS = {"WANDB_BASE_URL": "https://wandb.example.org"}


@pytest.mark.parametrize(
    ("environment", "netrc", "settings", "requested", "mode"),
    [
        ({}, "", {}, None, "offline"),
        ({}, "", {}, "online", "online"),
        (KEY, "", {}, None, "online"),
        (KEY, "", {}, "offline", "offline"),
        ({}, "example.org", {}, None, "offline"),
        ({}, "api.wandb.ai", {}, None, "online"),
        (OURS, "api.wandb.ai", {}, None, "offline"),
        (OURS, "wandb.example.org", {}, None, "online"),
        (KEY, "", {"mode": "offline"}, None, "offline"),  # as `wandb offline` does
        (KEY, "", {"mode": "offline"}, "online", "online"),
        (KEY | {"WANDB_MODE": "disabled"}, "", {"mode": "offline"}, None, "disabled"),
        (KEY | {"WANDB_MODE": "Disabled"}, "", {}, None, "disabled"),
        (KEY | {"WANDB_MODE": "disabled"}, "", {}, "offline", "offline"),
        ({}, "", {"base_url": "no address"}, None, "offline"),
        ({"WANDB_BASE_URL": "no address"}, "", {}, None, "offline"),
    ],
)
def test_the_request_beats_the_environment_the_settings_and_the_key(
    bare: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    netrc: str,
    settings: dict[str, str],
    requested: WandbMode | None,
    mode: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        monkeypatch.setenv("NETRC", str(bare / "keys"))
        write_netrc(bare / "keys", netrc)
    if settings:
        write_settings(bare / "wandb" / "settings", **settings)
    assert resolve_mode(requested) == mode


def test_finding_the_mode_starts_nothing_and_sets_nothing(bare: Path) -> None:
    """Nor is W&B, which takes long, imported where there is nothing for it to read."""
    write = f"""
import os, sys, threading
from pathlib import Path
from mechcausal.records.wandb_runs import resolve_mode
before = dict(os.environ), threading.active_count()
assert resolve_mode(None) == "offline"
assert "wandb" not in sys.modules
Path({str(bare / ".netrc")!r}).write_text("machine api.wandb.ai login user password {"0" * 40}")
Path({str(bare / ".netrc")!r}).chmod(0o600)
assert resolve_mode(None) == "online"
assert (dict(os.environ), threading.active_count()) == before
from wandb.sdk import wandb_setup
assert wandb_setup._singleton is None
"""
    done = subprocess.run([sys.executable, "-c", write], capture_output=True, text=True, cwd=bare)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_unreadable_netrc_is_no_key(bare: Path) -> None:
    (bare / ".netrc").write_text("not a netrc \x00 {")
    assert resolve_mode(None) == "offline"


def test_an_unknown_mode_in_the_environment_is_refused(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "bogus")
    with pytest.raises(TrackingError, match=r"^WANDB_MODE is 'bogus': allowed are online, offline"):
        resolve_mode(None)
    assert resolve_mode("offline") == "offline"


# --- The run folder ---


def test_default_folder_names_recipe_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [made(recipe(seed=7), None) for _ in range(3)]
    assert len(set(folders)) == 3
    for folder in folders:
        assert folder.parent == Path("runs/tiny")
        assert "-seed7-" in folder.name
        assert load_recipe(folder / "recipe.toml") == recipe(seed=7)


def test_an_existing_folder_is_used_unless_it_holds_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert made(recipe(), tmp_path) == tmp_path
    for name in ("metrics.jsonl", "summary.json"):
        (tmp_path / name).touch()
        with pytest.raises(RunFolderError, match=f"already holds a run \\({name}\\)"):
            made(recipe(), tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("location", ["file", "file/below", "/proc/mechcausal", "x" * 300])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "file").touch()
    with raises_one_line(RunFolderError, match="not writable") as caught:
        made(recipe(), tmp_path / location)
    assert str(tmp_path / location) in str(caught.value)


# --- What W&B keeps ---


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with three rows, of which the second has no number for loss/eval."""
    folder = made(recipe(), tmp_path_factory.mktemp("runs") / "run")
    record = RunRecord(folder, recipe(wandb__tags=("mine",)), "offline")
    picture = np.zeros((4, 4, 3), dtype=np.uint8)
    record.log(0, {"loss/train": 1.0, "loss/eval": 2.0}, {"attention/layer0": picture})
    record.log(5, {"loss/train": 0.5, "loss/eval": float("nan")})
    record.log(20, {"loss/train": float("inf"), "induction/formation_step": None})
    record.finish({"loss/train": 0.5, "first": {"loss/train": 1.0}}, "finished")
    assert record.warnings == []
    return folder


@pytest.fixture(scope="module")
def records(offline_run: Path) -> list[dict[str, Any]]:
    (folder,) = (offline_run / "wandb").glob("offline-run-*")
    return inspect(folder)


def test_the_files_hold_rows_state_and_warnings(offline_run: Path) -> None:
    """Numbers that are not finite are null."""
    (folder,) = (offline_run / "wandb").glob("offline-run-*")
    assert count_wandb_rows(folder) == 3
    assert read_metrics(offline_run) == [
        {"train/step": 0, "loss/train": 1.0, "loss/eval": 2.0},
        {"train/step": 5, "loss/train": 0.5, "loss/eval": None},
        {"train/step": 20, "loss/train": None, "induction/formation_step": None},
    ]
    assert read_summary(offline_run) == {
        **{"loss/train": 0.5, "first": {"loss/train": 1.0}},
        **{"state": "finished", "rows": 3, "warnings": []},
    }


def kind(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [record[name] for record in records if record["type"] == name]


def test_wandb_run_has_config_group_and_tags(records: list[dict[str, Any]]) -> None:
    (run,) = kind(records, "run")
    assert (run["project"], run["run_group"], run["display_name"]) == ("mechcausal", "tiny", "run")
    assert set(run["tags"]) == {"mine", "chain", "simplified"}
    config = run["config"]["update"]
    expected = recipe_to_dict(recipe(wandb__tags=("mine",)))
    assert {key: value for key, value in config.items() if key != "_wandb"} == expected


def test_wandb_history_follows_the_training_step(records: list[dict[str, Any]]) -> None:
    metrics = kind(records, "metric")
    assert {"name": "train/step", "options": {"defined": True}} in metrics
    assert any(m.get("glob_name") == "*" and m["step_metric"] == "train/step" for m in metrics)
    rows = [row["item"] for row in kind(records, "history")]
    assert [row["train/step"] for row in rows] == [0, 5, 20]
    assert [row["_step"] for row in rows] == [0, 5, 20]
    assert [row.get("loss/eval") for row in rows] == [2.0, None, None]
    assert rows[0]["attention/layer0._type"] == "image-file"


def test_wandb_summary_is_that_of_the_file(records: list[dict[str, Any]]) -> None:
    updates = kind(records, "summary")
    summary = {key: value for record in updates for key, value in record["update"].items()}
    assert (summary["loss/train"], summary["first/loss/train"]) == (0.5, 1.0)
    assert summary["state"] == "finished"
    assert [record["exit_code"] for record in kind(records, "exit")] == [0]


def test_disabled_makes_no_wandb_folder(tmp_path: Path) -> None:
    folder = made(recipe(), tmp_path / "run")
    record = RunRecord(folder, recipe(), "disabled")
    record.log(0, {"loss/train": 1.0})
    record.finish({}, "finished")
    assert record.wandb_folder is None
    assert {path.name for path in folder.iterdir()} == {
        *("recipe.toml", "metrics.jsonl", "summary.json", "run.json", ".lock")
    }


def test_group_of_the_recipe_beats_its_name(tmp_path: Path) -> None:
    values = recipe(wandb__group="paper")
    record = RunRecord(made(values, tmp_path / "run"), values, "offline")
    assert record.wandb_folder is not None
    record.finish({}, "failed")
    log = inspect(record.wandb_folder)
    assert kind(log, "run")[0]["run_group"] == "paper"
    assert [record["exit_code"] for record in kind(log, "exit")] == [1]


# --- What goes wrong is said ---


def test_lost_rows_are_counted_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "COUNT_SECONDS", 1)
    folder = made(recipe(), tmp_path / "run")
    record = RunRecord(folder, recipe(), "offline")
    assert record._wandb._run is not None
    keep = record._wandb._run.log
    record._wandb._run.log = lambda data, **options: None  # type: ignore[method-assign,misc]
    record.log(0, {"loss/train": 1.0})
    record._wandb._run.log = keep  # type: ignore[method-assign]
    record.log(1, {"loss/train": 0.5})
    record.finish({}, "finished")
    (warning,) = read_summary(folder)["warnings"]
    assert "W&B kept 1 of 2 rows" in warning
    assert str(folder / "metrics.jsonl") in warning
    assert len(read_metrics(folder)) == 2


def test_a_log_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "COUNT_SECONDS", 1)
    assert count_wandb_rows(tmp_path) is None
    folder = made(recipe(), tmp_path / "run")
    record = RunRecord(folder, recipe(), "offline")
    record.log(0, {"loss/train": 1.0})
    assert record.wandb_folder is not None
    (log,) = record.wandb_folder.glob("*.wandb")
    log.rename(log.with_suffix(".moved"))
    record.finish({}, "finished")
    assert "could not be counted" in record.warnings[0]


def test_a_wandb_folder_elsewhere_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    init = wandb.init
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(wandb, "init", lambda **o: init(**{**o, "dir": str(elsewhere)}))
    record = RunRecord(made(recipe(), tmp_path / "run"), recipe(), "offline")
    record.log(0, {"loss/train": 1.0})
    record.finish({}, "finished")
    (warning,) = record.warnings
    assert warning.startswith(f"W&B writes to {elsewhere.resolve()}")
    assert "not into the run folder" in warning


@pytest.mark.parametrize("kind", ["CommError", "ValueError", "PermissionError"])
def test_a_run_goes_on_where_wandb_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import wandb

    types: dict[str, type[Exception]] = {
        "CommError": wandb.errors.CommError,
        "ValueError": ValueError,
        "PermissionError": PermissionError,
    }
    error = types[kind]("no service\nand more")

    def fail(**options: Any) -> None:
        raise error

    monkeypatch.setattr(wandb, "init", fail)
    record = RunRecord(made(recipe(), tmp_path / "run"), recipe(), "online")
    record.log(0, {"loss/train": 1.0})
    record.finish({}, "finished")
    assert record.mode == "disabled"
    assert record.warnings == [
        "W&B could not start online: no service",
        "W&B could not start offline: no service",
        "the run is recorded in metrics.jsonl alone",
    ]
    assert read_summary(tmp_path / "run")["warnings"] == record.warnings
    assert len(read_metrics(tmp_path / "run")) == 1


def test_online_falls_back_to_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    init = wandb.init

    def offline_alone(**options: Any) -> Any:
        if options["mode"] == "online":
            raise wandb.errors.AuthenticationError("no such key")
        return init(**options)

    monkeypatch.setattr(wandb, "init", offline_alone)
    record = RunRecord(made(recipe(), tmp_path / "run"), recipe(), "online")
    record.log(0, {"loss/train": 1.0})
    record.finish({}, "finished")
    assert (record.mode, record.url) == ("offline", None)
    assert record.warnings == ["W&B could not start online: no such key"]


@pytest.mark.parametrize(
    "overrides",
    [
        {"wandb__project": "a/b"},
        {"wandb__project": ""},
        {"wandb__tags": ["chain", "chain"]},
        {"wandb__group": "g" * 300},
        {"wandb__entity": "no/such"},
    ],
    ids=str,
)
def test_odd_wandb_values_never_stop_a_run(tmp_path: Path, overrides: dict[str, Any]) -> None:
    values = recipe(**overrides)
    record = RunRecord(made(values, tmp_path / "run"), values, "offline")
    record.log(0, {"loss/train": 1.0})
    record.finish({}, "finished")
    assert len(read_metrics(tmp_path / "run")) == 1
    assert (record.mode == "disabled") == bool(record.warnings)


def test_the_service_of_another_process_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker inherits its parent's, which may be gone, and knows nothing of a worker's end."""
    import wandb

    wandb.teardown()
    gone = f"3-{os.getppid()}-unix-{tmp_path / 'socket'}"
    monkeypatch.setenv("WANDB_SERVICE", gone)
    record = RunRecord(made(recipe(), tmp_path / "run"), recipe(), "offline")
    record.log(0, {"loss/train": 1.0})
    record.finish({}, "finished")
    assert record.warnings == []
    assert record.wandb_folder is not None
    assert count_wandb_rows(record.wandb_folder) == 1
    assert os.environ["WANDB_SERVICE"] != gone


# --- Signals ---


def test_signals_become_a_request_to_stop_and_a_second_interrupt_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        stop.waits = True
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_stops_at_once_what_need_not_be_completed() -> None:
    with stop_on_signals() as stop:
        with pytest.raises(StopRequested) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert (stop.received, caught.value.number) == (signal.SIGTERM, signal.SIGTERM)


def check_interrupted(folder: Path) -> None:
    """An interrupted run's files: all rows in W&B too, and the weights."""
    summary, rows = read_summary(folder), read_metrics(folder)
    assert (summary["state"], summary["warnings"]) == ("interrupted", [])
    (fragment,) = (folder / "wandb").glob("offline-run-*")
    assert count_wandb_rows(fragment) == len(rows) == summary["rows"]
    assert (folder / "model" / "model.safetensors").is_file()


def test_a_signal_ends_a_training_command_without_losing_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_figures: None
) -> None:
    """For Ctrl-C in a process of its own see test_watch.py."""
    path, folder = tmp_path / "long.toml", tmp_path / "run"
    path.write_text(
        '[graph]\npreset = "chain"\nsequence_length = 5\n[task]\nvocab_size = 3\n'
        "[training]\nbatch_size = 16\n[training.stage1]\nsteps = 100000000\nlr = 0.1\n"
        "[evaluation]\nn_sequences = 16\nbayes_draws = 4\ntheory_priors = 10\n"
        '[probing]\nschedule = "geometric"\nimages = 2\n'
    )

    def terminate_after_some_rows() -> None:
        metrics = folder / "metrics.jsonl"
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 8):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate_after_some_rows, daemon=True)
    thread.start()
    code = main(["train", str(path), "--quiet", "--out", str(folder)])
    thread.join()
    assert code == 128 + signal.SIGTERM
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "interrupted after" in captured.out
    check_interrupted(folder)
