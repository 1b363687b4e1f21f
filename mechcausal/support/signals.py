"""SIGINT and SIGTERM as requests to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(KeyboardInterrupt):
    """A signal asked the process to stop at a moment when it can stop at once.

    Attributes:
        number: number of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        """Store the message for the user and the number of the signal."""
        super().__init__(message)
        self.number = number


class StopSignal:
    """Whether the process was asked to stop.

    Attributes:
        received: the signal; None if none has arrived.
        waits: True if a signal is only stored in `received`; False if it raises StopRequested
            when it arrives.
    """

    def __init__(self) -> None:
        """Start without a signal."""
        self.received: signal.Signals | None = None
        self.waits = False


@contextmanager
def stop_on_signals(stop: StopSignal | None = None) -> Iterator[StopSignal]:
    """Turn the first SIGTERM or SIGINT into a request to stop; a second SIGINT interrupts at once.

    Does nothing outside the main thread, where Python handles no signals.

    Args:
        stop: stores the request; a new one when absent.
    """
    stop = stop or StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, stop.received = stop.received is None, signal.Signals(number)
        if first and not stop.waits:
            raise StopRequested("stopped", number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
