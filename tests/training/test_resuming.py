"""Runs that are interrupted, killed or changed, and what `resume` makes of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mechcausal.measures.figures import STEP
from mechcausal.recipes import Recipe, load_recipe, parse_recipe
from mechcausal.records.run_folder import (
    RunFolderError,
    find_runs,
    hold,
    is_held,
    new_run_folder,
    read_metrics,
    read_process,
    read_summary,
    run_info,
)
from mechcausal.records.wandb_fragments import fragments, wandb_steps
from mechcausal.support.signals import StopRequested
from mechcausal.training.checkpoints import checkpoint_folders
from mechcausal.training.experiments.causal_graph import CausalGraphExperiment
from mechcausal.training.resuming import resume
from mechcausal.training.run import Progress, RunResult, TrainingError, train
from tests import kill_runs
from tests.small_recipes import LEAN

COMPARED = kill_runs.COMPARED

pytestmark = pytest.mark.usefixtures("no_figures")


def tiny(**overrides: Any) -> Recipe:
    """Two stages of 12 steps, a probe step every 4 and a checkpoint every 5 steps, W&B off."""
    data = {
        "name": "tiny",
        "graph": {"preset": "chain", "sequence_length": 6},
        "task": {"vocab_size": 3, "alpha": 0.3},
        "training": {
            "batch_size": 32,
            "stage1": {"steps": 12, "lr": 100.0},
            "stage2": {"steps": 12, "optimizer": "adam", "lr": 0.05},
        },
        "evaluation": {"n_sequences": 32, "bayes_draws": 4, "theory_priors": 20},
        "probing": {"every": 4, "dense": 2, "images": 0, "report": False},
        "checkpoints": {"every": 5},
        "wandb": {"mode": "disabled"},
    }
    return parse_recipe(data, source="test").with_overrides(**overrides)


class CrashError(RuntimeError):
    """Stands for whatever may go wrong."""


def crash_at(step: int) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            raise CrashError("the roof fell in")

    return on_progress


def crashed(folder: Path, step: int, **overrides: Any) -> Path:
    """A run that crashed after the look at that step, before its update."""
    with pytest.raises(CrashError):
        train(tiny(**overrides), out=folder, on_progress=crash_at(step))
    return folder


def killed(folder: Path, step: int, **overrides: Any) -> Path:
    """The same as kill -9 would have left it."""
    crashed(folder, step, **overrides)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "model", ignore_errors=True)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    return train(tiny(), out=tmp_path_factory.mktemp("undisturbed") / "run").folder


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed(tmp_path_factory.mktemp("killed") / "run", 17)


@pytest.fixture
def killed_at_17(tmp_path: Path, killed_run: Path) -> Path:
    """A run that was killed before the update of step 17: its newest checkpoint is that of 15."""
    return Path(shutil.copytree(killed_run, tmp_path / "run"))


def check_same(folder: Path, undisturbed: Path) -> None:
    for name in COMPARED:
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    ours, theirs = read_summary(folder), read_summary(undisturbed)
    for summary in (ours, theirs):
        del summary["warnings"]
    assert ours == theirs


# --- It goes on as if it had never stopped ---


@pytest.mark.parametrize("step", [0, 5, 11, 12, 23, 24])
def test_a_crashed_run_ends_as_if_nothing_had_happened(
    tmp_path: Path, undisturbed: Path, step: int
) -> None:
    folder = crashed(tmp_path / "run", step)
    assert read_summary(folder)["state"] == "failed"
    result = resume(folder)
    assert (result.state, result.warnings) == ("finished", [])
    newest = [k for k in (0, 5, 10, 15, 20, 24) if k <= step][-1]
    assert result.start == newest
    check_same(folder, undisturbed)
    assert {path.name for path in folder.iterdir()} == {path.name for path in undisturbed.iterdir()}


JOINT = {
    "training__algorithm": "joint",
    "training__joint__steps": 8,
    "training__joint__optimizer": "adamw",
    "training__joint__schedule": "cosine",
    "training__joint__warmup": 3,
    "training__accumulation": 2,
    "checkpoints__every": 3,
}
STANDARD = {"model__kind": "standard", "model__d_model": 16, "model__d_mlp": 8}
REPEATED = {
    "training__joint__steps": 8,
    "checkpoints__schedule": "every",
    "checkpoints__every": 3,
}


@pytest.mark.parametrize("kind", ["disentangled", "standard", "repeated_tokens"])
def test_other_models_and_optimizers_go_on_bit_by_bit(tmp_path: Path, kind: str) -> None:
    if kind == "repeated_tokens":
        recipe = parse_recipe(LEAN, source="test").with_overrides(**REPEATED)
    else:
        recipe = tiny(**JOINT, **(STANDARD if kind == "standard" else {"model__kind": kind}))
    undisturbed = train(recipe, out=tmp_path / "undisturbed").folder
    with pytest.raises(CrashError):
        train(recipe, out=tmp_path / "run", on_progress=crash_at(7))
    assert resume(tmp_path / "run").start == 6
    check_same(tmp_path / "run", undisturbed)


def test_an_interruption_leaves_a_checkpoint_of_its_step(tmp_path: Path, undisturbed: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 7:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    result = train(tiny(), out=tmp_path / "run", on_progress=stop)
    assert signal.getsignal(signal.SIGTERM) == before
    assert (result.state, result.signal, result.summary["train/steps"]) == ("interrupted", 15, 8)
    assert read_summary(result.folder)["state"] == "interrupted"
    assert 8 in checkpoint_folders(result.folder)
    weights = load_file(result.folder / "model" / "model.safetensors")
    for name, weight in result.experiment.hooked.named_parameters():
        assert torch.equal(weights[name], weight)
    again = resume(result.folder)
    assert (again.start, again.state) == (8, "finished")
    check_same(result.folder, undisturbed)


def test_a_run_may_be_interrupted_again_and_again(tmp_path: Path, undisturbed: Path) -> None:
    folder = killed(tmp_path / "run", 3)
    for step in (6, 6, 14, 22):
        with pytest.raises(CrashError):
            resume(folder, on_progress=crash_at(step))
    resume(folder)
    check_same(folder, undisturbed)


def test_a_torn_last_line_is_written_anew(killed_at_17: Path, undisturbed: Path) -> None:
    folder = killed_at_17
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"train/step": 20, "loss/tr')
    resume(folder)
    check_same(folder, undisturbed)


def test_rows_lost_before_the_checkpoint_cannot_be_made_up(killed_at_17: Path) -> None:
    folder = killed_at_17
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]) + "nonsense\n" + lines[-1])
    with pytest.raises(RunFolderError, match=r"metrics.jsonl, line \d+: not a row"):
        resume(folder)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    killed_at_17: Path, undisturbed: Path
) -> None:
    folder = killed_at_17
    newest = folder / "checkpoints" / "00000015" / "model.safetensors"
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    warnings: list[str] = []
    result = resume(folder, on_warning=warnings.append)
    assert result.start == 10
    assert warnings == result.warnings
    assert str(newest) in warnings[0]
    check_same(folder, undisturbed)


def test_without_any_checkpoint_it_begins_again(killed_at_17: Path, undisturbed: Path) -> None:
    folder = killed_at_17
    shutil.rmtree(folder / "checkpoints")
    assert resume(folder).start == 0
    check_same(folder, undisturbed)


def test_a_row_that_comes_out_differently_is_said(killed_at_17: Path) -> None:
    folder = killed_at_17
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["loss/eval"] += 1e-12
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (warning,) = resume(folder).warnings
    assert f"step {lines[-1][STEP]} came out differently" in warning


# --- When the run is not what it was ---


def test_another_recipe_is_named_and_needs_leave(killed_at_17: Path) -> None:
    folder = killed_at_17
    rows = read_metrics(folder)
    other = tiny(training__stage2__lr=0.01, training__stage2__steps=20)
    with pytest.raises(RunFolderError) as caught:
        resume(folder, recipe=other)
    text = str(caught.value)
    assert "training.stage2.lr was 0.05, is 0.01" in text
    assert "training.stage2.steps was 12, is 20" in text
    assert "--allow-change goes on with it from step 15" in text or "from step 15" in text
    assert read_metrics(folder) == rows

    result = resume(folder, recipe=other, allow_change=True)
    assert (result.start, result.summary["train/steps"]) == (15, 32)
    after = read_metrics(folder)
    assert [row for row in after if int(row[STEP] or 0) < 15] == [
        row for row in rows if int(row[STEP] or 0) < 15
    ]
    assert load_recipe(folder / "recipe.toml") == other
    (aside,) = folder.glob("before-step-15-*")
    assert read_metrics(aside) == rows
    assert load_recipe(aside / "recipe.toml") == tiny()


def test_a_finished_run_is_left_alone_but_may_be_made_longer(
    tmp_path: Path, undisturbed: Path
) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    with pytest.raises(RunFolderError, match="has finished"):
        resume(folder)
    check_same(folder, undisturbed)
    longer = tiny(training__stage2__steps=16)
    assert resume(folder, recipe=longer, allow_change=True).start == 24
    straight = train(longer, out=tmp_path / "straight").folder
    for name in ("metrics.jsonl", "model/model.safetensors"):
        ours, theirs = (parent / name for parent in (folder, straight))
        if name == "metrics.jsonl":  # the row of step 24 was the last one, and now it is not
            ours_rows, theirs_rows = read_metrics(folder), read_metrics(straight)
            assert ours_rows[-1] == theirs_rows[-1]
        else:
            assert ours.read_bytes() == theirs.read_bytes()


def test_another_version_or_device_is_named_and_needs_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechcausal.training import checkpoints
    from mechcausal.training import recorded_run as training

    real = checkpoints.environment
    other = {"torch": "1.0", "transformer-lens": "3.0", "threads": 7, "device": "cuda (B9000)"}
    for module in (training, checkpoints):
        monkeypatch.setattr(module, "environment", lambda device: real(device) | other)
    folder = killed(tmp_path / "run", 17)
    for module in (training, checkpoints):
        monkeypatch.setattr(module, "environment", real)
    with pytest.raises(RunFolderError) as caught:
        resume(folder)
    assert all(f"{name} was {value}, is " in str(caught.value) for name, value in other.items())
    assert resume(folder, allow_change=True).state == "finished"


def test_a_folder_from_before_a_version_was_recorded_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechcausal.training import checkpoints
    from mechcausal.training import recorded_run as training

    real = checkpoints.environment

    def older(device: torch.device) -> dict[str, Any]:
        return {name: value for name, value in real(device).items() if name != "transformer-lens"}

    for module in (training, checkpoints):
        monkeypatch.setattr(module, "environment", older)
    folder = killed(tmp_path / "run", 17)
    for module in (training, checkpoints):
        monkeypatch.setattr(module, "environment", real)
    assert resume(folder).state == "finished"


def test_a_change_that_the_checkpoint_cannot_follow_is_refused(killed_at_17: Path) -> None:
    folder = killed_at_17
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for changes in (
        {"training__stage1__steps": 16},  # step 15 would lie in stage 1
        {"training__stage1__steps": 4, "training__stage2__steps": 4},  # the run would be over
    ):
        with pytest.raises(RunFolderError, match="step 15"):
            resume(folder, recipe=tiny(**changes), allow_change=True)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(TrainingError, match="does not fit the recipe"):
        resume(folder, recipe=tiny(graph__sequence_length=7), allow_change=True)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFolderError, match=r"not a run folder"):
        resume(tmp_path / name)


# --- Who writes ---


def test_two_processes_never_write_one_folder(killed_at_17: Path) -> None:
    folder = killed_at_17
    with hold(folder):
        assert is_held(folder)
        assert run_info(folder).state == "running"
        with pytest.raises(RunFolderError, match=r"process \d+ on .* is writing this run"):
            resume(folder)
    assert not is_held(folder)
    assert run_info(folder).state == "interrupted"


def test_two_new_runs_do_not_meet_in_one_folder(tmp_path: Path) -> None:
    with new_run_folder(tiny(), tmp_path / "run"), pytest.raises(RunFolderError):
        train(tiny(), out=tmp_path / "run")
    train(tiny(), out=tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"already holds a run .* mechcausal resume"):
        train(tiny(), out=tmp_path / "run")


def test_runs_are_found_with_their_states(
    tmp_path: Path, undisturbed: Path, killed_at_17: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "deep" / "er" / "finished")
    shutil.copytree(crashed(tmp_path / "crashed", 9), tmp_path / "damaged")
    (tmp_path / "damaged" / "recipe.toml").write_text("[")
    (tmp_path / "no run").mkdir()
    runs = {path.relative_to(tmp_path).as_posix(): run_info(path) for path in find_runs(tmp_path)}
    assert {name: info.state for name, info in runs.items()} == {
        "deep/er/finished": "finished",
        "run": "interrupted",
        "crashed": "failed",
        "damaged": "failed",
    }
    assert (runs["run"].step, runs["run"].n_steps) == (16, 24)
    assert "not valid TOML" in runs["damaged"].problem
    assert not runs["run"].problem


# --- W&B stays one run ---


@pytest.mark.slow
def test_wandb_has_every_row_once_in_two_fragments(tmp_path: Path) -> None:
    folder = crashed(tmp_path / "run", 17, wandb__mode="offline")
    (folder / "summary.json").unlink()
    result = resume(folder)
    assert result.warnings == []
    run_id = read_process(folder)["wandb_id"]
    first, second = fragments(folder, run_id)
    steps = [row[STEP] for row in read_metrics(folder)]
    assert (wandb_steps(first) or []) + (wandb_steps(second) or []) == steps
    assert [line.split()[-1] for line in read_process(folder)["sync"]] == [
        str(path.relative_to(folder)) for path in (first, second)
    ]


@pytest.mark.slow
def test_rows_that_wandb_lost_are_logged_again(tmp_path: Path) -> None:
    folder = killed(tmp_path / "run", 17, wandb__mode="offline")
    run_id = read_process(folder)["wandb_id"]
    (first,) = fragments(folder, run_id)
    (log,) = first.glob("*.wandb")
    content = log.read_bytes()
    log.write_bytes(content[: int(len(content) * 0.6)])
    kept = wandb_steps(first) or []
    assert 0 < len(kept) < 8
    assert resume(folder).warnings == []
    _, second = fragments(folder, run_id)
    assert kept + (wandb_steps(second) or []) == [row[STEP] for row in read_metrics(folder)]


# --- Interruptions at any moment ---


@pytest.mark.soak
def test_killed_runs_end_the_same(repository: Path) -> None:
    """A few of the trials of `python tests/kill_runs.py`."""
    done = subprocess.run(
        [sys.executable, "tests/kill_runs.py", "--kills", "4", "--signals", "1", "--seed", "3"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
    )
    *_, kills, terminated, interrupted = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert kills.startswith("4/4 SIGKILL")
    assert terminated.startswith("1/1 SIGTERM")
    assert interrupted.startswith("1/1 SIGINT")


def test_a_signal_while_the_experiment_is_built_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    from mechcausal.training import recorded_run as training

    with monkeypatch.context() as patch:
        patch.setattr(
            training, "build_experiment", lambda *_, **__: signal.raise_signal(signal.SIGTERM)
        )
        with pytest.raises(StopRequested, match=r"before the first step; resume with: mechcausal"):
            train(tiny(), out=tmp_path / "run")
    assert read_summary(tmp_path / "run")["state"] == "interrupted"
    resume(tmp_path / "run")
    check_same(tmp_path / "run", undisturbed)


# --- Schedules ---


def saved_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> list[int]:
    """Steps at which checkpoints were taken, whether they were kept or not."""
    from mechcausal.training import checkpointing

    taken: list[int] = []
    real = checkpointing.write_checkpoint  # type: ignore[attr-defined]

    def spy(folder: Path, **options: Any) -> None:
        taken.append(options["step"])
        real(folder, **options)

    monkeypatch.setattr(checkpointing, "write_checkpoint", spy)
    train(tiny(**overrides), out=tmp_path / "run")
    return taken


@pytest.mark.parametrize(
    ("schedule", "taken", "kept"),
    [
        ("every", [5, 10, 15, 20, 24], 2),
        ("probes", [0, 1, 4, 5, 8, 10, 12, 13, 15, 16, 20, 24], 8),
        ("none", [], 0),
    ],
)
def test_checkpoints_are_taken_by_the_schedule(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    schedule: str,
    taken: list[int],
    kept: int,
) -> None:
    assert saved_steps(tmp_path, monkeypatch, checkpoints__schedule=schedule) == taken
    steps = list(checkpoint_folders(tmp_path / "run"))
    assert steps[-1:] == taken[-1:]
    assert kept <= len(steps) <= kept + 3
    if schedule == "probes":
        assert {0, 1, 4, 8, 12, 13, 16, 20, 24} <= set(steps)


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        # Every probe step after one with a score from 0.1 to 0.9.
        ([0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 0.96, 0.97, 0.98, 0.99], (3, 4, 5, 6)),
        # A score that rests within these bounds: one checkpoint of each level, and between them.
        ([0.0, 0.05, 0.2, 0.21, 0.19, 0.2, 0.4, 0.62, 0.61, 0.63, 0.62], (3, 7, 8)),
    ],
    ids=["steady", "resting"],
)
def test_formation_is_kept_in_detail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float], kept: tuple[int, ...]
) -> None:
    left = iter(scores)
    real = CausalGraphExperiment.observe

    def observe(self: Any) -> Any:
        observation = real(self)
        observation.figures["induction/score"] = next(left)
        return observation

    monkeypatch.setattr(CausalGraphExperiment, "observe", observe)
    saved_steps(tmp_path, monkeypatch, checkpoints__schedule="formation", checkpoints__every=100)
    steps = [int(row[STEP] or 0) for row in read_metrics(tmp_path / "run")]
    assert set(checkpoint_folders(tmp_path / "run")) == {steps[i] for i in kept} | {24}


@pytest.mark.parametrize("spoiled", [True, False], ids=["an earlier one", "the last one"])
def test_the_best_checkpoint_is_kept(tmp_path: Path, spoiled: bool) -> None:
    recipe = tiny(checkpoints__every=4, checkpoints__keep=1)
    if spoiled:  # what stage 1 has learned
        recipe = recipe.with_overrides(
            training__stage2__lr=400.0, training__stage2__optimizer="sgd"
        )
    folder = train(recipe, out=tmp_path / "run").folder
    losses = {row[STEP]: row["loss/eval"] for row in read_metrics(folder)}
    steps = list(checkpoint_folders(folder))
    best = min((4, 8, 12, 16, 20, 24), key=lambda step: float(losses[step] or 0))
    assert (best == 24) == (not spoiled)
    assert steps == sorted({best, 24})


# --- Threads ---


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_run_computes_on_the_threads_of_its_recipe(tmp_path: Path, two_threads: None) -> None:
    seen: list[int] = []
    result: RunResult = train(
        tiny(threads=1),
        out=tmp_path / "run",
        on_progress=lambda progress: seen.append(torch.get_num_threads()),
    )
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2
    assert load_file(result.folder / "model" / "model.safetensors")
