"""Iterative causal discovery (ICD), and its form for tokens in causal order (OrdICD)."""

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
    """What a search found out.

    Attributes:
        pag: the graph over the variables 0, 1, ….
        separating_sets: by pair without an edge, the smaller first: the set that separated it.
        tests: how many tests of independence were asked for; none is asked twice.
        complete: whether the search came to its end: no larger set was left to condition on.
        reached: the size of conditioning sets up to which all tests were made; None for none.
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
    """Search for the graph by conditioning sets of growing size, orienting it after each size.

    It starts with an edge between all pairs. For r = 0, 1, 2, … every pair that still has an edge
    is tested given its candidate sets of size r (see `Candidates`), the first that separates it
    removes the edge, and the marks are found anew (R0–R4; the rest at the end). Whenever it is
    stopped the graph is sound: it has every true edge, and, up to errors of the tests, no false
    mark.

    Args:
        test: answers whether two variables are independent given others.
        ordered: the variables are in causal order (OrdICD): edges start as earlier o-> later, and
            only earlier variables separate a later one from others.
        stable: test all sets of a size before an edge goes, keep the one with the largest p-value,
            and remove edges together, so that the skeleton does not depend on the order of the
            variables. Costs more tests.
        max_cond: largest conditioning set, None for no limit.
        time_budget: seconds after which to stop, None for no limit.
        selection_bias: see `orient`; the order is then of no use, for what was selected is later
            than all and conditioned on.

    Raises:
        ValueError: `max_cond` or the budget is negative, `ordered` and `selection_bias` are both
            set; or what the test raises.

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
                # Without candidates of this size there are none of a larger one: every candidate
                # set holds smaller ones.
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
            # Half a size says too little for new marks: those of the last whole one hold on.
            pass
        marks = orient(marks, self._separating, selection_bias=self._selection_bias)
        marks[self._skeleton() == NONE] = NONE
        pag = PAG(tuple(range(len(marks))), marks)
        return Found(pag, self._separating, self._tests, complete, size - 1 if size else None)

    def _skeleton(self) -> Marks:
        """What is left of the graph, with circles, and the arrowheads that the order gives."""
        n = self._test.n_variables
        marks = np.where(np.eye(n, dtype=bool), NONE, CIRCLE)
        if self._ordered:
            marks[np.triu_indices(n, 1)] = ARROW
        for i, j in self._separating:
            marks[i, j] = marks[j, i] = NONE
        return marks

    def _remove_edges(self, marks: Marks, size: int) -> bool:
        """Test every edge given its candidates of one size; whether there were any."""
        any_tested = False
        found: dict[tuple[int, int], tuple[int, ...]] = {}
        for x, y in _pairs(marks):
            best = 0.0
            for given in self._candidates(marks, x, y, size):
                any_tested = True
                self._tests += 1
                if self._test.independent(x, y, given):
                    p_value = self._test.p_value(x, y, given) if self._stable else 1.0
                    if p_value > best:
                        best, found[x, y] = p_value, given
                    if not self._stable:
                        marks[x, y] = marks[y, x] = NONE
                        break
            if not self._stable:
                self._separating |= found
        self._separating |= found
        return any_tested

    def _candidates(self, marks: Marks, x: int, y: int, size: int) -> Iterator[tuple[int, ...]]:
        candidates = Candidates(
            marks, ancestors_only=not self._selection_bias, on_each=self._check_time
        )
        seen: set[tuple[int, ...]] = set()
        # The later of two is no ancestor of the earlier, and what can be reached from such a node
        # suffices; elsewhere both ends are tried, or stopping early would not be sound.
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
    """The pairs with an edge, while there is one: edges may go in between."""
    for i, j in combinations(range(len(marks)), 2):
        if marks[i, j] != NONE:
            yield i, j
