"""The first gradient on scores of in-context graphs: formula, autograd through hooks, and χ²."""

import pytest
import torch

from mechcausal.graphs import GraphError
from mechcausal.models.in_context_graphs import InContextGraphTransformer
from mechcausal.tasks.base import batch_loss
from mechcausal.tasks.in_context_graphs import ContextBatch, InContextGraphTask, possible_kernel
from mechcausal.tasks.priors import DirichletPrior
from mechcausal.theory.context_gradient import first_score_gradient, score_gradients
from probes import AttentionGradient, attach
from tests.oracles import seeded

PARENTS = (-1, 0, 0, 1, 2)
(MATRIX,) = DirichletPrior.symmetric(0.5, 4).sample(1, generator=seeded(5), dtype=torch.float64)
TASK = InContextGraphTask(possible_kernel(MATRIX), 5, n_examples=2)


def contexts(n: int) -> ContextBatch:
    """Contexts that all have the graph `PARENTS`."""
    graphs = torch.tensor([PARENTS]).expand(n, -1)
    examples = TASK.examples_of(graphs, 3, generator=seeded(0))
    target = torch.zeros(n, 15, 4)
    kernel = torch.tensor(TASK.kernel.rows, dtype=torch.float32)
    target[:, 10:14] = kernel[examples[:, -1, list(PARENTS[1:])]]
    scored = torch.zeros(n, 15, dtype=torch.bool)
    scored[:, 10:14] = True
    return ContextBatch(examples.flatten(1), target, scored=scored, parents=graphs)


def test_the_formula_is_the_gradient_that_hooks_read() -> None:
    batch = contexts(40)
    model = InContextGraphTransformer(4, n_positions=5, n_examples=2, n_heads=2)
    model.initialise(scale=0.0)
    model.hooked.double()
    kernel = torch.tensor(TASK.kernel.rows, dtype=torch.float64)
    with torch.no_grad():
        model.parameters_by_name["V"].copy_(kernel.log())
    gradient = AttentionGradient("scores", 1)
    with model.frozen(), attach(model.hooked, gradient):
        output = model.probabilities_by_position(model.hooked(batch.tokens))
        batch_loss(output, batch).backward()
    read = gradient.reading().sel(layer=1).values[0, 10:14, 10:14]
    expected = score_gradients(TASK, batch.tokens[:, 10:], PARENTS).mean(0)[1:, :4]
    # The loss is a mean over the four positions that are predicted; labels are float32.
    assert (-4 * read - expected).abs().max() < 1e-6
    assert expected.abs().max() > 0.01


def test_the_first_gradient_names_every_parent() -> None:
    first = first_score_gradient(TASK, PARENTS, generator=seeded(1))
    assert first.named == {2: True, 3: True, 4: True}
    for h in range(2, 5):  # by more than its error
        others = [c for c in range(h) if c != PARENTS[h]]
        gap = first.gradient[h, PARENTS[h]] - first.gradient[h, others].max()
        assert gap > 4 * first.stderr[h, :h].max()
    assert set(first.chi2_correlations) == {3, 4}
    assert min(first.chi2_correlations.values()) > 0.5
    assert first.gradient.triu().abs().max() == 0
    with pytest.raises(GraphError):
        first_score_gradient(TASK, (-1, 2, 0), generator=seeded(1))
