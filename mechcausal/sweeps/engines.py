"""Engines run the jobs of a sweep, with a `submit` like that of `concurrent.futures`."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from mechcausal.sweeps.member import Done, Job, run_job
from mechcausal.sweeps.outcome import Outcome

_ATTEMPTS = 2


class EngineLostError(RuntimeError):
    """The engine can run no more jobs; the message is one line for the user."""


@runtime_checkable
class Engine(Protocol):
    """Runs jobs somewhere, several at a time."""

    @property
    def n_workers(self) -> int:
        """The number of jobs that can run at a time."""

    @property
    def is_lost(self) -> bool:
        """Whether the pending jobs will never end."""

    def submit(self, job: Job) -> "Future[Done]":
        """Run a job; a failing member gives an outcome, not an exception.

        The future raises EngineLostError, or is cancelled, when the engine can run no more jobs.
        """

    def stop(self) -> None:
        """Ask every running member to stop; returns at once."""

    def problem(self) -> str:
        """Why no job ends, one line; empty if nothing is wrong."""

    def __enter__(self) -> object:
        """Start the workers."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the running members, then end the workers."""


class LocalEngine:
    """Runs jobs in processes of this machine.

    Every process is a pool of its own: if one is killed, only its job is lost, and a new process
    resumes it.
    """

    def __init__(self, n_workers: int, *, uses_cuda: bool = False) -> None:
        """Prepare the pools; processes start with their first jobs.

        Args:
            n_workers: number of processes.
            uses_cuda: spawn the processes, since CUDA does not survive a fork.
        """
        self._n_workers = n_workers
        self._context = _context(uses_cuda)
        self._stop = self._context.Event()
        self._pools: SimpleQueue[ProcessPoolExecutor | None] = SimpleQueue()
        self._threads = ThreadPoolExecutor(n_workers, thread_name_prefix="sweep")
        for _ in range(n_workers):
            self._pools.put(None)

    @property
    def n_workers(self) -> int:
        """The number of processes."""
        return self._n_workers

    @property
    def is_lost(self) -> bool:
        """Always False: a dead process is replaced."""
        return False

    def submit(self, job: Job) -> "Future[Done]":
        """Run a job in the next free process."""
        return self._threads.submit(self._run, job)

    def stop(self) -> None:
        """Ask every running member to stop."""
        self._stop.set()

    def problem(self) -> str:
        """Always empty."""
        return ""

    def __enter__(self) -> "LocalEngine":
        """Do nothing: processes start with their first jobs."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the running members, then end the processes."""
        if kind is not None:
            self.stop()
        self._threads.shutdown(cancel_futures=True)
        while not self._pools.empty():
            pool = self._pools.get()
            if pool is not None:
                pool.shutdown()

    def _run(self, job: Job) -> Done:
        pool = self._pools.get()
        try:
            for _ in range(_ATTEMPTS):
                if self._stop.is_set():
                    return Done([Outcome("interrupted")] * len(job.folders))
                pool = pool or self._new_pool()
                try:
                    return pool.submit(_in_worker, job).result()
                except BrokenProcessPool:
                    pool.shutdown(wait=False)
                    pool = None
        finally:
            self._pools.put(pool)
        reason = f"its process died {_ATTEMPTS} times: killed, or out of memory"
        return Done([Outcome("failed", reason)] * len(job.folders))

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            1, mp_context=self._context, initializer=_start_worker, initargs=(self._stop,)
        )


def _context(uses_cuda: bool) -> BaseContext:
    if uses_cuda or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The fork server imports this once, while it has no threads, and forks every worker from it.
    context.set_forkserver_preload(["mechcausal.sweeps.preload"])
    return context


_should_stop: Callable[[], bool] = lambda: False  # noqa: E731  replaced in each worker


def _start_worker(stop: Any) -> None:
    """Set up a worker process: it ignores Ctrl-C and ends when the sweep's process dies."""
    global _should_stop
    # A terminal sends Ctrl-C to the whole process group, and the sweep passes it on as `stop`.
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    orphaned = threading.Event()

    def watch_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            orphaned.set()
            if not _busy.is_set():
                os._exit(1)

    threading.Thread(target=watch_parent, daemon=True).start()
    _should_stop = lambda: bool(orphaned.is_set() or stop.is_set())  # noqa: E731

    import torch

    torch.set_num_threads(1)


_busy = threading.Event()


def _in_worker(job: Job) -> Done:
    _busy.set()
    try:
        return run_job(job, _should_stop)
    finally:
        _busy.clear()
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)
