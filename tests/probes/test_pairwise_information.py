"""Pairwise information of data against exact theory, brute force and its own identities."""

import math
import re
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mechcausal.graphs import random_tree
from mechcausal.tasks import SingleParentTask
from mechcausal.tasks.priors import DirichletPrior, FixedTransition
from mechcausal.theory import pairwise_theory
from probes import PairwiseInformation, pairwise_information
from tests.oracles import seeded

BEFORE = torch.ones(19, 19, dtype=torch.bool).tril(-1)


def by_hand(pairs: list[tuple[int, int]]) -> tuple[float, float]:
    """Plug-in Shannon and χ² information of observed pairs, summed cell by cell."""
    n, joint = len(pairs), Counter(pairs)
    left, right = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    shannon = sum(c / n * math.log(c * n / left[a] / right[b]) for (a, b), c in joint.items())
    chi2 = sum(joint[a, b] ** 2 / left[a] / right[b] for a, b in product(left, right)) - 1
    return shannon, chi2


@given(st.integers(0, 2**31), st.integers(2, 5), st.integers(2, 4), st.booleans())
def test_plug_in_values_are_those_of_a_count_by_hand(
    seed: int, n_symbols: int, pos: int, by_lag: bool
) -> None:
    tokens = torch.randint(n_symbols, (20, pos), generator=seeded(seed))
    real = torch.rand(20, pos, generator=seeded(seed + 1)) < 0.8
    result = pairwise_information(
        tokens, mask=real, correction="none", vocab_size=5, by="lag" if by_lag else "position"
    )
    places = [[(q, q - lag) for q in range(lag, pos)] for lag in range(1, pos)]
    if not by_lag:
        places = [[(q, k)] for q in range(pos) for k in range(q)]
    for index, pooled in enumerate(places):
        pairs = [
            (int(row[k]), int(row[q]))
            for row, seen in zip(tokens, real, strict=True)
            for q, k in pooled
            if seen[q] and seen[k]
        ]
        at: Any = index if by_lag else pooled[0]
        values = result.shannon[at].item(), result.chi2[at].item()
        assert values == pytest.approx(by_hand(pairs) if pairs else (math.nan,) * 2, nan_ok=True)


def tree_task(seed: int, alpha: float) -> SingleParentTask:
    generator = seeded(seed)
    graph = random_tree(19, generator=generator)
    matrix = DirichletPrior.symmetric(alpha, vocab_size=10).sample(1, generator=generator)[0]
    return SingleParentTask(graph, FixedTransition.from_matrix(matrix))


def off_by(estimate: PairwiseInformation, task: SingleParentTask) -> dict[str, Tensor]:
    """Differences from exact theory in standard errors, for every pair."""
    theory = pairwise_theory(task.graph, task.prior)
    return {
        name: (
            (getattr(estimate, name) - getattr(theory, name)) / getattr(estimate, f"{name}_stderr")
        )[BEFORE]
        for name in ("shannon", "chi2")
    }


def test_estimates_cover_exact_theory() -> None:
    # 171 pairs of one data set are dependent, so the share of |z| < 2 spreads around 0.95.
    task = tree_task(seed=1, alpha=0.3)
    tokens = task.sample(1024, generator=seeded()).tokens[:, :-1]
    result = pairwise_information(tokens)
    assert result.correction == "jackknife"
    for z in off_by(result, task).values():
        assert (z.abs() < 2).double().mean() > 0.9
    plug_in = off_by(pairwise_information(tokens, correction="none"), task)["shannon"]
    assert (plug_in.abs() < 2).double().mean() < 0.5  # the bias is what the corrections remove


@pytest.mark.parametrize("correction", ["jackknife", "miller_madow", "shuffle"])
def test_corrections_remove_most_of_the_bias(correction: Any) -> None:
    independent = torch.randint(10, (1000, 8), generator=seeded())
    plug_in = pairwise_information(independent, correction="none")
    result = pairwise_information(independent, correction=correction)
    below = torch.ones(8, 8, dtype=torch.bool).tril(-1)
    # Theory: the plug-in is too large by (S - 1)² / 2n and (S - 1)² / n.
    assert plug_in.shannon[below].mean() == pytest.approx(81 / 2000, rel=0.2)
    assert plug_in.chi2[below].mean() == pytest.approx(81 / 1000, rel=0.2)
    assert result.shannon[below].mean().abs() < 0.1 * plug_in.shannon[below].mean()
    assert torch.allclose(result.chi2 + result.chi2_bias, plug_in.chi2, equal_nan=True)


def test_few_sequences_get_the_shuffle_null() -> None:
    tokens = torch.randint(10, (999, 3), generator=seeded())
    assert pairwise_information(tokens).correction == "shuffle"
    assert pairwise_information(tokens, vocab_size=5 * 2).n_symbols == 10
    assert pairwise_information(tokens.repeat(2, 1)).correction == "jackknife"


