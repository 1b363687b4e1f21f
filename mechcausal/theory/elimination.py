"""Exact information in a graph with several parents, given its transition tensors.

Variable elimination: positions are added in order, and the joint table keeps only the frontier,
which is the positions with a child still to come, plus one target position. So the cost is about
`T^2 / 2` tables of S^width entries; k-grams have the width k + 2.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.graphs import CausalGraph


def elimination_width(graph: CausalGraph) -> int:
    """The largest number of positions in one table; a table has up to S^width entries.

    Example:
        >>> from mechcausal.graphs import k_gram, two_parents
        >>> [elimination_width(g) for g in (k_gram(32, 2), two_parents(32))]
        [4, 11]
    """
    # A table holds the frontier, the new position and, if outside of these, the target position.
    sizes = [(len(held), i) for i, held in enumerate(_frontiers(graph))]
    return max(size + 1 + (size < i) for size, i in sizes)


def exact_information(
    graph: CausalGraph, tensors: Mapping[int, Float[Tensor, "prior ... vocab"]]
) -> dict[str, Float[Tensor, "prior ..."]]:
    """Information of every pair of positions, and of every position with all of its parents.

    Args:
        graph: with query parents; the token to be predicted is position n.
        tensors: as `SeveralParentsTask.sample_tensors` returns them, float64.

    Returns:
        "chi2" and "shannon" `[prior pos pos]`, "set_chi2" and "set_shannon" `[prior pos]`.
    """
    rows = _rows(graph)
    n = len(rows)
    frontiers = [*_frontiers(graph), set()]
    first = next(iter(tensors.values()))
    information = {name: first.new_zeros(first.shape[0], n, n) for name in ("chi2", "shannon")}
    information |= {
        f"set_{name}": first.new_zeros(first.shape[0], n) for name in ("chi2", "shannon")
    }
    base, base_held = first.new_ones(first.shape[0]), list[int]()
    for target in range(n):
        joint = _extended(base, base_held, rows[target], tensors)
        held = [*base_held, target]
        if rows[target]:
            with_set = _marginal(joint, held, {*rows[target], target}).flatten(1, -2)
            set_chi2, set_shannon = table_information(with_set)
            information["set_chi2"][:, target] = set_chi2
            information["set_shannon"][:, target] = set_shannon
        base = _marginal(joint, held, frontiers[target + 1])
        base_held = [position for position in held if position in frontiers[target + 1]]
        pairs = [torch.diag_embed(_marginal(joint, held, {target}))]
        for position in range(target + 1, n):
            kept = frontiers[position] | {target}
            joint = _marginal(joint, held, kept)
            held = [h for h in held if h in kept]
            joint = _extended(joint, held, rows[position], tensors)
            held.append(position)
            pairs.append(_marginal(joint, held, {target, position}))
        for name, values in zip(
            ("chi2", "shannon"), table_information(torch.stack(pairs, 1)), strict=True
        ):
            information[name][:, target, target:] = information[name][:, target:, target] = values
    return information


def table_information(
    joint: Float[Tensor, "*any row column"],
) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
    """chi-squared and Shannon information (nats) of joint distributions.

    `sum (P - P_x P_y)^2 / (P_x P_y)` and `sum P log(P / (P_x P_y))`; values of probability 0 add 0.

    Example:
        >>> chi2, shannon = table_information(torch.tensor([[0.5, 0.0], [0.0, 0.5]]))
        >>> round(chi2.item(), 4), round(shannon.item(), 4)  # S - 1, log 2
        (1.0, 0.6931)
    """
    independent = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    floored = independent.clamp(min=torch.finfo(joint.dtype).tiny)
    chi2 = ((joint - independent).square() / floored).sum((-2, -1))
    return chi2, torch.xlogy(joint, joint / floored).sum((-2, -1))


def _rows(graph: CausalGraph) -> tuple[tuple[int, ...], ...]:
    return (*graph.parents, graph.query_parents or ())


def _frontiers(graph: CausalGraph) -> list[set[int]]:
    """For every position, the earlier positions that are parents of it or of a later position."""
    frontiers: list[set[int]] = []
    needed: set[int] = set()
    rows = _rows(graph)
    for position in reversed(range(len(rows))):
        needed = {p for p in needed if p < position} | set(rows[position])
        frontiers.append(needed)
    return frontiers[::-1]


def _extended(
    joint: Tensor, held: Sequence[int], parents: Sequence[int], tensors: Mapping[int, Tensor]
) -> Tensor:
    """The joint table with the next position as its last axis."""
    first = next(iter(tensors.values()))
    size = first.shape[-1]
    if not parents:
        return joint.unsqueeze(-1) * first.new_full((size,), 1 / size)
    law = tensors[len(parents)]
    return joint.unsqueeze(-1) * law.reshape(
        law.shape[0], *(size if position in parents else 1 for position in held), size
    )


def _marginal(joint: Tensor, held: Sequence[int], kept: Collection[int]) -> Tensor:
    axes = [axis for axis, position in enumerate(held, start=1) if position not in kept]
    # `sum([])` sums over all axes.
    return joint.sum(axes) if axes else joint
