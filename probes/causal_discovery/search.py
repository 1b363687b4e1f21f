"""Iterative causal discovery (ICD), and its variant for tokens in causal order (OrdICD)."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool

from probes.causal_discovery.independence import IndependenceTest
from probes.causal_discovery.orientation import (
    ARROW,
    CIRCLE,
    NONE,
    Marks,
    orient,
    possibly_directed,
)
from probes.causal_discovery.pag import PAG


@dataclass(frozen=True)
class SearchResult:
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
) -> SearchResult:
    """Search for the graph with conditioning sets of growing size, orienting it after each size.

    The search starts with an edge between all pairs. For r = 0, 1, 2, … it tests every pair that
    still has an edge given its candidate sets of size r (see `candidate_sets`). It removes the edge
    at the first set that separates the pair, then orients the graph again (R0–R4; the other rules
    at the end). A search stopped early returns a sound graph: up to errors of the tests, it has
    every true edge and no false mark.

    Args:
        test: the test of conditional independence.
        ordered: whether the variables are in causal order, see `SearchOptions`.
        stable: see `SearchOptions`.
        max_cond: see `SearchOptions`.
        time_budget: see `SearchOptions`.

    Raises:
        ValueError: `max_cond` or `time_budget` is negative, or the test raises it.

    Source: Rohekar et al. 2021 (ICD), 2023 (causal attention); Spirtes 2001 for stopping early.
    """
    if max_cond is not None and max_cond < 0:
        raise ValueError(f"max_cond is {max_cond}; it must be at least 0")
    if time_budget is not None and not time_budget >= 0:
        raise ValueError(f"time_budget is {time_budget:g}; it must be at least 0 seconds")
    deadline = math.inf if time_budget is None else time.monotonic() + time_budget
    search = _Search(test, ordered, stable, deadline)
    return search.run(math.inf if max_cond is None else max_cond)


class _OutOfTimeError(Exception):
    pass


class _Search:
    def __init__(
        self, test: IndependenceTest, ordered: bool, stable: bool, deadline: float
    ) -> None:
        self._test = test
        self._ordered = ordered
        self._stable = stable
        self._deadline = deadline
        self._separating: dict[tuple[int, int], tuple[int, ...]] = {}
        self._tests = 0

    def run(self, max_cond: float | int) -> SearchResult:
        marks = self._skeleton()
        size, complete = 0, False
        try:
            while size <= max_cond and not complete:
                # Every candidate set contains smaller ones, so if this size has none, larger sizes
                # have none either.
                complete = not self._remove_edges(marks.copy(), size)
                if not complete:
                    marks = orient(self._skeleton(), self._separating, tails=False)
                    size += 1
            complete = complete or not self._has_candidates(marks, size)
        except _OutOfTimeError:
            # Keep the marks of the last completed size; this size's tests are incomplete.
            pass
        marks = orient(marks, self._separating)
        marks[self._skeleton() == NONE] = NONE
        pag = PAG(tuple(range(len(marks))), marks)
        return SearchResult(
            pag, self._separating, self._tests, complete, size - 1 if size else None
        )

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
        # With `stable`, a size that runs out of time removes no edge.
        separating: dict[tuple[int, int], tuple[int, ...]] = (
            {} if self._stable else self._separating
        )
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
        self._separating |= separating
        return any_tested

    def _candidates(self, marks: Marks, x: int, y: int, size: int) -> Iterator[tuple[int, ...]]:
        seen: set[tuple[int, ...]] = set()
        # Paths from the end that is not an ancestor of the other suffice; the order tells that it
        # is the later one. Without an order both ends are tried, so that stopping early is sound.
        starts = ((y, x),) if self._ordered else ((x, y), (y, x))
        for start, end in starts:
            for given in candidate_sets(marks, start, end, size, on_each=self._check_time):
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


def candidate_sets(
    marks: Marks, x: int, y: int, size: int, *, on_each: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, ...]]:
    """Candidate separating sets of one size for a pair; sets nearest to x come first.

    A set S is a candidate for (x, y) if every member is a possible ancestor of x or y, and a
    possible-d-sep path inside S leads to it from x and avoids y. On such a path, the middle one of
    any three consecutive nodes is a collider, or the three form a triangle.

    Args:
        marks: the graph.
        x: the variable from which the paths lead.
        y: the other variable of the pair.
        size: number of members.
        on_each: called before each candidate is examined, for time limits.

    Yields:
        The candidate sets, each sorted.

    Source: Rohekar et al. 2021, "Iterative causal discovery in the possible presence of latent
    confounders and selection bias" (the ICD-Sep conditions).
    """
    if size == 0:
        on_each()
        yield ()
        return
    adjacent = marks != NONE
    allowed = _possible_ancestors(marks, x, y)
    allowed[[x, y]] = False
    passable = _passable(marks)
    distances = _distances(x, allowed, adjacent, passable, size)
    near = {node for node, distance in distances.items() if distance == 1}
    nodes = sorted(distances, key=lambda node: (distances[node], node))
    for chosen in combinations(nodes, size):
        on_each()
        far = set(chosen) - near
        if not far or _connected(x, chosen, far, adjacent, passable):
            yield tuple(sorted(chosen))


def _possible_ancestors(marks: Marks, x: int, y: int) -> Bool[np.ndarray, "node"]:
    may_point = possibly_directed(marks)
    ancestors = np.zeros(len(may_point), dtype=bool)
    ancestors[[x, y]] = True
    while True:
        more = ancestors | (may_point & ancestors).any(1)
        if (more == ancestors).all():
            return ancestors
        ancestors = more


def _passable(marks: Marks) -> Bool[np.ndarray, "u v w"]:
    """`[u, v, w]`: whether v is a collider on u, v, w, or the three form a triangle."""
    adjacent, into = marks != NONE, marks == ARROW
    collider = into[:, :, None] & into.T[None, :, :]
    triangle = adjacent[:, None, :]
    return np.asarray(adjacent[:, :, None] & adjacent[None] & (collider | triangle))


def _distances(
    x: int,
    allowed: Bool[np.ndarray, "node"],
    adjacent: Bool[np.ndarray, "node node"],
    passable: Bool[np.ndarray, "u v w"],
    size: int,
) -> dict[int, int]:
    """The number of edges from x to every node at most `size` edges away."""
    # frontier[u, v]: a path of the current length ends with the edge from u to v.
    frontier = np.zeros_like(adjacent)
    frontier[x] = adjacent[x] & allowed
    distances = {int(node): 1 for node in np.flatnonzero(frontier[x])}
    seen = frontier.copy()
    for distance in range(2, size + 1):
        longer = (frontier[:, :, None] & passable).any(0) & allowed[None, :]
        frontier = longer & ~seen
        if not frontier.any():
            break
        seen |= frontier
        for node in np.flatnonzero(frontier.any(0)):
            distances.setdefault(int(node), distance)
    return distances


def _connected(
    x: int,
    chosen: tuple[int, ...],
    far: set[int],
    adjacent: Bool[np.ndarray, "node node"],
    passable: Bool[np.ndarray, "u v w"],
) -> bool:
    """Whether paths inside the chosen set lead from x to all of its `far` members."""
    pending = [(x, node) for node in chosen if adjacent[x, node]]
    seen = set(pending)
    while pending and far:
        previous, node = pending.pop()
        far = far - {node}
        for following in chosen:
            edge = (node, following)
            if passable[previous, node, following] and edge not in seen:
                seen.add(edge)
                pending.append(edge)
    return not far
