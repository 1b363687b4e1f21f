"""A user's own W&B runs in the process of ours: neither touches the other."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from mechcausal.recipes import Recipe, parse_recipe
from mechcausal.records import wandb_runs
from mechcausal.records.run_folder import read_process
from mechcausal.records.wandb_fragments import fragments, steps_when_written, wandb_steps
from mechcausal.records.wandb_runs import WandbRun
from mechcausal.sweeps.batch import train_batch
from mechcausal.training.resuming import resume
from mechcausal.training.run import train
from tests.run_folders import at, steps_of
from tests.wandb_server import WandbServer

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(autouse=True)
def _own_session() -> Iterator[None]:
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        yield server


def tiny(**overrides: Any) -> Recipe:
    data = {
        "name": "tiny",
        "graph": {"preset": "chain", "sequence_length": 4},
        "task": {"vocab_size": 3, "alpha": 0.3},
        "training": {"batch_size": 8, "stage1": {"steps": 6}, "stage2": {"steps": 6}},
        "evaluation": {"n_sequences": 8, "bayes_draws": 2, "theory_priors": 5},
        "probing": {"every": 3, "dense": 1, "images": 0, "report": False},
        "wandb": {"mode": "offline", "panels": False},
    }
    return parse_recipe(data, source="test").with_overrides(**overrides)


class User:
    """Somebody whose program has a W&B run and calls ours."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.run: Any = None
        self.steps: list[int] = []

    def begin(self) -> None:
        # As in any script: W&B then returns whatever run it takes for the active one.
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
        self.run = wandb.init(
            mode="offline", dir=str(self.folder), id="theirs", project="p", settings=settings
        )
        assert self.run.id == "theirs"

    def log(self) -> None:
        self.steps.append(len(self.steps))
        wandb.log({"mine": 1.0}, step=self.steps[-1], commit=True)

    def check(self) -> None:
        """Her run is still what W&B's functions act on, and gets her rows, and hers alone."""
        assert wandb.run is self.run
        self.log()
        wandb.finish()
        assert wandb.run is None
        (fragment,) = (self.folder / "wandb").glob("offline-run-*")
        # W&B's service may still be writing when `finish` returns.
        written = steps_when_written([fragment], len(self.steps), seconds=10)
        assert written == {fragment: self.steps}


def arrived(folder: Path) -> list[int]:
    """The steps that W&B has of our run."""
    ours = fragments(folder, read_process(folder)["wandb_id"])
    return sorted(step for fragment in ours for step in wandb_steps(fragment) or ())


def all_of_us(folder: Path) -> None:
    """Every kind of run of ours: of a training, resumed, in a batch, of a study."""

    def stop() -> None:
        raise ValueError("crash")

    train(tiny(), out=folder / "single")
    with pytest.raises(ValueError, match="crash"):
        train(tiny(), out=folder / "resumed", on_progress=at(8, stop))
    resume(folder / "resumed")
    names = ["first", "second"]
    train_batch([tiny(seed=seed) for seed in (1, 2)], [folder / name for name in names])
    for name in ("single", "resumed", *names):
        assert arrived(folder / name) == steps_of(folder / name) != []
    warnings: list[str] = []
    study = WandbRun("offline", folder, warnings.append, project="p", job_type="detect")
    study.log(0, {"best": 1.0})
    study.finish({}, exit_code=0)
    assert study.folder is not None
    assert (wandb_steps(study.folder), warnings) == ([0], [])


def test_a_run_that_the_user_has_open_is_not_ours(tmp_path: Path) -> None:
    user = User(tmp_path / "user")
    user.begin()
    user.log()
    all_of_us(tmp_path)
    user.check()


def test_a_run_that_the_user_begins_during_ours_is_another(tmp_path: Path) -> None:
    user = User(tmp_path / "user")

    def begin() -> None:
        user.begin()
        user.log()

    train(tiny(), out=tmp_path / "run", on_progress=at(5, begin))
    assert arrived(tmp_path / "run") == steps_of(tmp_path / "run") != []
    user.check()


def test_a_run_that_the_user_has_within_ours_ends_without_it(tmp_path: Path) -> None:
    user = User(tmp_path / "user")

    def all_of_it() -> None:
        user.begin()
        user.log()
        user.check()

    result = train(tiny(), out=tmp_path / "run", on_progress=at(5, all_of_it))
    assert result.warnings == []
    assert arrived(tmp_path / "run") == steps_of(tmp_path / "run") != []


