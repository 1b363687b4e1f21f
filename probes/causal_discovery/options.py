"""The options of a search for the causal graph of an input's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict, get_args

Sink: TypeAlias = Literal["node", "conditioned"]
Engine: TypeAlias = Literal["icd", "fci", "pc"]


class SearchKeywords(TypedDict, total=False):
    """The fields of `SearchOptions` as keyword arguments, for type checkers."""

    n_eff: float | int | None
    alpha: float
    ordered: bool | None
    sink: Sink
    sink_position: int
    positions: Sequence[int] | None
    engine: Engine
    stable: bool
    max_cond: int | None
    time_budget: float | None


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of a search; `discover` and `explain` take them as keyword arguments.

    Attributes:
        n_eff: effective number of samples in the tests; None: the head's `d_head`. One forward
            pass has no samples: n_eff only sets the sparsity, and a larger one keeps more edges.
            Compare several values.
        alpha: significance level of the tests; a smaller one keeps fewer edges.
        ordered: whether token order is causal order (OrdICD): edges start as earlier o-> later, and
            only tokens before the later one of a pair can separate it. None: True if no token
            attends to a later one.
        sink: "node" treats the attention sink as any token; "conditioned" conditions on it and
            removes it.
        sink_position: position of the sink; used with "conditioned".
        positions: the tokens that become nodes; None: all. The others are hidden variables.
        engine: "icd", or causal-learn's "fci" or "pc" as a check; these ignore token order and
            accept none of `ordered`, `stable` and `time_budget`.
        stable: test all sets of a size before removing any edge, and keep for each pair the set
            with the largest p-value. The skeleton then does not depend on the order of the
            variables; costs more tests.
        max_cond: largest conditioning set, below n_eff − 3; None: no limit.
        time_budget: seconds after which the search stops with a sound partial graph; None: no
            limit.

    Raises:
        ValueError: an unknown sink or engine, or an option that the engine does not have.
    """

    n_eff: float | int | None = None
    alpha: float = 0.01
    ordered: bool | None = None
    sink: Sink = "node"
    sink_position: int = 0
    positions: Sequence[int] | None = None
    engine: Engine = "icd"
    stable: bool = False
    max_cond: int | None = None
    time_budget: float | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("sink", self.sink, get_args(Sink)),
            ("engine", self.engine, get_args(Engine)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        if self.engine == "icd":
            return
        has_icd_option = {
            "ordered": bool(self.ordered),
            "stable": self.stable,
            "time_budget": self.time_budget is not None,
        }
        for name, is_given in has_icd_option.items():
            if is_given:
                raise ValueError(f"{name} goes with engine 'icd', not {self.engine!r}")
