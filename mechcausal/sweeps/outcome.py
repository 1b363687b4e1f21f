"""How a member of a sweep ended."""

from dataclasses import dataclass

from mechcausal.records.run_folder import State


@dataclass(frozen=True)
class Outcome:
    """How a member ended.

    Attributes:
        state: finished, interrupted (it can be resumed) or failed.
        error: what went wrong, one line; empty where nothing did.
    """

    state: State
    error: str = ""
