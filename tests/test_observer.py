"""One look at a model: what it reads, and that it leaves no trace."""

import math

import pytest
import torch

from mechcausal import observer as observer_module
from mechcausal.graphs import CausalGraph, chain, icl_pairs
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.observer import Observer
from mechcausal.priors import DirichletPrior
from mechcausal.tasks import SingleParentTask, soft_cross_entropy
from mechcausal.theory import pairwise_theory
from tests.oracles import forest, pattern_gradient, seeded

S, T = 4, 12

FIGURES = {
    "loss/eval",
    "loss/bayes",
    "loss/gap",
    "graph/recovered",
    "graph/parent_attention",
    "graph/f1",
    "gradient/edge_hits",
    "gradient/theory_correlation",
    "gradient/chi2_correlation",
    "gradient/shannon_correlation",
    "induction/score",
    "induction/prefix_matching",
    "induction/copying",
    "strategy/kl_uniform",
    "strategy/kl_unigram",
    "strategy/kl_bigram",
}


def observe_with(
    model: SimplifiedTransformer, graph: CausalGraph | None = None, n_sequences: int = 300
) -> Observer:
    task = SingleParentTask(graph or chain(T - 1), DirichletPrior.symmetric(0.3, S))
    theory = pairwise_theory(task.graph, task.prior, n_priors=100, generator=seeded(1))
    return Observer(
        model,
        task,
        theory,
        n_sequences=n_sequences,
        epsilon=1e-3,
        bayes_draws=64,
        generator=seeded(2),
    )


def random_model() -> SimplifiedTransformer:
    model = SimplifiedTransformer(S, T)
    with torch.no_grad():
        model.A1.copy_(torch.randn(T, T, generator=seeded(3)))
        model.A2.copy_(2 * torch.randn(S, S, generator=seeded(4)))
    return model


def test_it_leaves_no_hooks_no_gradients_and_no_change() -> None:
    model = random_model()
    model.parameters_by_name["A2"].requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.hooked.named_parameters()}
    values = {name: p.detach().clone() for name, p in model.hooked.named_parameters()}
    watcher, state = observe_with(model), torch.get_rng_state()
    watcher.observe()
    watcher.losses()
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.hooked.named_parameters():
        assert parameter.requires_grad == wanted[name]
        assert parameter.grad is None
        assert torch.equal(parameter, values[name])
    for point in model.hooked.hook_dict.values():
        assert not point.fwd_hooks
        assert not point.bwd_hooks
        assert not point._forward_hooks
        assert not point._backward_hooks


def test_it_keeps_gradients_that_were_there() -> None:
    model = random_model()
    gradient = torch.ones_like(model.parameters_by_name["A1"])
    model.parameters_by_name["A1"].grad = gradient.clone()
    observe_with(model).observe()
    assert torch.equal(model.parameters_by_name["A1"].grad, gradient)


def test_it_names_the_figures_of_the_design() -> None:
    observation = observe_with(random_model()).observe()
    assert observation.figures.keys() >= FIGURES
    assert all(math.isfinite(observation.figures[name]) for name in FIGURES)
    assert observation.matrices.keys() >= {
        "attention/layer0",
        "gradient/scores",
        "gradient/pattern",
    }
    assert all(matrix.shape == (T, T) for matrix in observation.matrices.values())


def test_the_gradient_of_the_scores_is_that_of_a1() -> None:
    model = random_model()
    watcher = observe_with(model)
    loss = soft_cross_entropy(model(watcher.batch.tokens), watcher.batch.target, epsilon=1e-3)
    (gradient,) = torch.autograd.grad(loss, model.parameters_by_name["A1"])
    expected = -gradient[0, S : S + T, :T]
    observation = watcher.observe()
    found = observation.matrices["gradient/scores"].to(expected.dtype)
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert observation.figures["loss/eval"] == pytest.approx(loss.item(), rel=1e-6)


def test_the_gradient_of_the_pattern_is_that_of_a_free_pattern() -> None:
    model = SimplifiedTransformer(S, T)
    model.initialise(beta0=1.0)
    watcher = observe_with(model)
    found = watcher.observe().matrices["gradient/pattern"][:-1, :-1].double()
    # Same generator, so the same sequences.
    expected, _ = pattern_gradient(watcher.task, 300, beta0=1.0, epsilon=1e-3, seed=2)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_attention_and_prediction_are_those_of_the_closed_form() -> None:
    model = random_model()
    watcher = observe_with(model)
    observation = watcher.observe()
    with torch.no_grad():
        pattern, prediction = model.attention1(), model(watcher.batch.tokens)
    assert (observation.matrices["attention/layer0"] - pattern).abs().max() < 1e-6
    assert observation.prediction is not None
    assert (observation.prediction - prediction).abs().max() < 1e-6


def test_parts_of_the_batch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = observe_with(random_model())
    whole = watcher.observe()
    monkeypatch.setattr(observer_module, "_MAX_ENTRIES", 70 * T**2)  # 300 = 4 * 70 + 20
    parts = watcher.observe()
    assert parts.figures == pytest.approx(whole.figures, rel=1e-4, abs=1e-6, nan_ok=True)
    assert parts.prediction is not None
    assert whole.prediction is not None
    assert (parts.prediction - whole.prediction).abs().max() < 1e-6
    for name, matrix in whole.matrices.items():
        assert (parts.matrices[name] - matrix).norm() < 1e-5 * matrix.norm()


def test_losses_are_those_of_a_full_look() -> None:
    watcher = observe_with(random_model())
    figures = watcher.observe().figures
    losses = watcher.losses()
    assert losses == pytest.approx({name: figures[name] for name in losses}, rel=1e-5)
    assert losses["loss/gap"] == pytest.approx(losses["loss/eval"] - losses["loss/bayes"])


def test_a_second_look_sees_the_same() -> None:
    watcher = observe_with(random_model())
    first, second = watcher.observe(), watcher.observe()
    assert first.figures == pytest.approx(second.figures, nan_ok=True)


def test_the_ideal_solution_looks_ideal() -> None:
    model, graph = SimplifiedTransformer(S, T), icl_pairs(T - 1)
    watcher = observe_with(model, graph)
    model.initialise(beta0=1.0)
    start = watcher.observe().figures
    model.set_ideal(graph)
    ideal = watcher.observe().figures
    assert ideal["graph/recovered"] == 1.0
    assert ideal["graph/parent_attention"] > 0.999
    # Position 0 can only copy itself, and so competes wherever it holds the query.
    assert ideal["induction/score"] > 0.8 > 0.5 > start["induction/score"]


def test_the_first_look_already_names_the_graph() -> None:
    model = SimplifiedTransformer(S, T)
    model.initialise(beta0=1.0)
    figures = observe_with(model, n_sequences=4096).observe().figures
    assert figures["gradient/edge_hits"] == 1.0
    assert figures["graph/f1"] == 1.0
    assert figures["gradient/theory_correlation"] > 0.9


def test_a_graph_without_edges_can_be_watched() -> None:
    figures = observe_with(random_model(), forest(*[-1] * (T - 1))).observe().figures
    assert "graph/recovered" not in figures
    assert math.isnan(figures["induction/score"])
    assert math.isfinite(figures["loss/gap"])
