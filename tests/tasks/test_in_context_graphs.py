"""Graphs to be inferred from examples, against Bayes' rule written out."""

import pytest
import torch

from mechcausal.tasks.base import scored_rows
from mechcausal.tasks.checking import check_batch
from mechcausal.tasks.in_context_graphs import InContextGraphTask
from mechcausal.tasks.priors import DirichletPrior, FixedTransition
from mechcausal.tasks.protocol import PredictableTask
from tests.oracles import seeded

KERNEL = FixedTransition.from_matrix(
    DirichletPrior.symmetric(0.8, 3).sample(1, generator=seeded(1), dtype=torch.float64)[0]
)
TASK = InContextGraphTask(KERNEL, 5, n_examples=3)


def test_the_posterior_of_a_parent_is_bayes_rule() -> None:
    batch = TASK.sample(8, generator=seeded(0))
    check_batch(TASK, batch, 8)
    assert isinstance(TASK, PredictableTask)
    kernel = torch.tensor(KERNEL.rows, dtype=torch.float64)
    posterior, predicted = TASK.parent_posterior(batch.tokens), TASK.predictions(batch)
    for row, tokens in enumerate(batch.tokens.view(8, 4, 5).tolist()):
        for h in range(1, 5):
            likelihoods = []
            for candidate in range(h):
                product = 1.0
                for example in tokens[:3]:
                    product *= kernel[example[candidate], example[h]].item()
                likelihoods.append(product)
            weights = torch.tensor(likelihoods, dtype=torch.float64) / sum(likelihoods)
            assert (posterior[row, h, :h] - weights).abs().max() < 1e-12
            assert (posterior[row, h, h:] == 0).all()
            rows = torch.stack([kernel[tokens[3][candidate]] for candidate in range(h)])
            bayes, mixed = (predicted[name][row, 14 + h] for name in ("bayes", "mixed_parents"))
            assert (bayes - weights @ rows).abs().max() < 1e-12
            assert (mixed - rows.mean(0)).abs().max() < 1e-12


def test_parents_are_uniform_and_labels_are_the_law_of_the_next_token() -> None:
    batch = TASK.sample(20_000, generator=seeded(2))
    assert batch.parents is not None
    assert (batch.parents[:, 0] == -1).all()
    for h in range(1, 5):
        counts = batch.parents[:, h].bincount(minlength=5).double()
        assert (counts[h:] == 0).all()
        p = 1 / h
        assert ((counts[:h] - 20_000 * p).abs() <= 4 * (20_000 * p * (1 - p)) ** 0.5).all()
    assert batch.scored is not None
    law = batch.target[:, :-1][batch.scored[:, :-1]].double()
    drawn = torch.nn.functional.one_hot(batch.tokens[:, 1:][batch.scored[:, :-1]], 3).double()
    z = (drawn - law).sum(0) / (law * (1 - law)).sum(0).sqrt()
    assert z.abs().max() < 4


def test_no_predictor_is_better_than_bayes() -> None:
    batch = TASK.sample(4000, generator=seeded(3))
    target = scored_rows(batch.target, batch).double()
    losses = {
        name: -(target * scored_rows(value, batch).log()).sum(-1).mean().item()
        for name, value in TASK.predictions(batch).items()
    }
    assert losses["bayes"] < losses["mixed_parents"] < losses["stationary"]


def test_sizes_and_kernels_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="1 positions and 3 examples; allowed: at least 2"):
        InContextGraphTask(KERNEL, 1, 3)
    with pytest.raises(ValueError, match="the kernel has a zero"):
        InContextGraphTask(FixedTransition(((1.0, 0.0), (0.5, 0.5))), 4, 3)
