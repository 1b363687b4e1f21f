"""The local W&B server: the real client logs, resumes and syncs to it, and it fails on request."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from tests.wandb_server import WandbServer

pytestmark = pytest.mark.soak

START = """
    import sys
    import numpy as np, wandb
    def start(mode, **settings):
        return wandb.init(
            mode=mode, project="plants", id="fern", resume="allow", dir=sys.argv[1],
            config={"seed": 1, "graph": {"edges": 2}},
            settings=wandb.Settings(
                console="off", silent=True, x_disable_stats=True, x_disable_machine_info=True,
                disable_git=True, x_save_requirements=False, **settings,
            ),
        )
"""


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


def client(server: WandbServer, folder: Path, code: str) -> str:
    """What a process prints that runs the code, with `start` to open the run `fern`."""
    return python(server, folder, "-c", dedent(START) + dedent(code), str(folder))


def sync(server: WandbServer, *fragments: Path) -> str:
    return python(server, fragments[0], "-m", "wandb", "sync", *map(str, fragments))


def python(server: WandbServer, data: Path, *arguments: str) -> str:
    environment = os.environ | server.environment
    environment |= {"WANDB_DATA_DIR": str(data), "WANDB_ERROR_REPORTING": "false"}
    for name in ("WANDB_MODE", "WANDB_SILENT"):  # silent, `wandb sync` hides what went wrong
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def fragments(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def synced(fragment: Path) -> bool:
    return (fragment / "run-fern.wandb.synced").exists()


def test_an_online_run_arrives_whole(server: WandbServer, tmp_path: Path) -> None:
    client(
        server,
        tmp_path,
        """
        run = start("online")
        for step in (0, 5, 10):
            run.log({"loss": 1 / (1 + step)}, step=step, commit=True)
        run.log({"map": wandb.Image(np.zeros((4, 4, 3), np.uint8))}, step=15, commit=True)
        weights = sys.argv[1] + "/weights"
        for version in (b"one", b"two"):
            with open(weights, "wb") as file:
                file.write(version)
            artifact = wandb.Artifact("checkpoint", "model")
            artifact.add_file(weights)
            run.log_artifact(artifact, aliases=["latest", f"step-{len(version)}-{version[0]}"])
        run.summary["state"] = "finished"
        run.finish(exit_code=3)
        """,
    )
    run = server.run("fern")
    assert (run.project, run.exit_code) == ("plants", 3)
    assert run.config == {"seed": 1, "graph": {"edges": 2}}
    assert run.steps == [0, 5, 10, 15]
    assert [row.get("loss") for row in run.history] == [1, 1 / 6, 1 / 11, None]
    assert run.summary["state"] == "finished"
    assert run.files[run.history[-1]["map"]["path"]].startswith(b"\x89PNG")
    assert [artifact.files for artifact in run.artifacts] == [
        {"weights": b"one"},
        {"weights": b"two"},
    ]
    assert [sorted(artifact.aliases) for artifact in run.artifacts] == [
        ["step-3-111"],
        ["latest", "step-3-116"],
    ]
    assert all(artifact.committed for artifact in run.artifacts)
    assert server.received.unknown == []


def test_fragments_are_synced_into_one_run(server: WandbServer, tmp_path: Path) -> None:
    client(
        server,
        tmp_path,
        """
        for steps in ((0, 1, 2), (3, 4)):
            run = start("offline")
            for step in steps:
                run.log({"loss": step}, step=step, commit=True)
            run.finish()
        """,
    )
    assert server.received.runs == {}
    first, second = fragments(tmp_path)
    sync(server, first)
    assert [synced(first), synced(second)] == [True, False]
    sync(server, second)
    assert synced(second)
    run = server.run("fern")
    assert (run.steps, run.exit_code) == ([0, 1, 2, 3, 4], 0)
    assert server.received.unknown == []


def test_a_refused_sync_marks_nothing(server: WandbServer, tmp_path: Path) -> None:
    client(server, tmp_path, "run = start('offline'); run.log({'loss': 1}); run.finish()")
    (fragment,) = fragments(tmp_path)
    server.reject(403)
    assert "returned error 403" in sync(server, fragment)
    assert not synced(fragment)


def test_a_run_outlives_the_server(server: WandbServer, tmp_path: Path) -> None:
    server.fail(after=1)
    printed = client(
        server,
        tmp_path,
        """
        import time
        run = start("online", finish_timeout=1, x_file_stream_transmit_interval=1)
        run.log({"loss": 0}, step=0, commit=True)
        time.sleep(1.5)
        for step in range(1, 10):
            run.log({"loss": step}, step=step, commit=True)
        start = time.monotonic()
        run.finish()
        print("seconds:", time.monotonic() - start)
        """,
    )
    assert 0.9 < float(printed.split("seconds:")[1].split()[0]) < 10
    run = server.run("fern")
    assert (run.steps, run.exit_code) == ([0], None)


def test_it_refuses_hangs_and_comes_back(server: WandbServer) -> None:
    def viewer() -> str:
        body = json.dumps({"query": "query Viewer { viewer { entity } }"}).encode()
        request = urllib.request.Request(f"{server.url}/graphql", body)
        with urllib.request.urlopen(request, timeout=0.3) as answer:
            return str(json.load(answer)["data"]["viewer"]["entity"])

    url = server.url
    assert viewer() == "tester"
    server.reject(403)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        viewer()
    server.hang()
    with pytest.raises(TimeoutError):
        viewer()
    server.answer()
    assert viewer() == "tester"
    server.stop()
    with pytest.raises(urllib.error.URLError, match="refused"):
        viewer()
    server.start()
    assert (server.url, viewer()) == (url, "tester")
