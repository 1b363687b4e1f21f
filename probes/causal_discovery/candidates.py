"""The candidate separating sets of iterative causal discovery."""

from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
from jaxtyping import Bool

from probes.causal_discovery.orientation import ARROW, NONE, Marks, possibly_directed


class Candidates:
    """Candidate separating sets for the pairs of one graph; sets nearest to x come first.

    A set S is a candidate for (x, y) if every member is a possible ancestor of x or y, and a
    possible-d-sep path inside S leads to it from x and avoids y. On such a path, the middle one of
    any three consecutive nodes is a collider, or the three form a triangle.

    Args:
        marks: the graph; the next call uses its current edges.
        ancestors_only: whether members must be possible ancestors. False under selection bias,
            where a member may be an ancestor of the selection instead.
        on_each: called before each candidate is examined, for time limits.

    Source: Rohekar et al. 2021, "Iterative causal discovery in the possible presence of latent
    confounders and selection bias" (the ICD-Sep conditions).
    """

    def __init__(
        self,
        marks: Marks,
        *,
        ancestors_only: bool = True,
        on_each: Callable[[], None] = lambda: None,
    ) -> None:
        self._marks = marks
        self._ancestors_only = ancestors_only
        self._on_each = on_each

    def of(self, x: int, y: int, size: int) -> Iterator[tuple[int, ...]]:
        """The candidate sets of one size with paths from x, each sorted."""
        if size == 0:
            self._on_each()
            yield ()
            return
        marks = self._marks
        adjacent = marks != NONE
        allowed = self._possible_ancestors(x, y) if self._ancestors_only else np.ones(len(marks))
        allowed = allowed.astype(bool)
        allowed[[x, y]] = False
        passable = self._passable(adjacent)
        distances = self._distances(x, allowed, adjacent, passable, size)
        near = {node for node, distance in distances.items() if distance == 1}
        nodes = sorted(distances, key=lambda node: (distances[node], node))
        for chosen in combinations(nodes, size):
            self._on_each()
            far = set(chosen) - near
            if not far or self._connected(x, chosen, far, adjacent, passable):
                yield tuple(sorted(chosen))

    def _possible_ancestors(self, x: int, y: int) -> Bool[np.ndarray, "node"]:
        may_point = possibly_directed(self._marks)
        ancestors = np.zeros(len(may_point), dtype=bool)
        ancestors[[x, y]] = True
        while True:
            more = ancestors | (may_point & ancestors).any(1)
            if (more == ancestors).all():
                return ancestors
            ancestors = more

    def _passable(self, adjacent: Bool[np.ndarray, "node node"]) -> Bool[np.ndarray, "u v w"]:
        """`[u, v, w]`: whether v is a collider on u, v, w, or the three form a triangle."""
        into = self._marks == ARROW
        collider = into[:, :, None] & into.T[None, :, :]
        triangle = adjacent[:, None, :]
        return np.asarray(adjacent[:, :, None] & adjacent[None] & (collider | triangle))

    @staticmethod
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

    @staticmethod
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
