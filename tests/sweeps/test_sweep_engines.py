"""Engines with real processes: members that are killed, stopped, left by their scheduler."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dask.config
import psutil
import pytest

from mechcausal.cli.main import main
from mechcausal.records.run_folder import read_metrics, read_process, run_info
from mechcausal.records.wandb_fragments import fragments, wandb_steps
from mechcausal.sweeps.cluster import DaskEngine
from mechcausal.sweeps.definition import load_sweep
from mechcausal.sweeps.driver import SweepProgress, run_sweep
from mechcausal.sweeps.member import Done, Job
from mechcausal.sweeps.sweep import SweepError
from mechcausal.training.run import train

SWEEP = """
recipe = "manual"
seeds = 6
axes = {}
[changes]
training = { batch_size = 64, stage1.steps = STEPS, stage2.steps = STEPS }
evaluation = { n_sequences = 16, bayes_draws = 4, theory_priors = 10 }
probing = { every = 20, dense = 1, frames = 0, images = 0, report = false }
checkpoints = { every = 20, artifacts = false }
"""


@pytest.fixture
def sweep_file(tmp_path: Path) -> Callable[[int], Path]:
    def write(steps: int) -> Path:
        path = tmp_path / "s.toml"
        path.write_text(SWEEP.replace("STEPS", str(steps)))
        return path

    return write


def rows_once(folder: Path) -> None:
    """Every member has finished, and its rows are in W&B's fragments once."""
    members = sorted(path for path in folder.iterdir() if (path / "recipe.toml").is_file())
    assert len(members) == 6
    for member in members:
        assert run_info(member).state == "finished"
        steps = [int(row["train/step"] or 0) for row in read_metrics(member)]
        assert steps == sorted(set(steps))
        folders = fragments(member, str(read_process(member)["wandb_id"]))
        assert sorted(step for folder in folders for step in wandb_steps(folder) or ()) == steps


