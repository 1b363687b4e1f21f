"""Orientation rules of Zhang (2008): from a skeleton and its separating sets to a PAG.

`marks[i, j]` is the mark at j of the edge i–j. After R0 (the colliders), rules replace only
circles: if noisy tests lead to contradicting marks, the first mark stays.
"""

from collections import deque
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Int

from probes.causal_discovery.pag import Mark

Marks = Int[np.ndarray, "node node"]
SeparatingSets = Mapping[tuple[int, int], tuple[int, ...]]
"""The separating set of each pair of variables, smaller index first."""

NONE, CIRCLE, ARROW, TAIL = (int(mark) for mark in Mark)


def orient(start: Marks, separating: SeparatingSets, *, tails: bool = True) -> Marks:
    """Apply the rules until none applies.

    R0–R4 give the arrowheads and some tails, R8–R10 the remaining tails. R5–R7 are left out: they
    apply only under selection bias.

    Args:
        start: the skeleton, with circles at all ends except for arrowheads known in advance.
        separating: the separating set of each pair without an edge.
        tails: whether to apply R8–R10.

    Returns:
        New marks; `start` is unchanged.

    Source: Zhang 2008, section 3, with R9 and R10 on uncovered possibly directed paths.
    """
    marks = np.array(start)
    _unshielded_colliders(marks, separating)
    while True:
        before = marks.copy()
        _until_stable(marks, separating)
        if tails:
            _rule8(marks)
            _rules9_and_10(marks)
        if (marks == before).all():
            return marks


def separates(separating: SeparatingSets, i: int, j: int, node: int) -> bool:
    """Whether a node is in the set that separated i and j."""
    return node in separating[min(i, j), max(i, j)]


def possibly_directed(marks: Marks) -> Bool[np.ndarray, "node node"]:
    """`[i, j]`: whether an edge may point from i to j: no arrowhead at i and no tail at j."""
    return np.asarray((marks != NONE) & (marks != TAIL) & (marks.T != ARROW))


def _unshielded_colliders(marks: Marks, separating: SeparatingSets) -> None:
    """R0: a *-* c *-* b without an edge a–b, c not in Sep(a, b): a *→ c ←* b."""
    adjacent = marks != NONE
    for a, b in np.argwhere(np.triu(~adjacent, 1)):
        for c in np.flatnonzero(adjacent[a] & adjacent[b]):
            if not separates(separating, int(a), int(b), int(c)):
                marks[a, c] = marks[b, c] = ARROW


def _until_stable(marks: Marks, separating: SeparatingSets) -> None:
    while True:
        before = marks.copy()
        _rule1(marks)
        _rule2(marks)
        _rule3(marks)
        if (marks == before).all():
            # R4 is the slowest rule, so it runs only when the others are done.
            _rule4(marks, separating)
            if (marks == before).all():
                return


def _fill(marks: Marks, where: Bool[np.ndarray, "node node"], mark: int) -> None:
    marks[where & (marks == CIRCLE)] = mark


def _not_adjacent(marks: Marks) -> Bool[np.ndarray, "node node"]:
    not_adjacent = marks == NONE
    np.fill_diagonal(not_adjacent, False)
    return np.asarray(not_adjacent)


def _directed(marks: Marks) -> Bool[np.ndarray, "node node"]:
    return np.asarray((marks == ARROW) & (marks.T == TAIL))


def _rule1(marks: Marks) -> None:
    """R1: a *→ b o-* c without an edge a–c: b → c."""
    into = marks == ARROW
    leaves = (into.T @ _not_adjacent(marks)) & (marks.T == CIRCLE)
    _fill(marks, leaves, ARROW)
    _fill(marks, leaves.T, TAIL)


def _rule2(marks: Marks) -> None:
    """R2: a → b *→ c or a *→ b → c, and a *-o c: a *→ c."""
    into, directed = marks == ARROW, _directed(marks)
    _fill(marks, (directed @ into) | (into @ directed), ARROW)


