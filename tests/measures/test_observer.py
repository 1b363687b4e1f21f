"""One look at a model: what it reads. (That it leaves no trace: `test_looks_leave_nothing`.)"""

import math

import pytest
import torch

from mechcausal.graphs import CausalGraph, chain, icl_pairs, two_parents
from mechcausal.measures.closed_form_observer import ClosedFormObserver
from mechcausal.measures.metrics import gradient_figures, induction_mask
from mechcausal.measures.observation import Observation
from mechcausal.measures.observer import Observer
from mechcausal.models import predicting
from mechcausal.models.base import GraphModel
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.models.standard import StandardTransformer, standard_config
from mechcausal.tasks import SeveralParentsTask, SingleParentTask, soft_cross_entropy
from mechcausal.tasks.priors import DirichletPrior, FixedTransition
from mechcausal.theory import pairwise_theory, parent_information
from tests.oracles import forest, pattern_gradient, seeded

S, T = 4, 12

FIGURES = {
    *("loss/eval", "loss/bayes", "loss/gap", "loss/construction", "loss/construction_gap"),
    *("graph/recovered", "graph/parent_attention", "graph/f1", "gradient/edge_hits"),
    *(f"gradient/{name}_correlation" for name in ("theory", "chi2", "shannon")),
    *(f"induction/{name}" for name in ("score", "attention", "prefix_matching", "copying")),
    *(f"strategy/kl_{name}" for name in ("uniform", "unigram", "bigram")),
}


def observe_with(
    model: GraphModel,
    graph: CausalGraph | None = None,
    kind: type[Observer] = Observer,
    *,
    n_sequences: int = 300,
) -> Observer:
    """An observer of a graph of single parents."""
    task = SingleParentTask(graph or chain(T - 1), DirichletPrior.symmetric(0.3, model.vocab_size))
    theory = pairwise_theory(task.graph, task.prior, n_priors=100, generator=seeded(1))
    return kind(
        model,
        task,
        theory,
        n_sequences=n_sequences,
        epsilon=1e-3,
        bayes_draws=8,
        generator=seeded(2),
    )


def random_model() -> SimplifiedTransformer:
    model = SimplifiedTransformer(S, T)
    with torch.no_grad():
        model.A1.copy_(torch.randn(T, T, generator=seeded(3)))
        model.A2.copy_(2 * torch.randn(S, S, generator=seeded(4)))
    return model


Look = tuple[SimplifiedTransformer, Observer, Observation]


@pytest.fixture(scope="module")
def look() -> Look:
    """A model of random weights, its observer and what that saw."""
    model = random_model()
    watcher = observe_with(model)
    return model, watcher, watcher.observe()


@pytest.mark.parametrize("observer_type", [Observer, ClosedFormObserver])
@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_a_fixed_matrix_with_zeros_has_finite_figures(
    observer_type: type[Observer], epsilon: float
) -> None:
    rows = ((0.5, 0.5, 0.0, 0.0), (0.0, 0.5, 0.5, 0.0), (0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 0.0, 0.5))
    task = SingleParentTask(chain(119), FixedTransition(rows))
    model = SimplifiedTransformer(4, 120)
    model.set_ideal(task.graph, beta=4.0)
    with torch.no_grad():
        model.A2.add_(500 * torch.eye(4))  # layer 2's attention to all others underflows
    watcher = observer_type(
        model,
        task,
        pairwise_theory(task.graph, task.prior),
        n_sequences=64,
        epsilon=epsilon,
        bayes_draws=8,
        generator=seeded(2),
    )
    figures = watcher.observe().figures
    assert figures["loss/bayes"] == pytest.approx(math.log(2))
    assert all(map(math.isfinite, watcher.strategy_losses.values()))
    excluded = (watcher.batch.target > 0) & (model(watcher.batch.tokens) == 0)
    assert not excluded.any()  # else an infinite loss would be right
    for name in ("loss/eval", "loss/gap", "strategy/kl_bigram", "gradient/theory_correlation"):
        assert math.isfinite(figures[name])


