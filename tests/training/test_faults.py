"""What may happen to the disk, the memory, the numbers and W&B while a run is under way."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mechcausal.cli import main as cli
from mechcausal.recipes import Recipe, parse_recipe, recipe_to_toml
from mechcausal.records import wandb_runs
from mechcausal.records.run_folder import (
    MATRICES_FOLDER,
    PROCESS_FILE,
    read_process,
    read_summary,
)
from mechcausal.records.wandb_fragments import fragments, wandb_steps
from mechcausal.support.files import JsonLines, read_json_lines, write_atomically
from mechcausal.sweeps.batch import train_batch
from mechcausal.training.experiments.causal_graph import CausalGraphExperiment
from mechcausal.training.resuming import resume
from mechcausal.training.run import NonFiniteLossError, Progress, RunResult, TrainingError, train
from tests import kill_runs
from tests.run_folders import at, steps_of
from tests.wandb_server import WandbServer

pytestmark = pytest.mark.usefixtures("no_figures")


def tiny(**overrides: Any) -> Recipe:
    data = {
        "name": "tiny",
        "graph": {"preset": "chain", "sequence_length": 6},
        "task": {"vocab_size": 3, "alpha": 0.3},
        "training": {"batch_size": 32, "stage1": {"steps": 30}, "stage2": {"steps": 10}},
        "evaluation": {"n_sequences": 32, "bayes_draws": 4, "theory_priors": 20},
        "probing": {"every": 4, "dense": 2, "images": 0, "report": False},
        "checkpoints": {"every": 10},
        "wandb": {"mode": "disabled"},
    }
    return parse_recipe(data, source="test").with_overrides(**overrides)


def short() -> Recipe:
    return tiny(training__stage1__steps=2, training__stage2__steps=2)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert len(text.splitlines()) == 1
    return text


# --- The disk ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, where mounting one is permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    yield disk
    # Lazily: matrices that were read are mapped from it until they are forgotten.
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb") as file:
        while True:
            try:
                os.write(file.fileno(), bytes(1024))
            except OSError:
                return


def test_a_full_disk_stops_the_run_and_keeps_what_was_there(small_disk: Path) -> None:
    folder = small_disk / "run"
    with pytest.raises(TrainingError) as caught:
        train(tiny(), out=folder, on_progress=at(25, lambda: fill(small_disk)))
    text = one_line(caught.value)
    assert "No space left on device" in text
    assert str(folder) in text
    assert f"mechcausal resume {folder}" in text
    steps = steps_of(folder)
    assert 20 <= steps[-1] <= 30
    (small_disk / "filler").unlink()
    result = resume(folder)
    assert result.state == "finished"
    assert result.start in (10, 20)
    assert steps_of(folder)[: len(steps)] == steps
    undisturbed = train(tiny(), out=small_disk / "undisturbed").folder
    for name in ("metrics.jsonl", "model/model.safetensors", "matrices.safetensors"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


def test_figures_that_fail_are_a_warning_and_the_run_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("no such colour")

    monkeypatch.setattr(CausalGraphExperiment, "draw_figures", broken)
    result = train(short(), out=tmp_path / "run")
    assert result.state == "finished"
    warnings = read_summary(result.folder)["warnings"]
    assert warnings == ["figures: not drawn: ValueError: no such colour"]


def test_a_folder_that_becomes_read_only_stops_the_run() -> None:
    """In a process without root's rights, which no mode of a folder holds up."""
    outer = Path(tempfile.mkdtemp())
    folder = outer / "run"
    seen = kill_runs.FORK.SimpleQueue()

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            train(tiny(), out=folder, on_progress=at(25, lambda: read_only(folder)))
            seen.put("the run did not notice")
        except BaseException as error:
            seen.put(f"{type(error).__name__}: {error}")

    outer.chmod(0o777)
    # What a run imports on its way is then there: a checkout may lie where others cannot read.
    train(short(), out=outer / "before")
    try:
        process = kill_runs.FORK.Process(target=work)
        process.start()
        process.join()
        assert not seen.empty(), process.exitcode
        text = seen.get()
        assert text.startswith("TrainingError"), text
        assert "Permission denied" in text
        assert f"mechcausal resume {folder}" in text
        assert 20 <= steps_of(folder)[-1] <= 30
        for path in (folder, *folder.iterdir()):
            path.chmod(0o777)
        assert resume(folder).state == "finished"
    finally:
        shutil.rmtree(outer)


