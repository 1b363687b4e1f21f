"""Random causal graphs with hidden variables, and the truth about them by d-separation."""

from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import combinations

import networkx as nx
import numpy as np

from probes.causal_discovery.pag import Mark


@cache
def _separated(dag: "nx.DiGraph[int]", one: int, other: int, given: frozenset[int]) -> bool:
    return bool(nx.is_d_separator(dag, {one}, {other}, set(given)))


@dataclass(frozen=True, eq=False)
class LatentDag:
    """A directed acyclic graph of which only some nodes are seen; variable k is `observed[k]`.

    It is an independence test without errors.
    """

    dag: "nx.DiGraph[int]"
    observed: tuple[int, ...]
    asked: set[tuple[int, int, tuple[int, ...]]] = field(default_factory=set)

    @property
    def n_variables(self) -> int:
        return len(self.observed)

    def separated(self, i: int, j: int, given: tuple[int, ...]) -> bool:
        one, other = sorted((self.observed[i], self.observed[j]))
        return _separated(self.dag, one, other, frozenset(self.observed[k] for k in given))

    def p_value(self, i: int, j: int, given: tuple[int, ...]) -> float:
        self.asked.add((min(i, j), max(i, j), tuple(sorted(given))))
        return float(self.separated(i, j, given))

    def independent(self, i: int, j: int, given: tuple[int, ...]) -> bool:
        return self.p_value(i, j, given) > 0.5

    @cached_property
    def is_ancestor(self) -> np.ndarray:
        """`[i, j]`: variable i is an ancestor of variable j."""
        below = [nx.descendants(self.dag, node) for node in self.observed]
        return np.array([[b in nodes for b in self.observed] for nodes in below])

    @cached_property
    def adjacent(self) -> np.ndarray:
        """Pairs that no observed set separates.

        If any does, then the observed ancestors of the two do (`adjacent_by_force` checks it).
        """
        n = self.n_variables
        adjacent = np.zeros((n, n), dtype=bool)
        for i, j in combinations(range(n), 2):
            above = self.is_ancestor[:, i] | self.is_ancestor[:, j]
            given = tuple(k for k in np.flatnonzero(above) if k not in (i, j))
            adjacent[i, j] = adjacent[j, i] = not self.separated(i, j, given)
        return adjacent

    def adjacent_by_force(self) -> np.ndarray:
        """The same by asking for every set."""
        n = self.n_variables
        adjacent = np.zeros((n, n), dtype=bool)
        for i, j in combinations(range(n), 2):
            others = [k for k in range(n) if k not in (i, j)]
            sets = (s for size in range(n - 1) for s in combinations(others, size))
            adjacent[i, j] = adjacent[j, i] = not any(self.separated(i, j, s) for s in sets)
        return adjacent

    def false_marks(self, marks: np.ndarray) -> tuple[int, int]:
        """Arrowheads at ancestors of the other end, and tails at nodes that are none."""
        heads = int(((marks == Mark.ARROW) & self.is_ancestor.T).sum())
        tails = int(((marks == Mark.TAIL) & ~self.is_ancestor.T).sum())
        return heads, tails


def latent_dag(seed: int, *, observed: int | None = None) -> LatentDag:
    """A random DAG of 8 to 12 nodes with 2 to 4 hidden ones; variables are in causal order.

    Calls with the same arguments share the answers about d-separation, but not `asked`.
    """
    return LatentDag(*_random_dag(seed, observed))


@cache
def _random_dag(seed: int, observed: int | None) -> "tuple[nx.DiGraph[int], tuple[int, ...]]":
    source = np.random.default_rng(seed)
    n_observed = int(source.integers(6, 10)) if observed is None else observed
    n = n_observed + int(source.integers(2, 5))
    degree = source.uniform(2.0, 4.0)
    edges = np.triu(source.random((n, n)) < degree / (n - 1), 1)
    dag = nx.DiGraph()
    dag.add_nodes_from(range(n))
    dag.add_edges_from((int(i), int(j)) for i, j in np.argwhere(edges))
    # Hiding a node with two effects is what makes a common cause hidden.
    forks = [node for node in dag if dag.out_degree(node) > 1]
    source.shuffle(forks)
    rest = [node for node in source.permutation(n) if node not in forks]
    hidden = {int(node) for node in [*forks, *rest][: n - n_observed]}
    return dag, tuple(node for node in range(n) if node not in hidden)


def attention_with_sink(
    n: int, *, strength: float = 8.0, spread: float = 1.0, seed: int = 0, causal: bool = True
) -> np.ndarray:
    """A random attention pattern whose first key gets `strength` on top of its logits."""
    scores = spread * np.random.default_rng(seed).normal(size=(n, n))
    scores[:, 0] += strength
    if causal:
        scores[np.triu_indices(n, 1)] = -np.inf
    pattern = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(pattern / pattern.sum(1, keepdims=True))