def test_it_names_the_figures_of_the_design(look: Look) -> None:
    _, watcher, observation = look
    figures = observation.figures
    assert figures.keys() >= FIGURES
    assert all(math.isfinite(figures[name]) for name in FIGURES)
    shapes = {name: matrix.shape for name, matrix in observation.matrices.items()}
    assert shapes.pop("attention/examples") == (4, 1, T)
    assert shapes.keys() == {"attention/layer0", "gradient/scores", "gradient/pattern"}
    assert set(shapes.values()) == {(T, T)}
    losses = watcher.losses()
    assert losses == pytest.approx({name: figures[name] for name in losses}, rel=1e-5)
    assert losses["loss/gap"] == pytest.approx(losses["loss/eval"] - losses["loss/bayes"])


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (1, 2)])
def test_examples_are_the_first_sequences_seen_by_the_last_layer(heads: tuple[int, ...]) -> None:
    model = of_heads(*heads)
    watcher = watch(model, two_parents(LENGTH))
    attention = watcher.observe().matrices["attention/examples"]
    assert torch.equal(watcher.examples, watcher.batch.tokens[:4])
    with torch.no_grad():
        _, cache = model.hooked.run_with_cache(watcher.examples)
    expected = cache[f"blocks.{len(heads) - 1}.attn.hook_pattern"][:, : heads[-1], -1]
    torch.testing.assert_close(attention, expected)


def test_the_gradient_of_the_scores_is_that_of_a1(look: Look) -> None:
    model, watcher, observation = look
    loss = soft_cross_entropy(model(watcher.batch.tokens), watcher.batch.target, epsilon=1e-3)
    (gradient,) = torch.autograd.grad(loss, model.parameters_by_name["A1"])
    expected = -gradient[0, S : S + T, :T]
    gradient = observation.matrices["gradient/scores"].to(expected.dtype)
    assert (gradient - expected).norm() < 1e-6 * expected.norm()
    assert observation.figures["loss/eval"] == pytest.approx(loss.item(), rel=1e-6)


