"""How a member of a sweep ended."""

from dataclasses import dataclass

from mechcausal.records.run_folder import State


@dataclass(frozen=True)
class Outcome:
    """How a member ended.

    Attributes:
        state: finished, interrupted (it can be resumed) or failed.
        error: why it failed, one line; empty if it did not.
    """

    state: State
    error: str = ""


def one_line(error: BaseException) -> str:
    """An error as one line: the message of our own errors, type and message of any other."""
    text = " ".join(str(error).split())
    is_ours = type(error).__module__.startswith("mechcausal.")
    return text if is_ours and text else f"{type(error).__name__}: {text}"
