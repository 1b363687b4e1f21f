"""What is to be learned about trees, and how much of each scale a prediction uses."""

import math

import pytest
import torch

from mechcausal.tasks import cross_entropies
from mechcausal.tasks.base import scored_rows
from mechcausal.tasks.checking import check_batch
from mechcausal.tasks.hierarchy import Grammar, Hierarchy
from mechcausal.tasks.hierarchy_tasks import MaskedLeafTask, RootTask, filters, use_of_scales
from mechcausal.tasks.protocol import PredictableTask
from tests.oracles import seeded

GRAMMAR = Grammar.random(3, generator=seeded(1))
TREE = Hierarchy(GRAMMAR, 3)


@pytest.mark.parametrize("task", [MaskedLeafTask(TREE), RootTask(TREE)])
def test_labels_are_posteriors_of_what_is_hidden(task: MaskedLeafTask | RootTask) -> None:
    n = 20_000
    batch = task.sample(n, generator=seeded(0))
    check_batch(task, batch, n)
    assert isinstance(task, PredictableTask)
    assert batch.leaves is not None
    hidden = batch.root if batch.scored is None else batch.leaves[batch.scored]
    assert hidden is not None
    target = scored_rows(batch.target, batch).double()
    # The mean of the labels' probabilities against what was hidden: calibrated, symbol by symbol.
    drawn = torch.nn.functional.one_hot(hidden, target.shape[1]).double()
    spread = (target * (1 - target)).sum(0).clamp(min=1e-12).sqrt()
    assert ((drawn - target).sum(0) / spread).abs().max() < 4
    predicted = {name: scored_rows(p, batch) for name, p in task.predictions(batch).items()}
    losses = [cross_entropies(p, target).mean().item() for p in predicted.values()]
    assert list(predicted) == ["bp_3", "bp_2", "bp_1", "bayes"]
    assert losses == sorted(losses, reverse=True)
    assert (predicted["bayes"] - target).abs().max() < 1e-6


def test_every_position_is_masked_alike() -> None:
    scored = MaskedLeafTask(TREE).sample(8000, generator=seeded(2)).scored
    assert scored is not None
    assert (scored.sum(1) == 1).all()
    assert ((scored.sum(0) - 1000) / math.sqrt(8000 / 8 * 7 / 8)).abs().max() < 4


def test_the_use_of_scales_is_what_was_mixed() -> None:
    task = MaskedLeafTask(TREE)
    batch = task.sample(300, generator=seeded(3))
    by_filter = {name: scored_rows(p, batch) for name, p in task.predictions(batch).items()}
    assert use_of_scales(by_filter["bayes"], by_filter) == pytest.approx({1: 1.0, 2: 1.0, 3: 1.0})
    assert use_of_scales(by_filter["bp_2"], by_filter) == pytest.approx(
        {1: 1.0, 2: 0.0, 3: 0.0}, abs=1e-9
    )
    step = by_filter["bp_1"] - by_filter["bp_2"]
    assert use_of_scales(by_filter["bp_2"] + 0.3 * step, by_filter) == pytest.approx(
        {1: 1.0, 2: 0.3, 3: 0.0}, abs=1e-9
    )


def test_leaves_that_only_share_the_root_have_no_scale_to_use() -> None:
    task = MaskedLeafTask(Hierarchy(GRAMMAR, 3, 3))
    batch = task.sample(5, generator=seeded(4))
    by_filter = {name: scored_rows(p, batch) for name, p in task.predictions(batch).items()}
    assert list(by_filter) == ["bayes"]
    assert use_of_scales(by_filter["bayes"], by_filter) == {}


def test_a_filtered_tree_is_its_own_bayes() -> None:
    assert {name: tree.filter for name, tree in filters(Hierarchy(GRAMMAR, 3, 1)).items()} == {
        "bp_3": 3,
        "bp_2": 2,
        "bayes": 1,
    }
