"""Which sets of nodes may separate two others: the candidates of iterative causal discovery."""

from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
from jaxtyping import Bool

from probes.causal_discovery.orientation import ARROW, NONE, Marks, possibly_directed


class Candidates:
    """Separating sets of any size for the pairs of one graph, smallest detour first.

    A set S is a candidate for (x, y) if every member is a possible ancestor of x or y, and is
    reached from x by a possible-d-sep path inside S that avoids y: of each three nodes in a row the
    middle one is a collider, or the three are a triangle. A path inside S is no longer than |S|.

    Args:
        marks: the graph; removing edges from it afterwards is seen by the next call.
        ancestors_only: leave out the condition on ancestors where it is False (selection bias: what
            is conditioned on may be an ancestor of the selection instead).

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
        """The candidate sets of one size with paths from x, each in ascending order."""
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
        steps = self._steps(x, allowed, adjacent, passable, size)
        near = {node for node, distance in steps.items() if distance == 1}
        nodes = sorted(steps, key=lambda node: (steps[node], node))
        for chosen in combinations(nodes, size):
            self._on_each()
            far = set(chosen) - near
            if not far or self._connected(x, chosen, far, adjacent, passable):
                yield tuple(sorted(chosen))

    def _possible_ancestors(self, x: int, y: int) -> Bool[np.ndarray, "node"]:
        may_point = possibly_directed(self._marks)
        found = np.zeros(len(may_point), dtype=bool)
        found[[x, y]] = True
        while True:
            more = found | (may_point & found).any(1)
            if (more == found).all():
                return found
            found = more

    def _passable(self, adjacent: Bool[np.ndarray, "node node"]) -> Bool[np.ndarray, "u v w"]:
        """`[u, v, w]`: the middle of u, v, w is a collider, or the three are a triangle."""
        into = self._marks == ARROW
        collider = into[:, :, None] & into.T[None, :, :]
        triangle = adjacent[:, None, :]
        return np.asarray(adjacent[:, :, None] & adjacent[None] & (collider | triangle))

    @staticmethod
    def _steps(
        x: int,
        allowed: Bool[np.ndarray, "node"],
        adjacent: Bool[np.ndarray, "node node"],
        passable: Bool[np.ndarray, "u v w"],
        size: int,
    ) -> dict[int, int]:
        """Edges on the shortest path from x to each node within `size` of them."""
        states = np.zeros_like(adjacent)
        states[x] = adjacent[x] & allowed
        steps = {int(node): 1 for node in np.flatnonzero(states[x])}
        seen = states.copy()
        for distance in range(2, size + 1):
            onward = (states[:, :, None] & passable).any(0) & allowed[None, :]
            states = onward & ~seen
            if not states.any():
                break
            seen |= states
            for node in np.flatnonzero(states.any(0)):
                steps.setdefault(int(node), distance)
        return steps

    @staticmethod
    def _connected(
        x: int,
        chosen: tuple[int, ...],
        far: set[int],
        adjacent: Bool[np.ndarray, "node node"],
        passable: Bool[np.ndarray, "u v w"],
    ) -> bool:
        """Whether paths inside the chosen set lead to all of it that is not next to x."""
        pending = [(x, node) for node in chosen if adjacent[x, node]]
        seen = set(pending)
        while pending and far:
            before, here = pending.pop()
            far = far - {here}
            for there in chosen:
                step = (here, there)
                if passable[before, here, there] and step not in seen:
                    seen.add(step)
                    pending.append(step)
        return not far
