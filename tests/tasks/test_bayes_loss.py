"""The Bayes loss: the loss of the Bayes predictor, from as many draws as it takes."""

import pytest
import torch

from mechcausal.graphs import CausalGraph, chain, icl_pairs, star, two_parents
from mechcausal.tasks import Batch, GraphTask, SeveralParentsTask, SingleParentTask, cross_entropies
from mechcausal.tasks.predictors import bayes_loss, bayes_prediction
from mechcausal.tasks.priors import DirichletPrior, FixedTransition
from tests.oracles import forest, seeded


def setting(graph: CausalGraph, n_sequences: int = 512) -> tuple[SingleParentTask, Batch]:
    task = SingleParentTask(graph, DirichletPrior.symmetric(0.3, vocab_size=4))
    return task, task.sample(n_sequences, generator=seeded(1))


def exactly(task: GraphTask, batch: Batch, n_draws: int) -> torch.Tensor:
    prediction = bayes_prediction(task, batch.tokens, generator=seeded(9), n_draws=n_draws)
    return cross_entropies(prediction, batch.target)


@pytest.mark.parametrize("graph", [chain(12), icl_pairs(13), star(8), forest(-1, -1, -1, 0)])
def test_it_is_the_loss_of_the_predictor(graph: CausalGraph) -> None:
    task, batch = setting(graph)
    loss = bayes_loss(task, batch, generator=seeded(2), max_draws=256)
    exact = exactly(task, batch, 1024)
    assert loss.stderr == pytest.approx(exact.std().item() / len(batch) ** 0.5, rel=0.05)
    assert abs(loss.mean - exact.mean().item()) < 0.4 * loss.stderr


def test_one_root_takes_fewer_draws_than_many() -> None:
    few, many = (
        bayes_loss(*setting(graph), generator=seeded(3), max_draws=1024).n_draws
        for graph in (chain(18), forest(*[-1] * 18))
    )
    assert few < many


@pytest.mark.parametrize("max_draws", [1, 2, 8, 9, 50])
def test_no_more_draws_than_allowed(max_draws: int) -> None:
    task, batch = setting(forest(*[-1] * 12), n_sequences=2048)
    assert bayes_loss(task, batch, generator=seeded(4), max_draws=max_draws).n_draws <= max_draws


def test_the_excess_is_what_more_draws_would_take_away() -> None:
    task, batch = setting(forest(*[-1] * 12))
    few = bayes_loss(task, batch, generator=seeded(5), max_draws=16)
    excess = few.mean - exactly(task, batch, 1024).mean().item()
    assert few.n_draws == 16
    assert few.excess == pytest.approx(excess, rel=0.5)


def test_time_is_counted_in_draws() -> None:
    task, batch = setting(forest(*[-1] * 12))
    short = bayes_loss(task, batch, generator=seeded(6), max_draws=10_000, max_seconds=1e-9)
    again = bayes_loss(task, batch, generator=seeded(6), max_draws=16)
    assert (short.n_draws, short.mean) == (again.n_draws, again.mean)


def test_what_is_exact_draws_nothing() -> None:
    fixed = SingleParentTask(chain(5), FixedTransition(((0.9, 0.1), (0.2, 0.8))))
    several = SeveralParentsTask(two_parents(6), DirichletPrior.symmetric(0.5, vocab_size=3))
    for task in (fixed, several):
        batch, generator = task.sample(64, generator=seeded(7)), seeded(8)
        before = generator.get_state()
        loss = bayes_loss(task, batch, generator=generator)
        assert (loss.n_draws, loss.excess) == (0, 0.0)
        assert torch.equal(generator.get_state(), before)
        assert loss.mean == pytest.approx(exactly(task, batch, 2).mean().item())
