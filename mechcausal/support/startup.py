"""Settings of our own processes, made before torch is imported."""

import gc
import os

_GARBAGE_THRESHOLD = 100_000  # objects made between two collections


def prepare_process() -> None:
    """Set up a command or a worker of a sweep, never a process of the user's."""
    # Waiting threads should sleep: spinning, torch's default, is many times slower than one thread
    # when other processes need the cores. torch reads this when it is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # While thousands of modules load, garbage collection would take a fifth of the time.
    gc.set_threshold(_GARBAGE_THRESHOLD)