def read_only(folder: Path) -> None:
    for path in (folder, *folder.iterdir()):
        path.chmod(0o555)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 3,000 bytes: stands for a full disk where mounting is forbidden."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_row_that_does_not_fit_is_taken_back(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "rows.jsonl"
    lines = JsonLines(path)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    written = 0

    def write_on() -> None:
        nonlocal written
        while True:
            lines.append({"row": written, "text": "x" * 100})
            written += 1

    with pytest.raises(OSError, match="File too large"):
        write_on()
    assert [row["row"] for row in read_json_lines(path)] == list(range(written))
    assert path.read_bytes().endswith(b"}\n")
    with pytest.raises(OSError, match="File too large"):
        write_atomically(tmp_path / "whole", bytes(4000))
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    lines.append({"row": written})
    assert len(read_json_lines(path)) == written + 1


def test_metrics_that_cannot_grow_stop_the_run(tmp_path: Path, small_files: None) -> None:
    folder = tmp_path / "run"
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def limit() -> None:
        size = (folder / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))

    with pytest.raises(TrainingError, match=r"cannot be written: File too large") as caught:
        train(tiny(), out=folder, on_progress=at(24, limit))
    assert "resume" in one_line(caught.value)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert steps_of(folder)[-1] == 24
    assert resume(folder).state == "finished"


def test_a_command_tells_of_a_full_disk_and_fails(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "r.toml").write_text(recipe_to_toml(tiny()))
    fill(small_disk)
    with (small_disk / "filler").open("rb+") as file:
        file.truncate(file.seek(0, 2) - 60_000)  # enough to begin with
    code = cli.main(["train", str(small_disk / "r.toml"), "--out", str(small_disk / "run")])
    lines = capsys.readouterr().err.splitlines()
    assert code in (1, 2)
    assert any("No space left on device" in line for line in lines)
    assert not any("Traceback" in line for line in lines)


def in_the_way_of_matrices(folder: Path) -> None:
    """A file where the folder of matrices is to be: it cannot be written, by root neither."""
    folder.mkdir()
    (folder / MATRICES_FOLDER).touch()


def test_a_run_whose_pictures_cannot_be_begun_ends_as_a_failed_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    in_the_way_of_matrices(folder)
    with pytest.raises(TrainingError, match=r"matrices/references.*: cannot be written") as caught:
        train(tiny(wandb__mode="offline", wandb__panels=False), out=folder)
    assert f"mechcausal resume {folder}" in one_line(caught.value)
    assert read_summary(folder)["state"] == "failed"
    assert exit_codes(folder) == [1]
    (folder / MATRICES_FOLDER).unlink()
    assert resume(folder).state == "finished"


def test_a_run_whose_facts_cannot_be_written_anew_closes_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechcausal.records import tracking

    write, calls = tracking.write_process, 0  # type: ignore[attr-defined]

    def once(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(tracking, "write_process", once)
    with pytest.raises(TrainingError, match=r"run\.json: cannot be written: No space left"):
        train(tiny(wandb__mode="offline"), out=tmp_path / "run")
    assert read_summary(tmp_path / "run")["state"] == "failed"
    assert exit_codes(tmp_path / "run") == [1]


def test_a_full_disk_while_the_model_is_built_hides_no_error_of_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechcausal.training import recorded_run as training

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(training, "build_experiment", fail)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / PROCESS_FILE).mkdir()
    with pytest.raises(TrainingError, match=r"^out of memory before the first step"):
        train(tiny(), out=folder)


@pytest.mark.parametrize(("unwritable", "mode"), [(0, "offline"), (2, "disabled")])
def test_a_member_of_a_batch_that_cannot_begin_fails_alone(
    tmp_path: Path, unwritable: int, mode: str
) -> None:
    folders = [tmp_path / str(number) for number in range(3)]
    in_the_way_of_matrices(folders[unwritable])
    recipes = [tiny(seed=seed, wandb__mode=mode) for seed in range(3)]
    outcomes = train_batch(recipes, folders)
    for number, (outcome, folder) in enumerate(zip(outcomes, folders, strict=True)):
        failed = number == unwritable
        assert (
            outcome.state == read_summary(folder)["state"] == ("failed" if failed else "finished")
        )
        assert (f"{folder}/matrices" in outcome.error) == failed
        assert exit_codes(folder) == ([] if mode == "disabled" else [1 if failed else 0])


