"""Trees of a random grammar: belief propagation against enumeration, samples against the law."""

import itertools
import math
from functools import cache

import pytest
import torch
from torch import Tensor

from mechcausal.tasks.hierarchy import Grammar, Hierarchy, HierarchyError, evidence_of
from tests.oracles import seeded


def grammar_of(seed: int, q: int = 3, sigma: float = 1.0) -> Grammar:
    return Grammar.random(q, generator=seeded(seed), sigma=sigma)


@cache
def joint(seed: int, q: int, depth: int, level: int) -> dict[tuple[int, ...], Tensor]:
    """P(root, leaves) as a vector over roots, by the leaves, summed over all inner symbols."""
    rules = grammar_of(seed, q).rules

    def leaves_below(symbol: int, height: int) -> dict[tuple[int, ...], float]:
        if height == 0:
            return {(symbol,): 1.0}
        law: dict[tuple[int, ...], float] = {}
        for b, c in itertools.product(range(q), repeat=2):
            for left, p in leaves_below(b, height - 1).items():
                for right, r in leaves_below(c, height - 1).items():
                    weight = rules[symbol, b, c].item() * p * r
                    law[left + right] = law.get(left + right, 0.0) + weight
        return law

    def reached(symbol: int, node: int) -> list[float]:
        """The law of a node of the filtered level, by walking from the root."""
        law = [float(s == symbol) for s in range(q)]
        for step in range(level):
            right = node >> (level - 1 - step) & 1
            sums = rules.sum(1 if right else 2)
            law = [sum(law[a] * sums[a, b].item() for a in range(q)) for b in range(q)]
        return law

    below = [leaves_below(symbol, depth - level) for symbol in range(q)]
    table: dict[tuple[int, ...], Tensor] = {}
    for root in range(q):
        law: dict[tuple[int, ...], float] = {(): 1.0 / q}
        for node in range(2**level):
            symbols = reached(root, node)
            law = {
                first + block: p * sum(symbols[s] * below[s].get(block, 0.0) for s in range(q))
                for first, p in law.items()
                for block in itertools.product(range(q), repeat=2 ** (depth - level))
            }
        for leaves, p in law.items():
            table.setdefault(leaves, torch.zeros(q, dtype=torch.float64))[root] += p
    return table


CASES = [(0, 3, 2, 0), (1, 3, 2, 1), (2, 3, 2, 2), (3, 2, 3, 0), (4, 2, 3, 1), (5, 2, 3, 2)]


@pytest.mark.parametrize(("seed", "q", "depth", "level"), CASES)
def test_belief_propagation_equals_enumeration(seed: int, q: int, depth: int, level: int) -> None:
    table = joint(seed, q, depth, level)
    assert sum(float(row.sum()) for row in table.values()) == pytest.approx(1.0, abs=1e-12)
    possible = {leaves: row for leaves, row in table.items() if row.sum() > 0}
    tokens = torch.tensor(list(possible))
    tree = Hierarchy(grammar_of(seed, q), depth, level)
    posteriors = tree.infer(evidence_of(tokens, q))
    expected = torch.stack([row / row.sum() for row in possible.values()])
    assert (posteriors.root - expected).abs().max() < 1e-12
    for leaf in range(tree.n_leaves):
        for number, leaves in enumerate(possible):
            others = [(*leaves[:leaf], s, *leaves[leaf + 1 :]) for s in range(q)]
            law = torch.stack([table[other].sum() for other in others])
            assert (posteriors.leaves[number, leaf] - law / law.sum()).abs().max() < 1e-12


def test_hidden_leaves_are_summed_out() -> None:
    table, q, hidden = joint(0, 3, 2, 0), 3, [1, 3]
    tree = Hierarchy(grammar_of(0), 2)
    tokens = torch.tensor([[0, q, 2, q]])
    root = torch.zeros(q, dtype=torch.float64)
    for leaves, row in table.items():
        if (leaves[0], leaves[2]) == (0, 2):
            root += row
    posteriors = tree.infer(evidence_of(tokens, q))
    assert (posteriors.root[0] - root / root.sum()).abs().max() < 1e-12
    for leaf in hidden:
        law = torch.zeros(q, dtype=torch.float64)
        for leaves, row in table.items():
            if (leaves[0], leaves[2]) == (0, 2):
                law[leaves[leaf]] += row.sum()
        assert (posteriors.leaves[0, leaf] - law / law.sum()).abs().max() < 1e-12


@pytest.mark.parametrize(("seed", "q", "depth", "level"), CASES[:3])
def test_samples_follow_the_law(seed: int, q: int, depth: int, level: int) -> None:
    n = 40_000
    leaves, root = Hierarchy(grammar_of(seed, q), depth, level).sample(n, generator=seeded(9))
    counts: dict[tuple[int, ...], int] = {}
    for row, symbol in zip(leaves.tolist(), root.tolist(), strict=True):
        counts[(symbol, *row)] = counts.get((symbol, *row), 0) + 1
    total = 0.0
    cells = 0
    for tokens, row in joint(seed, q, depth, level).items():
        for symbol in range(q):
            p = row[symbol].item()
            count = counts.get((symbol, *tokens), 0)
            if p == 0:
                assert count == 0
            elif n * p >= 5:
                cells += 1
                total += (count - n * p) ** 2 / (n * p)
    assert cells > 20
    assert total < cells + 4 * math.sqrt(2 * cells)  # chi-squared with at most that many degrees


def test_a_pair_names_its_parent_and_sigma_zero_is_uniform() -> None:
    rules = grammar_of(0, q=4).rules
    assert ((rules > 0).sum(0) == 1).all()
    assert torch.equal(grammar_of(0, q=4, sigma=0.0).rules.unique(), torch.tensor([0.0, 0.25]))
    level_2 = grammar_of(0, q=4).descent(2)
    left, right = rules.sum(2), rules.sum(1)
    assert torch.allclose(
        level_2, torch.stack([left @ left, left @ right, right @ left, right @ right])
    )


def test_deep_trees_stay_finite() -> None:
    tree = Hierarchy(grammar_of(0, q=4), 7)
    leaves, _ = tree.sample(3, generator=seeded(0))
    posteriors = tree.infer(evidence_of(leaves, 4))
    assert bool(posteriors.leaves.isfinite().all())
    assert posteriors.leaves.gather(2, leaves.unsqueeze(2)).min() > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda g: Hierarchy(g, 0), "depth is 0; allowed: 1 to 10, at most 1,024 leaves"),
        (lambda g: Hierarchy(g, 11), "depth is 11"),
        (lambda g: Hierarchy(g, 3, 4), "filter is 4; allowed: 0 to the depth, 3"),
        (lambda g: Hierarchy(g, 2).infer(torch.ones(1, 3, 3)), "needed: batch x 4 leaves x 3"),
        (lambda _: Grammar(torch.ones(2, 2, 2)), "must sum to 1"),
        (lambda _: Grammar(torch.ones(2, 2, 3)), "needed: q x q x q"),
        (lambda _: Grammar.random(1, generator=seeded(0)), "at least 2 symbols, found 1"),
        (lambda _: Grammar.random(3, generator=seeded(0), sigma=-1.0), "sigma is -1.0"),
    ],
)
def test_bad_trees_are_refused(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(HierarchyError, match=message.replace("(", r"\(")):
        build(grammar_of(0))
