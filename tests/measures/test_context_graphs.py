"""Figures of in-context graphs, on attention whose values are known."""

import math

import pytest
import torch

from mechcausal.measures.context_graphs import (
    candidate_attention,
    copy_figures,
    kernel_errors,
    parent_figures,
)
from mechcausal.models.in_context_graphs import InContextGraphTransformer
from mechcausal.tasks.in_context_graphs import InContextGraphTask, possible_kernel
from mechcausal.tasks.priors import DirichletPrior
from tests.oracles import seeded

(MATRIX,) = DirichletPrior.symmetric(0.5, 3).sample(1, generator=seeded(5), dtype=torch.float64)
TASK = InContextGraphTask(possible_kernel(MATRIX), 4, n_examples=3)


def ideal() -> InContextGraphTransformer:
    model = InContextGraphTransformer(3, n_positions=4, n_examples=3, n_heads=3)
    model.set_ideal(torch.tensor(TASK.kernel.rows))
    return model


def test_the_posterior_itself_has_no_divergence_and_its_own_hits() -> None:
    batch = TASK.sample(200, generator=seeded(0))
    assert batch.parents is not None
    posterior = TASK.parent_posterior(batch.tokens)
    figures = parent_figures(posterior, posterior, batch.parents)
    assert figures["parents/top1"] == figures["parents/oracle_top1"] > 0.5
    assert figures["parents/posterior_kl"] == pytest.approx(0, abs=1e-12)


def test_parent_figures_by_hand() -> None:
    """Positions 2 and 3 count; at 2 attention is right, at 3 it is spread."""
    attention = torch.zeros(1, 4, 4)
    attention[0, 1, 0], attention[0, 2, 1] = 1.0, 1.0
    attention[0, 3, :3] = torch.tensor([0.5, 0.25, 0.25])
    posterior = torch.zeros(1, 4, 4, dtype=torch.float64)
    posterior[0, 1, 0], posterior[0, 2, 1], posterior[0, 3, 2] = 1.0, 1.0, 1.0
    figures = parent_figures(attention, posterior, torch.tensor([[-1, 0, 1, 2]]))
    assert figures["parents/top1"] == 0.5
    assert figures["parents/oracle_top1"] == 1.0
    assert figures["parents/posterior_kl"] == pytest.approx(math.log(4) / 2)


def test_attention_read_through_hooks_is_the_closed_form() -> None:
    model, batch = ideal(), TASK.sample(9, generator=seeded(1))
    read = candidate_attention(model, batch.tokens, 4)
    expected = model.parent_attention(batch.tokens)[:, :-1].detach().double()
    assert read[:, 0].abs().max() == 0
    assert (read[:, 1:] - expected).abs().max() < 1e-5


def test_kernel_errors_ignore_constants_of_columns_alone() -> None:
    kernel = torch.tensor(TASK.kernel.rows, dtype=torch.float64)
    model = ideal()
    assert kernel_errors(model.comparison(), kernel)["kernel/column_error"] < 1e-6
    by_row = kernel.log() + torch.tensor([[2.0], [0.0], [-2.0]])
    errors = kernel_errors(by_row, kernel)
    assert errors["kernel/row_error"] < 1e-12
    assert errors["kernel/column_error"] > 0.3


def test_heads_that_choose_the_same_example_are_counted_once() -> None:
    model = ideal()
    figures = copy_figures(model)
    assert figures == {
        "copies/examples_chosen": 1.0,
        "copies/example_attention": pytest.approx(1.0),
        "copies/own_column": pytest.approx(1.0),
    }
    with torch.no_grad():
        w_L = model.parameters_by_name["w_L"]
        w_L[1] = w_L[0]
    assert copy_figures(model)["copies/examples_chosen"] == pytest.approx(2 / 3)