def exit_codes(folder: Path) -> list[int]:
    """With which W&B closed the run's fragments."""
    codes = []
    for fragment in fragments(folder, read_process(folder)["wandb_id"]):
        (log,) = fragment.glob("*.wandb")
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log.resolve())]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=fragment)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        codes += [record["exit"]["exit_code"] for record in records if record["type"] == "exit"]
    return codes


# --- The numbers ---


def test_a_loss_that_is_not_finite_stops_the_run_and_can_be_gone_on_with(tmp_path: Path) -> None:
    recipe = tiny(
        model__kind="disentangled",
        training__algorithm="joint",
        training__joint__steps=40,
        training__joint__lr=0.05,
    )
    folder = tmp_path / "run"
    spoilt: list[torch.nn.Parameter] = []

    def spoil(progress: Progress) -> None:
        if progress.step == 23:
            with torch.no_grad():
                spoilt[0].fill_(torch.nan)

    from mechcausal.training import recorded_run as training

    real = training.build_experiment  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:

        def build(*arguments: Any, **options: Any) -> Any:
            experiment = real(*arguments, **options)
            spoilt.extend(experiment.parameters(["all"]))
            return experiment

        patch.setattr(training, "build_experiment", build)
        with pytest.raises(NonFiniteLossError) as caught:
            train(recipe, out=folder, on_progress=spoil)
    text = one_line(caught.value)
    assert "the loss became nan at step 24 (joint, adam with lr 0.05)" in text
    assert f"mechcausal resume {folder} --training.joint.lr 0.005 --allow-change" in text
    assert read_summary(folder)["state"] == "failed"
    assert steps_of(folder)[-1] == 20
    calmer = recipe.with_overrides(training__joint__lr=0.005)
    assert resume(folder, recipe=calmer, allow_change=True).start == 20


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_gradient_that_is_not_finite_spoils_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    from mechcausal.training.experiments.causal_graph import CausalGraphExperiment

    real = CausalGraphExperiment.training_loss
    calls = 0

    def loss(self: CausalGraphExperiment, n_sequences: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        result = real(self, n_sequences)
        if calls == 3:
            result.register_hook(lambda gradient: gradient * value)
        return result

    monkeypatch.setattr(CausalGraphExperiment, "training_loss", loss)
    with pytest.raises(NonFiniteLossError, match="the gradient became NaN or infinite") as caught:
        train(tiny(), out=tmp_path / "run")
    assert "at step 2 (stage1" in one_line(caught.value)


# --- The memory ---


@pytest.mark.parametrize(
    ("error", "moment"),
    [
        (MemoryError("Unable to allocate 9 EiB"), "building"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "training"),
        (torch.OutOfMemoryError("CUDA out of memory."), "training"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_out_of_memory_says_what_to_reduce(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, moment: str
) -> None:
    from mechcausal.training import recorded_run as training

    def fail(*_: Any, **__: Any) -> None:
        raise error

    if moment == "building":
        monkeypatch.setattr(training, "build_experiment", fail)
    with pytest.raises(TrainingError, match=r"^out of memory .*reduce training.batch_size") as got:
        train(tiny(), out=tmp_path / "run", on_progress=at(1, fail))
    assert ("before the first step" if moment == "building" else "at step 1") in one_line(got.value)
    assert read_summary(tmp_path / "run")["state"] == "failed"


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match=r"^something else$"):
        train(tiny(), out=tmp_path / "run", on_progress=at(1, fail))


# --- W&B ---


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    import wandb

    wandb.teardown()
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setattr(wandb_runs, "FINISH_SECONDS", 4)
        monkeypatch.setattr(wandb_runs, "PATIENCE_SECONDS", 2)
        yield server
        wandb.teardown()


def online(folder: Path, **options: Any) -> RunResult:
    return train(tiny(wandb__mode="online"), out=folder, **options)


@pytest.mark.soak
def test_an_online_run_arrives_with_its_checkpoints(server: WandbServer, tmp_path: Path) -> None:
    result = online(tmp_path / "run")
    assert result.warnings == []
    run = server.run(read_process(result.folder)["wandb_id"])
    assert run.steps == steps_of(result.folder)
    aliases = {alias for artifact in run.artifacts for alias in artifact.aliases}
    assert {"latest", "best"} | {f"step-{step}" for step in range(10, 50, 10)} == aliases


@pytest.mark.slow
def test_a_network_that_goes_does_not_stop_the_run_and_is_said(
    server: WandbServer, tmp_path: Path
) -> None:
    warnings: list[str] = []
    result = online(tmp_path / "run", on_progress=at(15, server.stop), on_warning=warnings.append)
    assert result.state == "finished"
    assert any("W&B" in line for line in warnings)
    assert warnings == result.warnings
    assert len(steps_of(result.folder)) == len(result.history)
    server.start()
    assert cli.main(["sync", str(result.folder)]) == 0
    run = server.run(read_process(result.folder)["wandb_id"])
    assert run.steps == steps_of(result.folder)


@pytest.mark.slow
def test_files_that_cannot_be_uploaded_do_not_keep_the_run_from_ending(
    server: WandbServer, tmp_path: Path
) -> None:
    """W&B tries them again for twenty minutes, whatever the limit that it was given."""
    server.refuse_uploads()
    result = online(tmp_path / "run")
    assert result.state == "finished"
    assert any("W&B failed at its end" in line for line in result.warnings)
    server.answer()
    assert cli.main(["sync", str(result.folder)]) == 0
    run = server.run(read_process(result.folder)["wandb_id"])
    assert run.steps == steps_of(result.folder)


@pytest.mark.soak
def test_a_server_that_is_gone_from_the_start_means_offline(
    server: WandbServer, tmp_path: Path
) -> None:
    server.reject(403)
    result = online(tmp_path / "run")
    assert result.state == "finished"
    assert "W&B could not start online" in result.warnings[0]
    (fragment,) = fragments(result.folder, read_process(result.folder)["wandb_id"])
    assert fragment.name.startswith("offline-")
    assert wandb_steps(fragment) == steps_of(result.folder)
    assert cli.main(["sync", str(result.folder)]) == 1
    server.answer()
    assert cli.main(["sync", str(result.folder)]) == 0
    assert server.run(read_process(result.folder)["wandb_id"]).steps == steps_of(result.folder)


@pytest.mark.slow
def test_fragments_of_a_resumed_run_arrive_as_one_history(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"

    def fail() -> None:
        raise ValueError("crash")

    with pytest.raises(ValueError, match="crash"):
        train(tiny(wandb__mode="offline"), out=folder, on_progress=at(33, fail))
    resume(folder)
    assert cli.main(["sync", str(folder), "--dry-run"]) == 0
    planned = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in planned] == [["wandb", "sync"]] * 2
    assert cli.main(["sync", str(folder)]) == 0
    run = server.run(read_process(folder)["wandb_id"])
    assert run.steps == steps_of(folder)
    assert cli.main(["sync", str(folder)]) == 0
    assert "uploaded already" in capsys.readouterr().out
    assert run.steps == steps_of(folder)


@pytest.mark.slow
def test_a_service_that_dies_is_said_and_the_run_goes_on(tmp_path: Path) -> None:
    import wandb

    wandb.teardown()
    script = f"""
import os, signal, subprocess
from tests.training.test_faults import tiny, at, train, steps_of
def kill():
    children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True)
    for child in children.stdout.split():
        name = open(f"/proc/{{child}}/cmdline").read()
        if "wandb-core" in name:
            os.kill(int(child), signal.SIGKILL)
result = train(
    tiny(wandb__mode="offline"), out={str(tmp_path / "run")!r}, on_progress=at(15, kill)
)
print(result.state, len(result.history) == len(steps_of(result.folder)))
print(*result.warnings, sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    first, *warnings = done.stdout.splitlines()
    assert first == "finished True", done.stderr
    assert any("W&B failed at step" in line and "goes on" in line for line in warnings)
    assert "Traceback" not in done.stderr