def _rule3(marks: Marks) -> None:
    """R3: a *→ b ←* c, a *-o d o-* c, no edge a–c, d *-o b: d *→ b."""
    not_adjacent = _not_adjacent(marks)
    for d, b in np.argwhere(marks == CIRCLE):
        candidates = np.flatnonzero((marks[:, b] == ARROW) & (marks[:, d] == CIRCLE))
        if not_adjacent[np.ix_(candidates, candidates)].any():
            marks[d, b] = ARROW


def _rule4(marks: Marks, separating: SeparatingSets) -> None:
    """R4: a discriminating path d … a, b, c for b, and b o-* c: b → c if b is in Sep(d, c).

    Otherwise a ↔ b ↔ c.
    """
    for c, b in np.argwhere(marks == CIRCLE):
        if marks[c, b] != CIRCLE:
            continue
        ends = _discriminated(marks, int(b), int(c))
        if ends is None:
            continue
        first, before = ends
        if separates(separating, first, int(c), int(b)):
            marks[c, b] = TAIL
            if marks[b, c] == CIRCLE:
                marks[b, c] = ARROW
        else:
            marks[c, b] = ARROW
            for start, end in ((b, c), (before, b)):
                if marks[start, end] == CIRCLE:
                    marks[start, end] = ARROW


def _discriminated(marks: Marks, b: int, c: int) -> tuple[int, int] | None:
    """The first node, and the node before b, of a shortest discriminating path for b and c."""
    parents_of_c = _directed(marks)[:, c]
    adjacent_to_c = marks[c] != NONE
    into = marks == ARROW
    starts = np.flatnonzero(parents_of_c & into[b])
    queue = deque((int(a), int(a)) for a in starts if a != b)
    seen = {a for a, _ in queue}
    while queue:
        node, last = queue.popleft()
        for previous in map(int, np.flatnonzero(into[:, node])):
            if previous in (b, c):
                continue
            if not adjacent_to_c[previous]:
                return previous, last
            if previous not in seen and parents_of_c[previous] and into[node, previous]:
                seen.add(previous)
                queue.append((previous, last))
    return None


def _rule8(marks: Marks) -> None:
    """R8: a → b → c, and a o→ c: a → c. Without R5–R7 no edge a -o b arises."""
    directed = _directed(marks)
    half = (marks == ARROW) & (marks.T == CIRCLE)
    marks.T[(directed @ directed) & half] = TAIL


def _rules9_and_10(marks: Marks) -> None:
    """R9 and R10: a o→ c becomes a → c.

    R9: an uncovered possibly directed path a, b, …, c without an edge b–c. R10: b → c ← d, and
    uncovered possibly directed paths from a to b and from a to d whose second nodes are not
    adjacent.
    """
    not_adjacent, may_point = _not_adjacent(marks), possibly_directed(marks)
    for a, c in np.argwhere((marks == ARROW) & (marks.T == CIRCLE)):
        seconds = [int(b) for b in np.flatnonzero(may_point[a]) if b != c]
        parents = {int(p) for p in np.flatnonzero(_directed(marks)[:, c])}
        leading_to_parents = []
        for second in seconds:
            reached = _uncovered_reach(not_adjacent, may_point, int(a), second, end=int(c))
            if not_adjacent[second, c] and c in reached:
                marks[c, a] = TAIL
                break
            if parents & (reached - {int(c)}):
                leading_to_parents.append(second)
        if not_adjacent[np.ix_(leading_to_parents, leading_to_parents)].any():
            marks[c, a] = TAIL


def _uncovered_reach(
    not_adjacent: Bool[np.ndarray, "node node"],
    may_point: Bool[np.ndarray, "node node"],
    first: int,
    second: int,
    *,
    end: int,
) -> set[int]:
    """The nodes on uncovered possibly directed paths `first, second, …`, which stop at `end`."""
    seen = {(first, second)}
    queue = deque(seen)
    while queue:
        previous, node = queue.popleft()
        if node == end:
            continue
        for following in np.flatnonzero(may_point[node] & not_adjacent[previous]):
            edge = (node, int(following))
            if following != first and edge not in seen:
                seen.add(edge)
                queue.append(edge)
    return {node for _, node in seen}