def test_the_shuffle_null_does_not_follow_the_order_of_the_sequences() -> None:
    # Every second sequence ends in two equal tokens: paired by a shift, half of the null would too.
    tokens = torch.randint(6, (400, 3), generator=seeded(4))
    tokens[::2, 1:] = 6
    result = pairwise_information(tokens, correction="shuffle")
    mixed = pairwise_information(tokens[torch.randperm(400, generator=seeded())])
    assert mixed.correction == "shuffle"
    assert result.chi2[2, 1] == pytest.approx(mixed.chi2[2, 1].item(), abs=0.05)
    assert result.chi2_bias[2, 1] < 0.2  # theory: (S - 1)² / n = 0.09


@pytest.mark.parametrize("correction", ["none", "miller_madow", "jackknife"])
def test_groups_are_averages_over_groups(correction: Any) -> None:
    tokens = torch.randint(3, (90, 4), generator=seeded())
    groups = torch.tensor([7, 2, 7] * 30)  # interleaved: 60 and 30 sequences
    together = pairwise_information(tokens, groups=groups, correction=correction, vocab_size=3)
    apart = [
        pairwise_information(tokens[groups == g], correction=correction, vocab_size=3)
        for g in (2, 7)
    ]
    mean = (apart[0].chi2 + 2 * apart[1].chi2) / 3
    assert torch.allclose(together.chi2, mean, equal_nan=True)


def test_groups_find_the_graph_where_pooling_misleads() -> None:
    # The paper's task: each group has a transition matrix of its own.
    prior, generator = DirichletPrior.symmetric(0.1, vocab_size=10), seeded()
    graph = random_tree(19, generator=generator)
    matrices = prior.sample(128, generator=generator)
    tasks = [SingleParentTask(graph, FixedTransition.from_matrix(matrix)) for matrix in matrices]
    tokens = torch.cat([task.sample(64, generator=generator).tokens[:, :-1] for task in tasks])
    groups = torch.arange(128).repeat_interleave(64)
    theory = pairwise_theory(graph, prior, generator=generator)

    def agreement(result: PairwiseInformation) -> tuple[float, float]:
        r = torch.corrcoef(torch.stack([result.chi2[BEFORE], theory.chi2[BEFORE]]))[0, 1]
        hits = [
            int(result.chi2[child, :child].argmax()) == parent
            for child, (parent,) in enumerate(graph.parents[1:], 1)
        ]
        return r.item(), sum(hits) / len(hits)

    r, hits = agreement(pairwise_information(tokens, groups=groups))
    assert r > 0.99
    assert hits == 1.0
    assert agreement(pairwise_information(tokens))[1] < 0.4


def test_batches_and_devices_of_tokens_do_not_matter() -> None:
    tokens = torch.randint(4, (50, 5), generator=seeded())
    together = pairwise_information(tokens, vocab_size=4)
    batches = pairwise_information(iter(tokens.to(torch.int16).split(7)), vocab_size=4)
    assert torch.equal(together.chi2.nan_to_num(), batches.chi2.nan_to_num())
    assert torch.equal(together.chi2_stderr.nan_to_num(), batches.chi2_stderr.nan_to_num())


def test_rare_tokens_share_a_bucket_and_only_lose_information() -> None:
    first = torch.randint(40, (4000,), generator=seeded()).float().square().div(40).long()
    tokens = torch.stack([first, first], 1)  # the second token copies the first
    fine = pairwise_information(tokens, correction="none")
    coarse = pairwise_information(tokens, correction="none", max_vocab=8)
    assert fine.bucket_share == 0
    assert 0 < coarse.bucket_share < 1
    assert coarse.n_symbols == 8
    assert coarse.shannon[1, 0] < fine.shannon[1, 0]
    assert "lower bound" in repr(coarse)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(1, 4, dtype=torch.long)}, "at least two sequences"),
        ({"tokens": torch.zeros(5, 1, dtype=torch.long)}, "at least two positions"),
        ({"tokens": torch.full((5, 3), -1)}, "tokens run from -1"),
        ({"vocab_size": 2}, "allowed: 0 to 1"),
        ({"tokens": []}, "no batches"),
        ({"tokens": [torch.zeros(2, 3).long(), torch.zeros(2, 4).long()]}, "differ in the length"),
        ({"mask": torch.zeros(4, 3, dtype=torch.bool)}, "every token is masked"),
        ({"groups": torch.tensor([0, 0, 1, 2])}, "group 1 has 1"),
        ({"folds": 1}, "folds is 1"),
        ({"max_vocab": 1}, "max_vocab is 1"),
        ({"max_lag": 2}, 'needs by="lag"'),
    ],
)
def test_bad_input_gets_one_clear_line(arguments: dict[str, Any], message: str) -> None:
    tokens = arguments.pop("tokens", torch.tensor([[0, 1, 2]] * 4))
    with pytest.raises(ValueError, match=re.escape(message)):
        pairwise_information(tokens, **arguments)
