"""What a process of ours sets before torch is imported."""

import gc
import os

_GARBAGE_THRESHOLD = 100_000  # objects made between two searches for garbage


def prepare_process() -> None:
    """Set up a process that is ours alone: a command, or a worker of a sweep."""
    # Threads that wait for each other should sleep: spinning, torch's default, is many times slower
    # than one thread as soon as anything else wants the cores. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Thousands of modules are about to load; searching them for garbage takes a fifth of the time.
    gc.set_threshold(_GARBAGE_THRESHOLD)
