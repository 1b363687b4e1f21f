"""The jobs of a sweep on the user's Dask cluster.

None is started here: whoever reaches a scheduler can run code on its workers, so who may reach it
is for the user to say, best with TLS.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from mechcausal.support.messages import first_line
from mechcausal.sweeps.engines import EngineLostError
from mechcausal.sweeps.member import Done, Job, run_job
from mechcausal.sweeps.sweep import SweepError

CONNECT_SECONDS = 10
"""How long a scheduler may take to answer."""
_POLL_SECONDS = 1.0
# What Dask raises for an address or certificates that are none, for encryption that is required,
# and (an assertion) where its client does not start in time on a machine under load.
_REFUSALS = (OSError, ValueError, TypeError, RuntimeError, ImportError, AssertionError)
_SILENT = ("distributed", "distributed.client", "distributed.worker", "distributed.scheduler")

# Torch's threads and W&B's run are the process's: a worker of several threads takes turns.
_ONE_AT_A_TIME = threading.Lock()


class DaskEngine:
    """Submits jobs to a Dask scheduler, which runs those of a dead worker again elsewhere.

    A member that was half done is gone on with, where workers share the sweep's disk.
    """

    def __init__(self, address: str) -> None:
        """Connect, over TLS with the certificates of Dask's settings where the address says so.

        Args:
            address: of the scheduler, such as tls://host:8786 or tcp://host:8786.

        Raises:
            SweepError: dask.distributed is not installed, or no scheduler answers.
        """
        try:
            import dask.config
            import distributed
        except ModuleNotFoundError:
            raise SweepError(
                "--engine dask needs dask.distributed: pip install 'mechcausal[cluster]'"
            ) from None
        # What goes wrong on a worker becomes an outcome; the rest is for us to say, in one line.
        dask.config.set({"logging": dict.fromkeys(_SILENT, "critical")})
        for name in _SILENT:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.address = address
        try:
            if address.startswith("tls://"):
                _check_certificates()
            self._client: Any = distributed.Client(  # type: ignore[no-untyped-call]
                address, timeout=CONNECT_SECONDS, set_as_default=False
            )
        except _REFUSALS as error:
            reason = first_line(error)[:200]
            raise SweepError(f"--address {address}: no Dask scheduler: {reason}") from None
        self._event_name = f"mechcausal-stop-{secrets.token_hex(8)}"
        make_event: Any = distributed.Event
        self._event = make_event(self._event_name, client=self._client)
        executor: Any = self._client
        self._executor: Any = executor.get_executor(pure=False)

    @property
    def n_workers(self) -> int:
        """Threads of all workers that there are now."""
        if self._client.status != "running":
            return 1
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        return max(1, sum(int(worker["nthreads"]) for worker in workers))

    @property
    def is_lost(self) -> bool:
        """Whether the client has given up: Dask leaves what it took while the scheduler went."""
        return self._client.status in ("closing", "closed")

    def submit(self, job: Job) -> "Future[Done]":
        """Hand a job to the scheduler."""
        if self._client.status not in ("running", "connecting"):
            raise EngineLostError(self._lost())
        future: Future[Done] = self._executor.submit(_on_worker, job, self._event_name)
        return future

    def stop(self) -> None:
        """Ask every running member to stop."""
        if self._client.status == "running":
            self._client.sync(self._event.set, asynchronous=True)

    def problem(self) -> str:
        """No scheduler, or no worker."""
        if self._client.status != "running":
            return self._lost()
        if not self._client.scheduler_info(n_workers=-1)["workers"]:
            return f"the scheduler at {self.address} has no worker; waiting for one"
        return ""

    def __enter__(self) -> "DaskEngine":
        """Is connected already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the cluster as it is."""
        self._client.close(timeout=2)

    def _lost(self) -> str:
        return f"the Dask scheduler at {self.address} is gone"


def _check_certificates() -> None:
    """Find out whether Dask's settings name the certificates of a TLS client.

    Raises:
        ValueError: they do not.
        OSError: one cannot be read, or is none.
    """
    import dask.config
    import distributed

    if dask.config.get("distributed.client.security-loader", None):
        return  # it is asked as the client connects
    make_security: Any = distributed.Security
    security = make_security()
    for file in (security.tls_ca_file, security.tls_client_cert, security.tls_client_key):
        # Python's TLS does not say which file it misses; a text of several lines is no name.
        if file and "\n" not in file and not Path(file).is_file():
            raise ValueError(f"TLS: {file}: no such file")
    if security.get_connection_args("client").get("ssl_context") is None:
        raise ValueError(
            "TLS needs Dask's settings, DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ..._CLIENT__CERT "
            "and ..._CLIENT__KEY"
        )


def _on_worker(job: Job, event_name: str) -> Done:
    """Run a job in a worker of the cluster, one at a time in a process."""
    with _ONE_AT_A_TIME:
        return run_job(job, _stop_asked(event_name))


def _stop_asked(event_name: str) -> Callable[[], bool]:
    import distributed

    make_event: Any = distributed.Event
    event: Any = None
    asked, answer = 0.0, False

    def should_stop() -> bool:
        nonlocal event, asked, answer
        if answer or time.monotonic() - asked < _POLL_SECONDS:
            return answer
        try:
            event = event or make_event(event_name, client=distributed.get_client())
            answer = bool(event.is_set())
        except Exception:  # without a scheduler nobody waits for the result
            answer = True
        asked = time.monotonic()
        return answer

    return should_stop
