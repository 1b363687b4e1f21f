"""Information of graphs with several parents against enumeration of every sequence."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mechcausal.graphs import CausalGraph, chain, k_gram, two_parents
from mechcausal.tasks import SeveralParentsTask
from mechcausal.tasks.priors import FixedTransition
from mechcausal.theory import pairwise_theory, parent_information
from mechcausal.theory.elimination import elimination_width, exact_information, table_information
from mechcausal.theory.sampled import sampled_information
from tests.oracles import (
    MIXED,
    pair_distribution,
    seeded,
    symmetric_task,
    tensor_distribution,
)

THREE_PARENTS = CausalGraph(((), (), (), (0, 1, 2), (1, 2, 3), (3,)), (0, 2, 5))
DOUBLY_STOCHASTIC = FixedTransition(((0.6, 0.3, 0.1), (0.1, 0.6, 0.3), (0.3, 0.1, 0.6)))


def drawn(task: SeveralParentsTask, n: int, seed: int) -> dict[int, Tensor]:
    return task.sample_tensors(n, generator=seeded(seed), dtype=torch.float64)


def by_hand(table: np.ndarray) -> tuple[float, float]:
    """Both informations of a table, cell by cell."""
    chi2, shannon = -1.0, 0.0
    for x in range(table.shape[0]):
        for y in range(table.shape[1]):
            if table[x, y] > 0:
                ratio = table[x, y] / (table[x].sum() * table[:, y].sum())
                chi2 += table[x, y] * ratio
                shannon += table[x, y] * math.log(ratio)
    return chi2, shannon


def test_information_of_a_hand_computed_table() -> None:
    table = torch.tensor([[0.4, 0.1, 0.0], [0.1, 0.4, 0.0]], dtype=torch.float64)
    chi2, shannon = table_information(table)
    assert chi2.item() == pytest.approx(0.36, rel=1e-12)
    assert shannon.item() == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
@pytest.mark.parametrize(
    ("graph", "vocab_size"),
    [(MIXED, 3), (THREE_PARENTS, 2), (two_parents(6), 2), (k_gram(5, 2), 3), (k_gram(5, 1), 3)],
)
def test_exact_information_is_that_of_all_sequences(
    graph: CausalGraph, vocab_size: int, alpha: float
) -> None:
    tensors = drawn(symmetric_task(graph, alpha, vocab_size), 2, seed=1)
    information = exact_information(graph, tensors)
    rows = (*graph.parents, graph.query_parents or ())
    for prior in range(2):
        joint = tensor_distribution(graph, {k: t[prior].numpy() for k, t in tensors.items()})
        for i, parents in enumerate(rows):
            for j in range(len(rows)):
                expected = by_hand(pair_distribution(joint, i, j))
                for name, value in zip(("chi2", "shannon"), expected, strict=True):
                    assert information[name][prior, i, j].item() == pytest.approx(value, abs=1e-10)
            kept = {*parents, i}
            others = tuple(axis for axis in range(joint.ndim) if axis not in kept)
            expected = by_hand(joint.sum(others).reshape(-1, vocab_size))
            for name, value in zip(("set_chi2", "set_shannon"), expected, strict=True):
                assert information[name][prior, i].item() == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("n_sequences", [128, 1024])
@pytest.mark.parametrize(
    ("graph", "vocab_size", "alpha"),
    [(MIXED, 3, 1.0), (THREE_PARENTS, 2, 0.5), (k_gram(8, 2), 3, 0.5)],
)
def test_sequences_estimate_information_without_bias(
    graph: CausalGraph, vocab_size: int, alpha: float, n_sequences: int
) -> None:
    """Estimate and truth of the same tensors, so that the spread over the prior cancels."""
    task, repeats = symmetric_task(graph, alpha, vocab_size), 100
    tensors, generator = drawn(task, repeats, seed=2), seeded(3)
    exact = exact_information(graph, tensors)
    estimates = [
        sampled_information(
            task,
            {k: t[prior : prior + 1] for k, t in tensors.items()},
            n_sequences,
            generator=generator,
        )
        for prior in range(repeats)
    ]
    for name, truth in exact.items():
        off = torch.cat([estimate[name] for estimate in estimates]) - truth
        stderr = (off.std(0) / repeats**0.5).clamp(min=1e-9)
        assert (off.mean(0) / stderr).abs().max() < 5, name


@pytest.mark.parametrize("n", [3, 6])
def test_one_parent_each_gives_the_closed_form_of_trees(n: int) -> None:
    """Under a doubly stochastic matrix `mu` is uniform, as roots are here."""
    graph = CausalGraph(chain(n).parents, (n - 1,))
    information = parent_information(SeveralParentsTask(graph, DOUBLY_STOCHASTIC))
    theory = pairwise_theory(chain(n + 1), DOUBLY_STOCHASTIC)
    assert (information.method, information.n_priors, information.n_sequences) == ("exact", 1, 0)
    torch.testing.assert_close(information.chi2, theory.chi2, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(information.shannon, theory.shannon, rtol=1e-10, atol=1e-10)
    for parent, child in information.edges:
        assert information.set_chi2[child].item() == pytest.approx(
            theory.chi2[child, parent].item()
        )
    assert not information.chi2_stderr.any()
    assert information.set_chi2[0] == information.set_shannon[0] == 0


def test_monte_carlo_says_so_and_reports_its_noise_even_for_a_fixed_matrix() -> None:
    task = SeveralParentsTask(CausalGraph(chain(5).parents, (4,)), DOUBLY_STOCHASTIC)
    exact = parent_information(task)
    information = parent_information(task, n_priors=40, n_sequences=514, max_states=1)
    assert (information.method, information.n_priors, information.n_sequences) == (
        "monte carlo",
        40,
        512,
    )
    for name in ("chi2", "shannon", "set_chi2", "set_shannon"):
        off = getattr(information, name) - getattr(exact, name)
        assert (off / getattr(information, f"{name}_stderr").clamp(min=1e-9)).abs().max() < 5, name
    assert information.chi2_stderr[5, 4] > 1e-6


def test_both_methods_agree_over_the_prior() -> None:
    task = symmetric_task(MIXED, 0.5, 3)
    exact, information = (
        parent_information(
            task, n_priors=n, generator=seeded(seed), n_sequences=512, max_states=states
        )
        for n, seed, states in ((2000, 4, 10_000), (150, 5, 1))
    )
    assert (exact.method, information.method) == ("exact", "monte carlo")
    for name in ("chi2", "shannon", "set_chi2", "set_shannon"):
        off = getattr(information, name) - getattr(exact, name)
        stderr = getattr(information, f"{name}_stderr").hypot(getattr(exact, f"{name}_stderr"))
        assert (off / stderr.clamp(min=1e-9)).abs().max() < 5, name


@pytest.mark.parametrize("alpha", [0.05, 1.0])
@pytest.mark.parametrize(
    ("graph", "vocab_size"),
    [(MIXED, 3), (THREE_PARENTS, 3), (two_parents(9), 2), (k_gram(9, 3), 2)],
)
def test_the_parents_together_tell_at_least_what_any_earlier_position_tells(
    graph: CausalGraph, vocab_size: int, alpha: float
) -> None:
    """Data processing: given its parents a position depends on nothing else before it."""
    information = exact_information(
        graph, drawn(symmetric_task(graph, alpha, vocab_size), 30, seed=6)
    )
    n = graph.n_positions
    for name in ("chi2", "shannon"):
        for i in range(n + 1):
            largest = information[name][:, i, :i].amax(1) if i else torch.zeros(30)
            assert (information[f"set_{name}"][:, i] >= largest - 1e-10).all()


def test_tables_are_symmetric_and_tell_the_diagonal() -> None:
    for states in (1, 10**4):
        information = parent_information(
            symmetric_task(MIXED, 1.0, 3), n_priors=4, n_sequences=4096, max_states=states
        )
        assert torch.equal(information.chi2, information.chi2.T)
        assert torch.equal(information.shannon, information.shannon.T)
        n_others = torch.full((7,), 2.0, dtype=torch.float64)
        torch.testing.assert_close(information.chi2.diagonal(), n_others)
        assert information.shannon[0, 0].item() == pytest.approx(math.log(3))
        assert information.edges[-2:] == ((2, 6), (5, 6))


def test_the_width_of_elimination_is_that_of_the_frontier() -> None:
    assert elimination_width(k_gram(20, 2)) == 4  # two parents, the new position, one asked about
    assert elimination_width(k_gram(2, 2)) == 3
    assert elimination_width(CausalGraph(chain(9).parents, (8,))) == 3
    assert elimination_width(two_parents(32)) == 11  # 7 to 15 behind position 16, and one more


def test_too_few_priors_or_sequences_are_refused() -> None:
    task = symmetric_task(MIXED, 1.0, 3)
    with pytest.raises(ValueError, match="n_priors is 1"):
        parent_information(task, n_priors=1)
    with pytest.raises(ValueError, match="n_sequences is 15: at least 16"):
        parent_information(task, n_sequences=15, max_states=1)


@pytest.mark.parametrize("states", [1, 20_000], ids=["monte carlo", "exact"])
def test_a_time_limit_makes_fewer_draws(states: int) -> None:
    task = symmetric_task(MIXED, 1.0, 3)
    options = {"n_sequences": 64, "max_states": states}
    short = parent_information(task, n_priors=500, generator=seeded(3), max_seconds=1e-9, **options)
    assert (short.n_priors, short.n_wanted) == (2, 500)
    free = parent_information(task, n_priors=2, generator=seeded(3), **options)
    assert torch.equal(short.chi2, free.chi2)
    assert free.n_wanted == free.n_priors