def test_the_gradient_of_the_pattern_is_that_of_a_free_pattern() -> None:
    model = SimplifiedTransformer(S, T)
    model.initialise(beta0=1.0)
    watcher = observe_with(model)
    gradient = watcher.observe().matrices["gradient/pattern"][:-1, :-1].double()
    # Same generator, so the same sequences.
    expected, _ = pattern_gradient(watcher.task, 300, beta0=1.0, epsilon=1e-3, seed=2)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_parts_of_the_batch_add_up(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    _, watcher, full = look
    monkeypatch.setattr(predicting, "_MAX_ENTRIES", 70 * T**2)  # 300 = 4 * 70 + 20
    parts = watcher.observe()
    assert parts.figures == pytest.approx(full.figures, rel=1e-4, abs=1e-6, nan_ok=True)
    assert parts.prediction is not None
    assert full.prediction is not None
    assert (parts.prediction - full.prediction).abs().max() < 1e-6
    for name, matrix in full.matrices.items():
        assert (parts.matrices[name] - matrix).norm() < 1e-5 * matrix.norm()


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


@pytest.mark.parametrize("vocab_size", [2, 3, 5])
def test_uniform_attention_scores_no_induction(vocab_size: int) -> None:
    """What a query with uniform attention finds by chance, most of it when tokens are few."""
    model = SimplifiedTransformer(vocab_size, T)
    for observer in (Observer, ClosedFormObserver):
        watcher = observe_with(model, chain(T - 1), observer)
        figures = watcher.observe().figures
        shares = [
            sum(row[i] == row[-1] for i in range(T - 2)) / T
            for row in watcher.batch.tokens.tolist()
        ]
        counted = [share for share in shares if share]
        by_chance = sum(counted) / len(counted)
        assert by_chance > 0.2
        assert figures["induction/attention"] == pytest.approx(by_chance, abs=1e-5)
        assert figures["induction/score"] == pytest.approx(0.0, abs=1e-5)


def test_the_induction_score_is_the_share_of_what_chance_leaves() -> None:
    model = random_model()
    with torch.no_grad():
        model.A2.copy_(4 * torch.eye(S))
    watcher = observe_with(model)
    figures = watcher.observe().figures
    keys = induction_mask(watcher.batch.tokens, watcher.task.graph)[:, -1]
    by_chance = keys[keys.any(1)].double().mean().item()
    expected = (figures["induction/attention"] - by_chance) / (1 - by_chance)
    assert figures["induction/score"] == pytest.approx(expected, abs=1e-6)


# --- Models with several heads ---

LENGTH = 8


def of_heads(*heads: int, seed: int = 0) -> DisentangledTransformer:
    model = DisentangledTransformer(S, LENGTH, heads)
    model.initialise(scale=0.7, generator=seeded(seed))
    with torch.no_grad():
        model.W.copy_(torch.randn(model.W.shape, generator=seeded(seed + 1)))
    return model


def watch(model: GraphModel, graph: CausalGraph, n_sequences: int = 200) -> Observer:
    """An observer of a graph whose query has parents."""
    task = SeveralParentsTask(graph, DirichletPrior.symmetric(0.3, S))
    theory = parent_information(task, n_priors=4, generator=seeded(1))
    return Observer(
        model,
        task,
        theory,
        n_sequences=n_sequences,
        epsilon=1e-3,
        bayes_draws=2,
        generator=seeded(2),
    )


@pytest.mark.parametrize("heads", [(2, 1), (3, 2), (1, 2), (2, 1, 2), (1,)])
def test_the_gradient_of_the_scores_is_that_of_what_is_added_to_them(
    heads: tuple[int, ...],
) -> None:
    """The position-position block is added to the scores of every sequence, whatever its tokens."""
    model = of_heads(*heads)
    watcher = watch(model, two_parents(LENGTH))
    loss = soft_cross_entropy(model(watcher.batch.tokens), watcher.batch.target, epsilon=1e-3)
    (gradient,) = torch.autograd.grad(loss, model.parameters_by_name["A1"])
    expected = -gradient[: heads[0], S : S + LENGTH, S : S + LENGTH]
    observation = watcher.observe()
    gradient = observation.matrices["gradient/scores"]
    several = heads[0] > 1
    assert gradient.shape == ((heads[0], LENGTH, LENGTH) if several else (LENGTH, LENGTH))
    expected = expected if several else expected[0]
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    assert observation.figures["loss/eval"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_gradient_of_the_pattern_of_every_head_is_that_of_a_free_pattern() -> None:
    """By the definition with patterns in place of softmax: W reads what layer 1 copied."""
    model = of_heads(2)
    watcher = watch(model, two_parents(LENGTH))
    tokens = watcher.batch.tokens
    h = torch.cat(
        [torch.nn.functional.one_hot(tokens, S), torch.eye(LENGTH).expand(len(tokens), -1, -1)], -1
    )
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
    patterns = [(h @ a.detach() @ h.mT + mask).softmax(-1).requires_grad_() for a in model.A(0)]
    stream = torch.cat([h, *(pattern @ h for pattern in patterns)], -1)
    prediction = (stream[:, -1] @ model.W).softmax(-1)
    soft_cross_entropy(prediction, watcher.batch.target, epsilon=1e-3).backward()
    gradient = watcher.observe().matrices["gradient/pattern"]
    for head, pattern in enumerate(patterns):
        assert pattern.grad is not None
        row = -pattern.grad.sum(0)[-1]
        expected = row - row.mean()
        assert (gradient[head, -1] - expected).norm() < 1e-4 * expected.norm()
        assert not gradient[head, :-1].any()


def test_figures_of_two_heads_stand_beside_those_of_their_sum() -> None:
    graph = two_parents(LENGTH)
    watcher = watch(of_heads(2, 1), graph)
    observation = watcher.observe()
    figures, matrices = observation.figures, observation.matrices
    n_keys = torch.arange(1.0, LENGTH + 1).unsqueeze(1)
    for prefix, gradient in (
        ("gradient/", matrices["gradient/scores"].sum(0)),
        ("gradient/pattern_", matrices["gradient/pattern"].sum(0) / n_keys),
        ("gradient/head0/pattern_", matrices["gradient/pattern"][0] / n_keys),
        ("gradient/head1/pattern_", matrices["gradient/pattern"][1] / n_keys),
    ):
        expected = gradient_figures(gradient, watcher.theory, prefix=prefix)
        present = {k: v for k, v in expected.items() if k in figures}
        assert {k: figures[k] for k in present} == pytest.approx(present)
        assert present.keys() >= {prefix + name for name in ("edge_hits", "chi2_correlation")}
    assert "gradient/head2/pattern_edge_hits" not in figures
    one = watch(of_heads(1, 1), graph).observe().figures
    assert not any(name.startswith("gradient/head") for name in one)
    assert {"graph/rows_matched", "graph/query_attention"} <= one.keys()
    assert "graph/head_consistency" in figures
    assert "graph/head_consistency" not in one


@pytest.mark.parametrize("heads", [(2, 1), (1, 2), (3, 1), (1, 1, 2)])
def test_idle_heads_are_never_shown(heads: tuple[int, ...]) -> None:
    observation = watch(of_heads(*heads), two_parents(LENGTH)).observe()
    last = len(heads) - 1
    expected = {
        f"composition/L{last}H{later}_reads_L{layer}H{earlier}"
        for later in range(heads[last])
        for layer in range(last)
        for earlier in range(heads[layer])
    }
    assert {name for name in observation.figures if name.startswith("composition/")} == expected
    named = {name.split("/")[1] for name in observation.figures if name.startswith("blocks/A")}
    assert named == {f"A{i + 1}.{head}" for i, n in enumerate(heads) for head in range(n)}
    shape = (LENGTH, LENGTH) if heads[0] == 1 else (heads[0], LENGTH, LENGTH)
    shapes = {name: matrix.shape for name, matrix in observation.matrices.items()}
    assert shapes.pop("attention/examples") == (4, heads[-1], LENGTH)
    assert set(shapes.values()) == {shape}


def test_an_idle_head_lends_nothing_to_the_induction_score() -> None:
    """Layer 2's head looks at itself alone; its idle neighbour would attend uniformly."""
    model = of_heads(2, 1)
    model.initialise()
    with torch.no_grad():
        model.block(1, 0, "position", "position").copy_(100 * torch.eye(LENGTH))
    figures = watch(model, two_parents(LENGTH)).observe().figures
    assert figures["induction/score"] < 1e-6
    assert figures["induction/prefix_matching"] < 1e-6


def test_blocks_and_composition_are_numbers_after_a_step() -> None:
    model = DisentangledTransformer(S, LENGTH, (2, 1))
    model.initialise(scale=1e-4, generator=seeded())
    watcher = watch(model, two_parents(LENGTH))
    start = watcher.observe().figures
    assert math.isnan(start["blocks/solution_share"])  # W is 0, and so is every gradient
    optimizer = torch.optim.Adam(model.parameters_by_name.values(), lr=0.01)
    for _ in range(2):  # the first moves W alone
        optimizer.zero_grad()
        prediction = model(watcher.batch.tokens)
        soft_cross_entropy(prediction, watcher.batch.target, epsilon=1e-3).backward()
        optimizer.step()
    figures = watcher.observe().figures
    weights = {k: v for k, v in figures.items() if k.startswith(("blocks/", "composition/"))}
    assert len(weights) == 2 * 4 + 36 + 12 + 1 + 2
    assert all(map(math.isfinite, weights.values()))
    assert 0 < figures["blocks/solution_share"] < 1
    for matrix in ("A1.0/", "A1.1/", "A2.0/", "W/"):
        shares = [v for k, v in weights.items() if k.startswith(f"blocks/{matrix}")]
        assert sum(shares) == pytest.approx(1.0)


def test_the_ideal_solution_of_two_parents_looks_ideal() -> None:
    graph = two_parents(LENGTH)
    model = DisentangledTransformer(S, LENGTH, (2, 1))
    model.set_ideal(graph, strength=100.0, beta=50.0)
    figures = watch(model, graph).observe().figures
    for name in ("recovered", "parent_attention", "rows_matched", "head_consistency"):
        assert figures[f"graph/{name}"] == pytest.approx(1.0)
    assert figures["graph/query_attention"] == pytest.approx(1.0)
    assert figures["blocks/solution_share"] == pytest.approx(1.0)
    assert figures["induction/score"] > 0.7
    reads = [figures[f"composition/L1H0_reads_L0H{head}"] for head in range(2)]
    assert min(reads) > 0


def test_every_look_sees_the_models_own_attention_and_prediction(look: Look) -> None:
    standard = StandardTransformer(standard_config(S, LENGTH, n_heads=2, d_model=16, d_mlp=8))
    watchers = [look[1], *(watch(m, two_parents(LENGTH)) for m in (of_heads(2, 1), standard))]
    for watcher in watchers:
        first, second = watcher.observe(), watcher.observe()
        assert first.figures == pytest.approx(second.figures, nan_ok=True)
        with torch.no_grad():
            prediction = watcher.model(watcher.batch.tokens)
            pattern = watcher.model.layer1_attention(watcher.batch.tokens).mean(0)
        assert first.prediction is not None
        torch.testing.assert_close(first.prediction, prediction, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(first.matrices["attention/layer0"], pattern.squeeze(0))


def test_long_sequences_are_summed_to_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where the order of additions cannot show."""
    model, graph = random_model(), icl_pairs(T - 1)

    def look_with(most: int) -> Observation:
        monkeypatch.setattr("mechcausal.measures.closed_form_observer._MOST_ENTRIES", most)
        return observe_with(model, graph, ClosedFormObserver).observe()

    long, short = look_with(0), look_with(10**9)
    assert long.figures.keys() == short.figures.keys()
    for name, value in short.figures.items():
        assert long.figures[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name
    for name, matrix in short.matrices.items():
        torch.testing.assert_close(long.matrices[name], matrix, rtol=1e-4, atol=1e-7)
