"""Run the jobs of a sweep on the user's Dask cluster.

This module starts no cluster: whoever reaches a scheduler can run code on its workers, so the user
must decide who may reach it, best with TLS.
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
"""How long to wait for the scheduler."""
_POLL_SECONDS = 1.0
# What Dask raises for an invalid address, invalid certificates or missing encryption; the assertion
# fails if its client does not start in time on a busy machine.
_REFUSALS = (OSError, ValueError, TypeError, RuntimeError, ImportError, AssertionError)
_LOGGERS = ("distributed", "distributed.client", "distributed.worker", "distributed.scheduler")

# Torch's thread count and W&B's run belong to the process: a worker's threads must take turns.
_ONE_AT_A_TIME = threading.Lock()


class DaskEngine:
    """Submits jobs to a Dask scheduler, which runs the jobs of a dead worker again elsewhere.

    If the workers share the sweep's disk, they resume half-trained members.
    """

    def __init__(self, address: str) -> None:
        """Connect to the scheduler; a tls:// address uses the certificates in Dask's settings.

        Args:
            address: address of the scheduler, such as tls://host:8786 or tcp://host:8786.

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
        # Errors on workers become outcomes, and this class reports all others in one line.
        dask.config.set({"logging": dict.fromkeys(_LOGGERS, "critical")})
        for name in _LOGGERS:
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
        """The number of threads of all connected workers."""
        if self._client.status != "running":
            return 1
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        return max(1, sum(int(worker["nthreads"]) for worker in workers))

    @property
    def is_lost(self) -> bool:
        """Whether the client has closed; Dask then never completes the pending futures."""
        return self._client.status in ("closing", "closed")

    def submit(self, job: Job) -> "Future[Done]":
        """Submit a job to the scheduler."""
        if self._client.status not in ("running", "connecting"):
            raise EngineLostError(self._lost())
        future: Future[Done] = self._executor.submit(_on_worker, job, self._event_name)
        return future

    def stop(self) -> None:
        """Ask every running member to stop."""
        if self._client.status == "running":
            self._client.sync(self._event.set, asynchronous=True)

    def problem(self) -> str:
        """Why no job ends: no scheduler, or no worker; else empty."""
        if self._client.status != "running":
            return self._lost()
        if not self._client.scheduler_info(n_workers=-1)["workers"]:
            return f"the scheduler at {self.address} has no worker; waiting for one"
        return ""

    def __enter__(self) -> "DaskEngine":
        """Do nothing: the client is connected already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Disconnect; the cluster keeps running."""
        self._client.close(timeout=2)

    def _lost(self) -> str:
        return f"the Dask scheduler at {self.address} is gone"


def _check_certificates() -> None:
    """Check that Dask's settings name the certificates of a TLS client.

    Raises:
        ValueError: a certificate is missing.
        OSError: a certificate cannot be read or is invalid.
    """
    import dask.config
    import distributed

    if dask.config.get("distributed.client.security-loader", None):
        return  # the client calls the loader itself
    make_security: Any = distributed.Security
    security = make_security()
    for file in (security.tls_ca_file, security.tls_client_cert, security.tls_client_key):
        # Python's error does not name the missing file; several lines are the certificate itself.
        if file and "\n" not in file and not Path(file).is_file():
            raise ValueError(f"TLS: {file}: no such file")
    if security.get_connection_args("client").get("ssl_context") is None:
        raise ValueError(
            "TLS needs Dask's settings, DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ..._CLIENT__CERT "
            "and ..._CLIENT__KEY"
        )


def _on_worker(job: Job, event_name: str) -> Done:
    """Run a job in a worker of the cluster, one at a time per process."""
    with _ONE_AT_A_TIME:
        return run_job(job, _stop_asked(event_name))


def _stop_asked(event_name: str) -> Callable[[], bool]:
    """A function that polls the sweep's stop event, at most once per `_POLL_SECONDS`."""
    import distributed

    make_event: Any = distributed.Event
    event: Any = None
    last_poll, answer = 0.0, False

    def should_stop() -> bool:
        nonlocal event, last_poll, answer
        if answer or time.monotonic() - last_poll < _POLL_SECONDS:
            return answer
        try:
            event = event or make_event(event_name, client=distributed.get_client())
            answer = bool(event.is_set())
        except Exception:  # the scheduler is gone: nobody waits for the result
            answer = True
        last_poll = time.monotonic()
        return answer

    return should_stop
