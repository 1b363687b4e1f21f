"""Iterative causal discovery (ICD), and its variant for tokens in causal order (OrdICD)."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from probes.causal_discovery.candidates import Candidates
from probes.causal_discovery.independence import IndependenceTest
from probes.causal_discovery.orientation import ARROW, CIRCLE, NONE, Marks, orient
from probes.causal_discovery.pag import PAG


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        pag: the graph over the variables 0, 1, ….
        separating_sets: the separating set of each pair without an edge, smaller index first.
        tests: number of independence tests; none is made twice.
        complete: whether the search finished: no larger conditioning set was left to test.
        reached: the largest size of conditioning sets fully tested; None for none.
    """

    pag: PAG
    separating_sets: dict[tuple[int, int], tuple[int, ...]]
    tests: int
    complete: bool
    reached: int | None


def icd(
    test: IndependenceTest,
    *,
    ordered: bool = False,
    stable: bool = False,
    max_cond: int | None = None,
    time_budget: float | None = None,
    selection_bias: bool = False,
) -> Found:
    """Search for the graph with conditioning sets of growing size, orienting it after each size.

    The search starts with an edge between all pairs. For r = 0, 1, 2, … it tests every pair that
    still has an edge given its candidate sets of size r (see `Candidates`), removes the edge at the
    first set that separates the pair, then orients the graph again (R0–R4; the other rules at the
    end). A search stopped early returns a sound graph: up to errors of the tests, it has every true
    edge and no false mark.

    Args:
        test: the test of conditional independence.
        ordered: the variables are in causal order (OrdICD): edges start as earlier o-> later, and
            only variables before the later one of a pair can separate it.
        stable: test all sets of a size before removing any edge, and keep for each pair the set
            with the largest p-value. The skeleton then does not depend on the order of the
            variables; costs more tests.
        max_cond: largest conditioning set; default: no limit.
        time_budget: seconds after which to stop; default: no limit.
        selection_bias: see `orient`; excludes `ordered`, since the selection comes after all
            variables and is conditioned on.

    Raises:
        ValueError: `max_cond` or `time_budget` is negative, `ordered` and `selection_bias` are both
            set, or the test raises it.

    Source: Rohekar et al. 2021 (ICD), 2023 (causal attention); Spirtes 2001 for stopping early.
    """
    if max_cond is not None and max_cond < 0:
        raise ValueError(f"max_cond is {max_cond}; it must be at least 0")
    if time_budget is not None and not time_budget >= 0:
        raise ValueError(f"time_budget is {time_budget:g}; it must be at least 0 seconds")
    if ordered and selection_bias:
        raise ValueError("ordered and selection_bias exclude each other: only one of them can hold")
    deadline = math.inf if time_budget is None else time.monotonic() + time_budget
    search = _Search(test, ordered, stable, selection_bias, deadline)
    return search.run(math.inf if max_cond is None else max_cond)


class _OutOfTimeError(Exception):
    pass


class _Search:
    def __init__(
        self,
        test: IndependenceTest,
        ordered: bool,
        stable: bool,
        selection_bias: bool,
        deadline: float,
    ) -> None:
        self._test = test
        self._ordered = ordered
        self._stable = stable
        self._selection_bias = selection_bias
        self._deadline = deadline
        self._separating: dict[tuple[int, int], tuple[int, ...]] = {}
        self._tests = 0

    def run(self, max_cond: float | int) -> Found:
        marks = self._skeleton()
        size, complete = 0, False
        try:
            while size <= max_cond and not complete:
                # Every candidate set contains smaller ones, so if this size has none, larger sizes
                # have none either.
                complete = not self._remove_edges(marks.copy(), size)
                if not complete:
                    marks = orient(
                        self._skeleton(),
                        self._separating,
                        tails=False,
                        selection_bias=self._selection_bias,
                    )
                    size += 1
            complete = complete or not self._has_candidates(marks, size)
        except _OutOfTimeError:
            # Keep the marks of the last completed size; this size's tests are incomplete.
            pass
        marks = orient(marks, self._separating, selection_bias=self._selection_bias)
        marks[self._skeleton() == NONE] = NONE
        pag = PAG(tuple(range(len(marks))), marks)
        return Found(pag, self._separating, self._tests, complete, size - 1 if size else None)

    def _skeleton(self) -> Marks:
        """The remaining edges, with circles, and arrowheads where the order gives them."""
        n = self._test.n_variables
        marks = np.where(np.eye(n, dtype=bool), NONE, CIRCLE)
        if self._ordered:
            marks[np.triu_indices(n, 1)] = ARROW
        for i, j in self._separating:
            marks[i, j] = marks[j, i] = NONE
        return marks

    def _remove_edges(self, marks: Marks, size: int) -> bool:
        """Test every edge given its candidates of one size; return whether there were any."""
        any_tested = False
        separating: dict[tuple[int, int], tuple[int, ...]] = {}
        for x, y in _pairs(marks):
            best = 0.0
            for given in self._candidates(marks, x, y, size):
                any_tested = True
                self._tests += 1
                if self._test.independent(x, y, given):
                    p_value = self._test.p_value(x, y, given) if self._stable else 1.0
                    if p_value > best:
                        best, separating[x, y] = p_value, given
                    if not self._stable:
                        marks[x, y] = marks[y, x] = NONE
                        break
            if not self._stable:
                self._separating |= separating
        self._separating |= separating
        return any_tested

    def _candidates(self, marks: Marks, x: int, y: int, size: int) -> Iterator[tuple[int, ...]]:
        candidates = Candidates(
            marks, ancestors_only=not self._selection_bias, on_each=self._check_time
        )
        seen: set[tuple[int, ...]] = set()
        # Paths from the end that is not an ancestor of the other suffice; the order tells that it
        # is the later one. Without an order both ends are tried, so that stopping early is sound.
        starts = ((y, x),) if self._ordered else ((x, y), (y, x))
        for start, end in starts:
            for given in candidates.of(start, end, size):
                if given not in seen:
                    seen.add(given)
                    yield given

    def _has_candidates(self, marks: Marks, size: int) -> bool:
        """Whether any edge could be tested given a set of this size."""
        return any(True for x, y in _pairs(marks) for _ in self._candidates(marks, x, y, size))

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise _OutOfTimeError


def _pairs(marks: Marks) -> Iterator[tuple[int, int]]:
    """The pairs that have an edge when their turn comes; the caller may remove edges meanwhile."""
    for i, j in combinations(range(len(marks)), 2):
        if marks[i, j] != NONE:
            yield i, j