def test_a_run_that_the_user_begins_after_ours_is_another(tmp_path: Path) -> None:
    user = User(tmp_path / "user")
    train(tiny(), out=tmp_path / "run")
    assert wandb.run is None
    user.begin()
    user.check()


def fail_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    init = wandb.init

    def fail(**options: Any) -> Any:
        if options.get("id") == "theirs":
            return init(**options)
        raise wandb.errors.CommError("no service")

    monkeypatch.setattr(wandb, "init", fail)


def fail_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    log = wandb.Run.log

    def fail(self: Any, *arguments: Any, **options: Any) -> None:
        if self.id != "theirs":
            raise wandb.errors.CommError("no connection")
        log(self, *arguments, **options)

    monkeypatch.setattr(wandb.Run, "log", fail)


def never_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = wandb.Run.finish
    monkeypatch.setattr(wandb_runs, "FINISH_SECONDS", 0)
    monkeypatch.setattr(wandb_runs, "PATIENCE_SECONDS", 1)

    def hang(self: Any, *arguments: Any, **options: Any) -> None:
        if self.id != "theirs":
            threading.Event().wait(20)
        finish(self, *arguments, **options)

    monkeypatch.setattr(wandb.Run, "finish", hang)


@pytest.mark.parametrize("lean", [False, True], ids=["single", "lean"])
@pytest.mark.parametrize("fail", [fail_to_start, fail_in_between, never_finish])
def test_a_run_of_ours_that_fails_leaves_that_of_the_user(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[pytest.MonkeyPatch], None],
    lean: bool,
) -> None:
    user = User(tmp_path / "user")
    user.begin()
    user.log()
    fail(monkeypatch)
    warnings: list[str] = []
    ours = WandbRun("offline", tmp_path, warnings.append, project="p", lean=lean)
    ours.log(0, {"loss": 1.0})
    ours.finish({}, exit_code=0)
    assert ours.mode == "disabled"
    assert any("W&B" in line for line in warnings)
    user.check()


@pytest.mark.parametrize("fail", [fail_to_start, fail_in_between])
def test_a_run_of_ours_that_fails_leaves_our_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """As runs that end at the same time in the threads of a batch."""
    warnings: list[str] = []
    good = WandbRun("offline", tmp_path / "a", warnings.append, project="p", id="theirs")
    fail(monkeypatch)
    bad = WandbRun("offline", tmp_path / "b", lambda line: None, project="p")
    bad.log(0, {"loss": 1.0})
    assert bad.mode == "disabled"
    good.log(0, {"loss": 1.0})
    good.finish({}, exit_code=0)
    assert good.folder is not None
    assert (wandb_steps(good.folder), warnings) == ([0], [])


def test_a_server_that_refuses_our_run_leaves_it_offline_and_the_users_open(
    server: WandbServer, tmp_path: Path
) -> None:
    user = User(tmp_path / "user")
    user.begin()
    user.log()
    server.reject(403)
    warnings: list[str] = []
    ours = WandbRun("online", tmp_path / "run", warnings.append, project="p", id="ours")
    assert ours.mode == "offline"
    (warning,) = warnings
    assert warning.startswith("W&B could not start online: ")
    ours.log(0, {"loss": 1.0})
    ours.finish({}, exit_code=0)
    (fragment,) = fragments(tmp_path / "run", "ours")
    assert wandb_steps(fragment) == [0]
    user.check()


def test_a_run_of_the_user_whose_id_ours_would_have_stays_open(tmp_path: Path) -> None:
    user = User(tmp_path / "user")
    user.begin()
    user.log()
    ours = WandbRun("offline", tmp_path / "run", lambda line: None, project="p", id="theirs")
    assert ours.mode == "disabled"
    assert fragments(tmp_path / "run", "theirs") == []
    user.check()


def test_a_failure_of_ours_forgets_no_login_of_the_user(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.setup(wandb.Settings(project="hers", silent=True))
    wandb.login(key="1" * 40, verify=False)
    with pytest.MonkeyPatch.context() as patch:
        fail_in_between(patch)
        ours = WandbRun("offline", tmp_path, lambda line: None, project="p")
        ours.log(0, {"loss": 1.0})
        assert ours.mode == "disabled"
    with wandb.init(mode="online", dir=str(tmp_path), id="theirs") as run:
        run.log({"mine": 1.0})
        assert run.project == "hers"
    assert server.run("theirs").steps == [0]


def test_our_runs_leave_the_environment_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    before = dict(os.environ)
    train(tiny(wandb__panels=True), out=tmp_path / "run")
    changed = {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}
    assert changed <= {"WANDB_SERVICE"}