def wait_for(what: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def busy_member(folder: Path, rows: int = 3) -> dict[str, object]:
    """The process of a member that has written a few rows and goes on; empty so far."""
    for member in sorted(folder.glob("*/metrics.jsonl")):
        done = (member.parent / "summary.json").exists()
        if not done and member.read_bytes().count(b"\n") >= rows:
            return read_process(member.parent)
    return {}


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["local", "dask"])
def test_a_killed_worker_takes_no_other_member_with_it(
    engine: str,
    sweep_file: Callable[[int], Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    cluster = request.getfixturevalue("cluster") if engine == "dask" else None
    out = tmp_path / "out"
    killed: list[int] = []

    def kill_once(progress: SweepProgress) -> None:
        process = busy_member(out)
        if process and not killed:
            killed.append(int(str(process["pid"])))
            os.kill(killed[0], signal.SIGKILL)

    sweep = load_sweep(sweep_file(300))
    if cluster is None:
        result = run_sweep(sweep, out, workers=2, on_progress=kill_once)
    else:
        result = run_sweep(
            sweep, out, engine="dask", address=cluster.address, on_progress=kill_once
        )
        assert killed[0] in [worker.pid for worker in cluster.workers]
    assert killed
    assert not result.failed
    assert not result.problem
    rows_once(out)


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["local", "dask"])
def test_ctrl_c_leaves_members_that_can_be_resumed(
    engine: str,
    sweep_file: Callable[[int], Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mechcausal.cli.main", "sweep", str(sweep_file(1000))]
    options = ["--out", str(out), "--engine", engine]
    if engine == "dask":
        options += ["--address", request.getfixturevalue("cluster").address]
    else:
        options += ["--workers", "2"]
    process = subprocess.Popen(
        command + options, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_for(lambda: busy_member(out))
        # As a terminal does: to the whole group.
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert f"start it again to go on: mechcausal sweep {out}" in error
    states = [run_info(path.parent).state for path in out.glob("*/recipe.toml")]
    assert "interrupted" in states
    assert "running" not in states
    assert "failed" not in states


class Cluster:
    """A scheduler and two workers of Dask, each a process."""

    def __init__(self, folder: Path, *, protocol: str = "tcp") -> None:
        self.file = folder / "scheduler.json"
        common = ["--interface", "lo", "--no-dashboard"]
        port = ["--port", "0", "--protocol", protocol]
        self.scheduler = self._start("scheduler", "--scheduler-file", self.file, *port, *common[:2])
        wait_for(self.file.exists)
        where = ["--scheduler-file", self.file, *common, "--nthreads", "1", "--no-nanny"]
        self.workers = [self._start("worker", *where) for _ in range(2)]
        self.address = re.findall(r"t(?:cp|ls)://[\d.:]+", self.file.read_text())[0]

    @staticmethod
    def _start(kind: str, *arguments: object) -> subprocess.Popen[bytes]:
        code = f"from distributed.cli.dask_{kind} import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def close(self) -> None:
        for process in [self.scheduler, *self.workers]:
            for child in psutil.Process(process.pid).children() if process.poll() is None else ():
                child.kill()
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a new certificate that all sides of Dask trust and show, as the README does."""

    def make(name: str) -> None:
        file, words = tmp_path / name, "req -x509 -nodes -newkey rsa:2048 -days 1 -subj /CN=dask"
        openssl = ["openssl", *words.split(), "-out", str(file), "-keyout", f"{file}.key"]
        subprocess.run(openssl, check=True, capture_output=True)
        monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TLS__CA_FILE", str(file))
        for role in ("CLIENT", "SCHEDULER", "WORKER"):
            monkeypatch.setenv(f"DASK_DISTRIBUTED__COMM__TLS__{role}__CERT", str(file))
            monkeypatch.setenv(f"DASK_DISTRIBUTED__COMM__TLS__{role}__KEY", f"{file}.key")
        dask.config.refresh()

    return make


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_dask_over_tls_takes_those_who_have_the_certificate_alone(
    certificate: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    certificate("ours.pem")
    cluster = Cluster(tmp_path, protocol="tls")
    try:
        assert cluster.address.startswith("tls://")
        with DaskEngine(cluster.address) as engine:
            wait_for(lambda: engine.n_workers == 2)
            assert engine.submit(Job([], [])).result(60) == Done([])
        monkeypatch.setattr("mechcausal.sweeps.cluster.CONNECT_SECONDS", 2)
        plain = cluster.address.replace("tls", "tcp")
        with pytest.raises(SweepError, match=f"--address {plain}: no Dask scheduler"):
            DaskEngine(plain)
        certificate("another.pem")
        with pytest.raises(SweepError, match=f"--address {cluster.address}: no Dask scheduler"):
            DaskEngine(cluster.address)
        monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY", str(tmp_path / "absent"))
        dask.config.refresh()
        with pytest.raises(SweepError, match=r"TLS: .*absent: no such file"):
            DaskEngine(cluster.address)
    finally:
        cluster.close()
        monkeypatch.undo()
        dask.config.refresh()


@pytest.mark.soak
def test_dask_without_its_scheduler_says_so_and_the_rest_is_finished_later(
    cluster: Cluster,
    sweep_file: Callable[[int], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out, file = tmp_path / "out", str(sweep_file(300))
    ended: list[int] = []

    def lose(progress: SweepProgress) -> None:
        if progress.done and not ended:
            ended.append(progress.done)
            cluster.scheduler.kill()

    result = run_sweep(
        load_sweep(file), out, engine="dask", address=cluster.address, on_progress=lose
    )
    assert result.problem == f"the Dask scheduler at {cluster.address} is gone"
    assert 0 < result.finished < 6
    assert "Traceback" not in capfd.readouterr().err
    assert main(["sweep", file, "--out", str(out), "--workers", "2", "--quiet"]) == 0
    rows_once(out)


@pytest.mark.soak
@pytest.mark.parametrize("batch", [False, True])
def test_dask_collect_brings_folders_back(
    batch: bool, cluster: Cluster, sweep_file: Callable[[int], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = {"address": cluster.address, "collect": True, "batch": batch}
    result = run_sweep(load_sweep(sweep_file(20)), out, engine="dask", **options)
    assert result.finished == 6
    rows_once(out)


@pytest.mark.soak
def test_an_unreachable_scheduler_is_one_line_and_nothing_is_started(
    sweep_file: Callable[[int], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mechcausal.sweeps.cluster.CONNECT_SECONDS", 1)
    command = ["sweep", str(sweep_file(20)), "--engine", "dask", "--out", str(tmp_path / "out")]
    for address in ("tcp://127.0.0.1:1", "nonsense://here", "tls://127.0.0.1:1", "127.0.0.1"):
        assert main([*command, "--address", address]) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"mechcausal: --address {address}: no Dask scheduler: ")
        assert error.count("\n") == 1
    assert not list((tmp_path / "out").glob("[!.]*"))


@pytest.mark.slow
def test_members_trained_as_batches_in_processes_are_their_single_runs(
    sweep_file: Callable[[int], Path], tmp_path: Path
) -> None:
    """One by one in processes: see test_replication.py."""
    result = run_sweep(load_sweep(sweep_file(40)), tmp_path / "out", batch=True, workers=2)
    rows_once(tmp_path / "out")
    for member in (result.members[0], result.members[-1]):
        single = train(
            member.recipe.with_overrides(wandb__mode="disabled"), out=tmp_path / member.name
        )
        for row, same in zip(read_metrics(member.folder), read_metrics(single.folder), strict=True):
            assert [key for key in row if row[key] is None] == [k for k in same if same[k] is None]
            numbers = {key: value for key, value in row.items() if value is not None}
            assert numbers == pytest.approx({k: same[k] for k in numbers}, rel=1e-4, abs=1e-5)
