"""What holds for every test: shapes are checked, seeds are fixed, nothing reaches the network."""

import gc
import json
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.type_checks import check_annotations

# Checks annotations, tensor shapes included, at each call; has to precede the first import of
# either package.
check_annotations("mechcausal", "probes")

# What is imported for the tests stays, so looking for garbage in it is in vain.
gc.disable()

settings.register_profile("mechcausal", deadline=None, derandomize=True)
settings.load_profile("mechcausal")

# A developer's own W&B settings must not steer a test, nor a test send anything to an account.
for name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[name]
os.environ |= {
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    # Tests run in two processes at once, and most models are small.
    "OMP_NUM_THREADS": "1",
    # As in the command: waiting threads sleep, so that a busy machine slows tests only a little.
    "OMP_WAIT_POLICY": "passive",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests begin first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_runtest_setup() -> None:
    """What the instruments tell a user is no mistake of ours, whatever line it is attributed to."""
    from probes import ProbeWarning

    warnings.simplefilter("default", ProbeWarning)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Let a socket connect within this machine only; W&B talks to its own service that way."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        local = self.family not in (socket.AF_INET, socket.AF_INET6) or (
            isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1", "localhost")
        )
        if not local:
            raise OSError(f"tests have no network: {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(socket.socket, "connect", connect_locally)
        yield


@pytest.fixture
def as_json(command: Callable[..., tuple[int, str, str]]) -> Callable[..., dict[str, Any]]:
    """What the test file's command prints with `--json`, strict JSON."""

    def run(*arguments: str) -> dict[str, Any]:
        code, output, errors = command(*arguments, "--json")
        assert (code, errors) == (0, "")
        content: dict[str, Any] = json.loads(output, parse_constant=pytest.fail)
        return content

    return run


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's folder."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of training `tiny_recipe()`, for tests that only look at it or copy its folder."""
    from mechcausal.training.run import train
    from tests.run_folders import tiny_recipe

    return train(tiny_recipe(), out=tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave their figures empty: for tests of something else, half of whose time they take."""
    from mechcausal.training.experiments.causal_graph import CausalGraphExperiment

    def draw(self: CausalGraphExperiment, folder: Path, **options: object) -> dict[str, Path]:
        folder.mkdir(exist_ok=True)
        (folder / "attention.png").touch()
        return {}

    monkeypatch.setattr(CausalGraphExperiment, "draw_figures", draw)
