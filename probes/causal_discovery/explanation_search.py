"""In which order to try sets of tokens: the causal way, and the controls that it has to beat."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations, islice

import torch
from jaxtyping import Float
from torch import Tensor

from probes.causal_discovery.counterfactuals import Counterfactuals, Outcome
from probes.causal_discovery.pag import PAG


def shells(
    graphs: Sequence[PAG], node: int, weights: Mapping[int, float]
) -> tuple[tuple[int, ...], ...]:
    """Candidates by their distance from a node, each in the graph where it is nearest.

    Args:
        graphs: one a head, over the node and the candidates.
        node: the prediction's.
        weights: by candidate; inside a shell the heavier come first.

    Returns:
        The nearest first; those that no graph connects to the node come last.

    >>> import numpy as np
    >>> chain_graph = PAG((0, 1, 2, 3), np.diag([1, 1, 0], 1) + np.diag([1, 1, 0], -1))
    >>> shells([chain_graph], 2, {0: 0.1, 1: 0.2, 3: 0.7})
    ((1,), (0,), (3,))
    """
    found = [graph.distances(node) for graph in graphs]
    beyond = len(weights) + 1
    nearest = {c: min(distances.get(c, beyond) for distances in found) for c in weights}
    levels = sorted(set(nearest.values()))
    return tuple(
        tuple(sorted((c for c in nearest if nearest[c] == d), key=lambda c: (-weights[c], c)))
        for d in levels
    )


def search(runs: Counterfactuals, rings: Sequence[Sequence[int]], max_size: int) -> Outcome | None:
    """Try sets outwards; if that would use up the budget, grow one set and shrink it again.

    The growing set takes the members of the rings in order, and is shrunk by leaving out one member
    at a time. For it half the budget is kept, or two calls a candidate if that is less.
    """
    order = list(chain.from_iterable(rings))
    found = runs.first_change(outwards(rings, max_size), keep=min(runs.left // 2, 2 * len(order)))
    if found is not None:
        return found
    found = runs.first_change(prefixes(order, max_size))
    if found is not None:
        for position in reversed(order):
            if position in found.positions and len(found.positions) > 1:
                rest = tuple(p for p in found.positions if p != position)
                found = runs.first_change([rest]) or found
    return found


def outwards(rings: Sequence[Sequence[int]], max_size: int) -> Iterator[tuple[int, ...]]:
    """Sets in the order of size + distance, the smaller first: every set up to a size, once.

    A larger set is tried before a farther one at the same cost, so that neither a crowded
    neighbourhood nor a long sequence can use up the budget. The distance of a set is that of its
    farthest member.

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
    """Sets of one size whose farthest member lies in one ring."""
    inner, ring = list(chain.from_iterable(rings[:distance])), rings[distance]
    for n_inner in range(size - 1, -1, -1):
        for near in combinations(inner, n_inner):
            for far in combinations(ring, size - n_inner):
                yield (*near, *far)


def shuffled(
    rings: Sequence[Sequence[int]], generator: torch.Generator
) -> tuple[tuple[int, ...], ...]:
    """Rings of the same sizes, their members drawn at random from all of them."""
    members = list(chain.from_iterable(rings))
    order = torch.randperm(len(members), generator=generator, device=generator.device).tolist()
    drawn = iter(members[i] for i in order)
    return tuple(tuple(islice(drawn, len(ring))) for ring in rings)


def by_size(candidates: Sequence[int], max_size: int) -> Iterator[tuple[int, ...]]:
    """All sets, the smaller first."""
    for size in range(1, min(max_size, len(candidates)) + 1):
        yield from combinations(candidates, size)


def prefixes(order: Sequence[int], max_size: int) -> Iterator[tuple[int, ...]]:
    """The first, the first two, and so on.

    >>> list(prefixes([4, 0, 2], 2))
    [(4,), (4, 0)]
    """
    for size in range(1, min(max_size, len(order)) + 1):
        yield tuple(order[:size])


def occlusion(runs: Counterfactuals, candidates: Sequence[int], max_size: int) -> Outcome | None:
    """Every token alone; then the tokens with the largest effect together, more and more.

    The effect of a token is the fall of the prediction's log-probability without it.
    """
    alone = list(runs.outcomes((position,) for position in candidates))
    changed = [outcome for outcome in alone if outcome.prediction != runs.prediction]
    if changed:
        return min(changed, key=lambda outcome: outcome.log_probability)
    alone.sort(key=lambda outcome: outcome.log_probability)
    order = [outcome.positions[0] for outcome in alone]
    return runs.first_change(prefixes(order, max_size))


def attention_by_position(
    attention: Float[Tensor, "head query key"], node: int
) -> Float[Tensor, "key"]:
    """What the node attends to: its row's mean over heads."""
    return attention[:, node].mean(0)
