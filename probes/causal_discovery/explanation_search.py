"""The orders in which explanations try sets of tokens: the causal search and its controls."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations, islice

import torch

from probes.causal_discovery.counterfactuals import Counterfactuals, Outcome
from probes.causal_discovery.pag import PAG


def shells(
    graphs: Sequence[PAG], node: int, weights: Mapping[int, float]
) -> tuple[tuple[int, ...], ...]:
    """Group candidates by their distance from a node, minimal over the graphs.

    Args:
        graphs: one graph per head, over the node and the candidates.
        node: the prediction's node.
        weights: by candidate; heavier candidates come first within a shell.

    Returns:
        Shells, nearest first; the last one holds candidates that no graph connects to the node.

    >>> import numpy as np
    >>> chain_graph = PAG((0, 1, 2, 3), np.diag([1, 1, 0], 1) + np.diag([1, 1, 0], -1))
    >>> shells([chain_graph], 2, {0: 0.1, 1: 0.2, 3: 0.7})
    ((1,), (0,), (3,))
    """
    by_graph = [graph.distances(node) for graph in graphs]
    unreachable = len(weights) + 1
    nearest = {c: min(distances.get(c, unreachable) for distances in by_graph) for c in weights}
    return tuple(
        tuple(sorted((c for c in nearest if nearest[c] == d), key=lambda c: (-weights[c], c)))
        for d in sorted(set(nearest.values()))
    )


def search(runs: Counterfactuals, rings: Sequence[Sequence[int]], max_size: int) -> Outcome | None:
    """Try sets outwards; when the budget runs low, grow one set and shrink it again.

    The growing set adds the members of the rings in order; shrinking drops one member at a time.
    Growing and shrinking get half the budget, or two calls per candidate if that is less.
    """
    order = list(chain.from_iterable(rings))
    change = runs.first_change(outwards(rings, max_size), keep=min(runs.left // 2, 2 * len(order)))
    if change is not None:
        return change
    change = runs.first_change(prefixes(order, max_size))
    if change is not None:
        for position in reversed(order):
            if position in change.positions and len(change.positions) > 1:
                smaller = tuple(p for p in change.positions if p != position)
                change = runs.first_change([smaller]) or change
    return change


def outwards(rings: Sequence[Sequence[int]], max_size: int) -> Iterator[tuple[int, ...]]:
    """All sets up to a size, ordered by size + distance; of equal cost, the smaller set first.

    The distance of a set is that of its farthest member. Trading size against distance keeps both
    large neighbourhoods and long sequences from using up the budget.

    >>> list(outwards([[5], [2, 3]], 2))
    [(5,), (2,), (3,), (5, 2), (5, 3), (2, 3)]
    """
    for cost in range(1, max_size + len(rings)):
        for size in range(1, min(cost, max_size) + 1):
            distance = cost - size
            if distance < len(rings):
                yield from _reaching(rings, distance, size)


def _reaching(
    rings: Sequence[Sequence[int]], distance: int, size: int
) -> Iterator[tuple[int, ...]]:
    """Sets of one size whose farthest member is in the ring at `distance`."""
    inner, ring = list(chain.from_iterable(rings[:distance])), rings[distance]
    for n_inner in range(size - 1, -1, -1):
        for near in combinations(inner, n_inner):
            for far in combinations(ring, size - n_inner):
                yield (*near, *far)


def shuffled(
    rings: Sequence[Sequence[int]], generator: torch.Generator
) -> tuple[tuple[int, ...], ...]:
    """Rings of the same sizes, with all members shuffled."""
    members = list(chain.from_iterable(rings))
    order = torch.randperm(len(members), generator=generator, device=generator.device).tolist()
    drawn = iter(members[i] for i in order)
    return tuple(tuple(islice(drawn, len(ring))) for ring in rings)


def by_size(candidates: Sequence[int], max_size: int) -> Iterator[tuple[int, ...]]:
    """All sets up to a size, smaller first."""
    for size in range(1, min(max_size, len(candidates)) + 1):
        yield from combinations(candidates, size)


def prefixes(order: Sequence[int], max_size: int) -> Iterator[tuple[int, ...]]:
    """The first position, the first two, and so on.

    >>> list(prefixes([4, 0, 2], 2))
    [(4,), (4, 0)]
    """
    for size in range(1, min(max_size, len(order)) + 1):
        yield tuple(order[:size])


def occlusion(runs: Counterfactuals, candidates: Sequence[int], max_size: int) -> Outcome | None:
    """Replace every token alone, then the tokens with the largest effects together.

    The effect of a token is how much its replacement lowers the prediction's log-probability.
    """
    outcomes = list(runs.outcomes((position,) for position in candidates))
    changed = [outcome for outcome in outcomes if outcome.prediction != runs.prediction]
    if changed:
        return min(changed, key=lambda outcome: outcome.log_probability)
    outcomes.sort(key=lambda outcome: outcome.log_probability)
    order = [outcome.positions[0] for outcome in outcomes]
    return runs.first_change(prefixes(order, max_size))
