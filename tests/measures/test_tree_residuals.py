"""Residual χ² of leaves with their sibling blocks, against enumeration."""

import itertools

import pytest
import torch
from torch import Tensor

from mechcausal.measures.tree_residuals import residuals_by_height
from mechcausal.tasks.hierarchy import Grammar, Hierarchy, evidence_of
from tests.oracles import seeded


def probabilities(tree: Hierarchy) -> Tensor:
    """The joint distribution of all leaves, by summing over every symbol of the tree."""
    q = tree.grammar.n_symbols
    below = torch.eye(q, dtype=torch.float64)  # of a node's leaves, given its symbol
    for _ in range(tree.depth):
        below = torch.einsum("rst,sa,tb->rab", tree.grammar.rules, below, below).flatten(1)
    return below.mean(0).view((q,) * tree.n_leaves)


def leave_one_out(tree: Hierarchy, leaves: Tensor) -> Tensor:
    """The posterior of each leaf given all others."""
    return tree.infer(evidence_of(leaves, tree.grammar.n_symbols)).leaves


def chi2(joint: Tensor) -> float:
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return (joint.square() / independent).nan_to_num().sum().item() - 1


def test_a_model_of_single_leaves_leaves_all_the_information() -> None:
    tree = Hierarchy(Grammar.random(3, generator=seeded(1), sigma=1.0), depth=2)
    joint = probabilities(tree)
    assert joint.sum() == pytest.approx(1.0)
    information: dict[tuple[int, str], list[float]] = {}
    for leaf, sibling in itertools.permutations(range(4), 2):
        height = (leaf ^ sibling).bit_length()
        others = [axis for axis in range(4) if axis not in (leaf, sibling)]
        pair = joint.sum(others)
        information.setdefault((height, "pair"), []).append(chi2(pair))
    for leaf in range(4):
        with_block = joint.sum(leaf ^ 1)  # the other leaf below the same parent does not count
        first = with_block.movedim(leaf if leaf < leaf ^ 1 else leaf - 1, 0)
        information.setdefault((2, "block"), []).append(chi2(first.flatten(1)))
    expected = {key: sum(values) / len(values) for key, values in information.items()}
    expected[1, "block"] = expected[1, "pair"]

    estimates: dict[tuple[int, str], list[float]] = {}
    for seed in range(12):
        leaves, _ = tree.sample(1500, generator=seeded(seed))
        exact = leave_one_out(tree, leaves)
        single = torch.stack([joint.sum([a for a in range(4) if a != leaf]) for leaf in range(4)])
        result = residuals_by_height(leaves, exact, single.expand_as(exact))
        for height, residual in result.items():
            estimates.setdefault((height, "block"), []).append(residual.block)
            estimates.setdefault((height, "pair"), []).append(residual.pair)
        perfect = residuals_by_height(leaves, exact, exact)
        assert all(residual == (0.0, 0.0) for residual in perfect.values())
    assert set(estimates) == set(expected)
    for key, values in estimates.items():
        measured = torch.tensor(values)
        stderr = measured.std().item() / len(values) ** 0.5
        assert measured.mean().item() == pytest.approx(expected[key], abs=4 * stderr), key


def test_wrong_shares_of_symbols_change_nothing() -> None:
    tree = Hierarchy(Grammar.random(3, generator=seeded(1), sigma=1.0), depth=2)
    leaves, _ = tree.sample(500, generator=seeded(0))
    exact = leave_one_out(tree, leaves)
    first = torch.zeros_like(exact)
    first[..., 0] = 1.0  # always the same symbol
    right = residuals_by_height(leaves, exact, exact.mean(0).expand_as(exact))
    wrong = residuals_by_height(leaves, exact, first)
    assert right[1].block > 0.02
    for height, residual in right.items():
        assert tuple(wrong[height]) == pytest.approx(tuple(residual), abs=1e-12)


def test_blocks_that_hardly_repeat_are_left_out() -> None:
    tree = Hierarchy(Grammar.random(4, generator=seeded(0)), depth=3)
    leaves, _ = tree.sample(200, generator=seeded(0))
    exact = leave_one_out(tree, leaves)
    assert list(residuals_by_height(leaves, exact, exact)) == [1, 2]  # 4^4 blocks, 200 trees
