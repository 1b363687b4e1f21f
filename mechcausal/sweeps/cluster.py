"""The jobs of a sweep on a Dask cluster: the user's own, or one of this machine's processes."""

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from mechcausal.messages import first_line
from mechcausal.sweeps.engines import EngineLostError
from mechcausal.sweeps.member import Done, Job, run_job
from mechcausal.sweeps.sweep import SweepError

CONNECT_SECONDS = 10
"""How long a scheduler may take to answer."""
_POLL_SECONDS = 1.0
_SILENT = ("distributed", "distributed.client", "distributed.worker", "distributed.scheduler")

# Torch's threads and W&B's run are the process's: a worker of several threads takes turns.
_ONE_AT_A_TIME = threading.Lock()


class DaskEngine:
    """Submits jobs to a Dask scheduler, which runs those of a dead worker again elsewhere.

    A member that was half done is gone on with, where workers share the sweep's disk.
    """

    def __init__(self, address: str | None, n_workers: int, *, host: str = "127.0.0.1") -> None:
        """Connect, or start a scheduler and workers of our own.

        Args:
            address: of the user's scheduler; None starts one here.
            n_workers: worker processes of our own.
            host: interface on which our own scheduler and workers listen.

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
        self._cluster: Any = None
        self.address = address or ""
        make_security: Any = distributed.Security
        if self.address.startswith("tls://") and not _has_certificates(make_security()):
            raise SweepError(
                f"--address {address}: no Dask scheduler: TLS needs Dask's settings, "
                "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ..._CLIENT__CERT and ..._CLIENT__KEY"
            )
        try:
            if address is None:
                self._cluster = distributed.LocalCluster(  # type: ignore[no-untyped-call]
                    n_workers=n_workers,
                    threads_per_worker=1,
                    host=host,
                    dashboard_address=None,
                    memory_limit=0,  # a member's needs are checked before it starts
                    silence_logs=logging.CRITICAL,
                    preload=[__name__],
                )
                self.address = self._cluster.scheduler_address
            self._client: Any = distributed.Client(  # type: ignore[no-untyped-call]
                self._cluster or address, timeout=CONNECT_SECONDS, set_as_default=False
            )
        except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
            self._close_cluster()
            place = f"--address {address}" if address else f"--host {host}"
            raise SweepError(f"{place}: no Dask scheduler: {first_line(error)[:200]}") from None
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
        """Leave the user's cluster as it is, end our own."""
        self._client.close(timeout=2)
        self._close_cluster()

    def _lost(self) -> str:
        return f"the Dask scheduler at {self.address} is gone"

    def _close_cluster(self) -> None:
        if self._cluster is not None:
            self._cluster.close(timeout=10)


def _has_certificates(security: Any) -> bool:
    return security.get_connection_args("client").get("ssl_context") is not None


def dask_setup(worker: object) -> None:
    """Called in every worker of our own as it starts: a terminal's Ctrl-C is not for it.

    The sweep asks its members to stop; the worker ends with the sweep.
    """
    if hasattr(os, "setsid"):
        os.setsid()


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
