"""Draw training batches in a thread while the model is trained and probed.

Drawing is most of the work of a step and does not need the model, so a second core does it
meanwhile. Batches, and the generator's state after each, equal those drawn without the thread.
"""

import os
import time
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mechcausal.tasks import Batch, Task

# Enough batches for the time of a probe step; few are unused at the end.
_MOST_BATCHES = 32
_MOST_SECONDS = 0.25


@dataclass(frozen=True)
class _Drawn:
    batch: Batch
    state: Tensor  # of the generator afterwards
    seconds: float


class BatchesAhead:
    """Batches of a task, the next ones always under way.

    Example:
        >>> from mechcausal.graphs import chain
        >>> from mechcausal.tasks.priors import DirichletPrior
        >>> from mechcausal.tasks import SingleParentTask
        >>> task = SingleParentTask(chain(5), DirichletPrior.symmetric(0.1, vocab_size=3))
        >>> ahead = BatchesAhead(task, torch.Generator().manual_seed(0))
        >>> alone = task.sample(4, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(ahead.sample(4).tokens, alone.tokens)
        True
    """

    def __init__(self, task: Task, generator: torch.Generator) -> None:
        """Begin when the first batch is asked for.

        Args:
            task: graph and prior.
            generator: source of the batches. Its state is the one after the last batch returned;
                setting it makes the next batch start there.
        """
        self._task = task
        self._generator = generator
        self._is_ahead = generator.device.type == "cpu" and _n_cores() > 1
        self._source = torch.Generator(generator.device)
        self._pending: deque[Future[_Drawn]] = deque()
        self._n_sequences = 0
        self._state: Tensor | None = (
            None  # of the generator, from which the pending batches continue
        )
        self._depth = 1
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def sample(self, n_sequences: int) -> Batch:
        """The next batch, without the transition matrices."""
        if not self._is_ahead:
            return self._task.sample(n_sequences, generator=self._generator)
        state = self._generator.get_state()
        if (
            n_sequences != self._n_sequences
            or self._state is None
            or not torch.equal(state, self._state)
        ):
            self._begin(n_sequences, state)
        self._fill()
        drawn = self._pending.popleft().result()
        # Few at first: a run of a dozen steps needs no stock.
        self._depth = min(self._depth + 1, _MOST_BATCHES, 1 + int(_MOST_SECONDS / drawn.seconds))
        self._fill()
        self._generator.set_state(drawn.state)
        self._state = drawn.state
        return drawn.batch

    def _begin(self, n_sequences: int, state: Tensor) -> None:
        running = [future for future in self._pending if not future.cancel()]
        for future in running:
            future.exception()  # waits: it draws from the same source
        self._pending.clear()
        self._source.set_state(state)
        self._n_sequences, self._depth = n_sequences, 1

    def _fill(self) -> None:
        while len(self._pending) < self._depth:
            future = self._pool.submit(_draw, self._task, self._n_sequences, self._source)
            self._pending.append(future)


def _draw(task: Task, n_sequences: int, source: torch.Generator) -> _Drawn:
    begin = time.perf_counter()
    batch = replace(task.sample(n_sequences, generator=source), transition=None)
    return _Drawn(batch, source.get_state(), max(time.perf_counter() - begin, 1e-6))


def _n_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
