"""Batches drawn ahead are the batches that the generator would have given."""

import threading

import pytest
import torch

from mechcausal.graphs import chain, two_parents
from mechcausal.tasks import Batch, GraphTask, ahead, build_task
from mechcausal.tasks.ahead import BatchesAhead
from mechcausal.tasks.priors import DirichletPrior
from tests.oracles import seeded


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_n_cores", lambda: 2)


@pytest.fixture(params=["one parent", "two parents"])
def task(request: pytest.FixtureRequest) -> GraphTask:
    graph = chain(7) if request.param == "one parent" else two_parents(8)
    return build_task(graph, DirichletPrior.symmetric(0.1, vocab_size=3))


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.target, other.target)


def drawing_threads() -> set[threading.Thread]:
    """Those of runs that other tests share are among them, and may end at any time."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("batches")}


def test_batches_are_those_of_the_generator(task: GraphTask) -> None:
    generator, alone = seeded(1), seeded(1)
    batches = BatchesAhead(task, generator)
    for _ in range(50):
        assert same(batches.sample(16), task.sample(16, generator=alone))
        # What is saved now is where a resumed run goes on.
        assert torch.equal(generator.get_state(), alone.get_state())


def test_whoever_sets_the_generator_decides_what_comes_next(task: GraphTask) -> None:
    generator = seeded(1)
    batches = BatchesAhead(task, generator)
    for _ in range(5):
        batches.sample(16)
    saved = generator.get_state()
    first = [batches.sample(16) for _ in range(5)]
    generator.set_state(saved)
    assert all(same(batches.sample(16), batch) for batch in first)


def test_another_size_begins_where_the_last_one_ended(task: GraphTask) -> None:
    generator, alone = seeded(2), seeded(2)
    batches = BatchesAhead(task, generator)
    for size in (4, 4, 7, 7, 4):
        assert same(batches.sample(size), task.sample(size, generator=alone))


def test_one_core_draws_for_itself(task: GraphTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_n_cores", lambda: 1)
    before = drawing_threads()
    batches = BatchesAhead(task, seeded(3))
    assert same(batches.sample(4), task.sample(4, generator=seeded(3)))
    assert drawing_threads() <= before


def test_an_error_comes_when_the_batch_is_asked_for(
    task: GraphTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Batch:
        raise MemoryError("no room")

    monkeypatch.setattr(type(task), "sample", fail)
    with pytest.raises(MemoryError, match="no room"):
        BatchesAhead(task, seeded(4)).sample(4)


def test_its_thread_ends_with_it(task: GraphTask) -> None:
    before = drawing_threads()
    batches = BatchesAhead(task, seeded(5))
    batches.sample(4)
    threads = drawing_threads() - before
    assert threads
    del batches
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
