"""The loss of the hand-built solution: its numbers, its scales, and that it disturbs nothing."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar

from mechcausal.graphs import CausalGraph, chain, icl_pairs, k_gram, random_tree, two_parents
from mechcausal.measures.closed_form_observer import ClosedFormObserver
from mechcausal.measures.construction import Construction, best_construction
from mechcausal.measures.observer import Observer
from mechcausal.models.base import GraphModel
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.models.standard import StandardTransformer, standard_config
from mechcausal.tasks import Batch, GraphTask, SingleParentTask, build_task, cross_entropies
from mechcausal.tasks.priors import DirichletPrior, FixedTransition
from mechcausal.theory import Information, pairwise_theory, parent_information
from tests.left_as_found import left_as_found
from tests.oracles import forest, seeded

S, T = 3, 10
FOREST = forest(-1, 0, -1, 1, -1, 3, -1, 5, 0)


def task_of(graph: CausalGraph, alpha: float = 0.2) -> GraphTask:
    return build_task(graph, DirichletPrior.symmetric(alpha, S))


def observer_of(model: GraphModel, task: GraphTask, kind: type[Observer] = Observer) -> Observer:
    theory: Information
    if isinstance(task, SingleParentTask):
        theory = pairwise_theory(task.graph, task.prior, n_priors=20, generator=seeded(1))
    else:
        theory = parent_information(task, n_priors=20, generator=seeded(1))
    options: dict[str, Any] = {
        "n_sequences": 200,
        "epsilon": 1e-3,
        "bayes_draws": 4,
        "generator": seeded(2),
    }
    return kind(model, task, theory, **options)


def of(model: GraphModel, graph: CausalGraph, batch: Batch, epsilon: float = 1e-3) -> Construction:
    built = best_construction(model, graph, batch, epsilon=epsilon)
    assert built is not None
    return built


# --- Its numbers ---


def test_the_loss_of_one_chain_by_hand() -> None:
    # What each position's parents hold of the query's token 0: the query itself sees three in six.
    tokens = torch.tensor([[2, 0, 1, 0, 1, 0]])  # matches 0, 0, 1, 0, 1, 1/2
    target = torch.tensor([[0.3, 0.6, 0.1]])

    def by_hand(beta: float) -> float:
        match, half = math.exp(beta), math.exp(beta / 2)
        weights = [2 + half, 2 * match, 1.0]
        total = sum(weights)
        shares = [(w / total + 1e-3) / 1.003 for w in weights]
        return -sum(t * math.log(f) for t, f in zip((0.3, 0.6, 0.1), shares, strict=True))

    best = minimize_scalar(by_hand, bounds=(0, 5), method="bounded", options={"xatol": 1e-6})
    built = of(SimplifiedTransformer(3, 6), chain(5), Batch(tokens, target))
    assert built.loss == pytest.approx(best.fun, abs=1e-7)
    assert built.beta == pytest.approx(best.x, rel=1e-3)
    assert built.gain is None


def test_the_loss_of_one_sequence_with_two_parents_by_hand() -> None:
    # Contexts of positions 2 to 4: (0, 1), (1, 2), (2, 0); the query's is (0, 1).
    graph = k_gram(6, 2)
    tokens = torch.tensor([[0, 1, 2, 0, 0, 1]])
    # The roots 0 and 1 see means: token 0 alone, and a zero and a one; row 5 is the query's own.
    matches = [1 + 0, 1 / 2 + 1 / 2, 1 + 1, 0 + 0, 0 + 0]
    target = torch.tensor([[0.2, 0.1, 0.7]])

    def by_hand(beta: float, gain: float) -> float:
        weights = [math.exp(beta * m) for m in matches]
        shares = [0.0, 0.0, 0.0]
        for token, weight in zip((0, 1, 2, 0, 0), weights, strict=True):
            shares[token] += weight / sum(weights)
        total = sum(math.exp(gain * share) for share in shares)
        logs = [gain * share - math.log(total) for share in shares]
        return -sum(t * log for t, log in zip((0.2, 0.1, 0.7), logs, strict=True))

    built = of(DisentangledTransformer(3, 6, (2, 1)), graph, Batch(tokens, target), epsilon=0.0)
    assert built.gain is not None
    assert built.loss == pytest.approx(by_hand(built.beta, built.gain), abs=1e-6)
    neighbours = [(built.beta * b, built.gain * g) for b in (0.9, 1.1) for g in (0.9, 1.1)]
    assert all(built.loss <= by_hand(*scales) + 1e-9 for scales in neighbours)


MODELS: list[tuple[GraphModel, CausalGraph]] = [
    (SimplifiedTransformer(S, T), chain(T - 1)),
    (SimplifiedTransformer(S, T), icl_pairs(T - 1)),
    (SimplifiedTransformer(S, T), FOREST),
    (DisentangledTransformer(S, T, (1, 1)), random_tree(T - 1, generator=seeded(4))),
    (DisentangledTransformer(S, T, (2, 2)), FOREST),
    (DisentangledTransformer(S, T, (2, 1)), two_parents(T)),
    (DisentangledTransformer(S, T, (3, 1)), k_gram(T, 3)),
]
IDS = ["chain", "pairs", "forest", "tree", "forest_heads", "two_parents", "fourgrams"]


@pytest.mark.parametrize(("model", "graph"), MODELS, ids=IDS)
def test_a_model_set_to_the_construction_has_its_loss(
    model: GraphModel, graph: CausalGraph
) -> None:
    watcher = observer_of(model, task_of(graph))
    built = watcher.construction
    assert built is not None
    if isinstance(model, DisentangledTransformer):
        model.set_ideal(graph, beta=built.beta, gain=built.gain)
    else:
        assert isinstance(model, SimplifiedTransformer)
        model.set_ideal(graph, beta=built.beta)
    losses = watcher.losses()
    assert losses["loss/construction"] == built.loss
    assert losses["loss/eval"] == pytest.approx(built.loss, abs=1e-5)
    assert losses["loss/construction_gap"] == pytest.approx(0.0, abs=1e-5)
    # The best predictor on average; on a few sequences within its standard error.
    assert losses["loss/bayes"] < built.loss + 2 * watcher.bayes.stderr


@pytest.mark.parametrize(("model", "graph"), MODELS, ids=IDS)
def test_no_other_scale_does_better(model: GraphModel, graph: CausalGraph) -> None:
    batch = task_of(graph).sample(150, generator=seeded(3))
    built = of(model, graph, batch)
    for beta in (0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0):
        for gain in (1.0, 2.0, 3.0, 5.0, 8.0) if built.gain else (None,):
            if isinstance(model, DisentangledTransformer):
                model.set_ideal(graph, beta=beta, gain=gain)
            else:
                assert isinstance(model, SimplifiedTransformer)
                model.set_ideal(graph, beta=beta)
            prediction = model(batch.tokens).detach()
            loss = cross_entropies(prediction, batch.target, epsilon=1e-3).mean().item()
            assert built.loss <= loss + 1e-6


def test_a_known_matrix_without_noise_is_read_off() -> None:
    rows = tuple(tuple(float(p) for p in row) for row in torch.eye(S).roll(1, dims=1).tolist())
    batch = build_task(chain(T - 1), FixedTransition(rows)).sample(300, generator=seeded(3))
    built = of(SimplifiedTransformer(S, T), chain(T - 1), batch)
    assert math.isfinite(built.loss)
    assert built.beta > 5


def test_without_smoothing_a_token_never_seen_costs_without_end() -> None:
    tokens = torch.tensor([[0, 1, 0, 1, 0, 1]])
    batch = Batch(tokens, torch.tensor([[0.5, 0.4, 0.1]]))
    built = of(SimplifiedTransformer(3, 6), chain(5), batch, epsilon=0.0)
    assert built.loss == math.inf


@pytest.mark.parametrize("graph", [chain(T - 1), FOREST], ids=["chain", "forest"])
def test_rows_without_parents_do_best_when_uniform(graph: CausalGraph) -> None:
    batch = task_of(graph).sample(2000, generator=seeded(5))
    model = SimplifiedTransformer(S, T)
    built = of(model, graph, batch)
    others = [i for i in range(T) if i >= len(graph.parents) or not graph.parents[i]]
    for key in ("itself", "first"):

        def loss(beta: float, key: str = key) -> float:
            model.set_ideal(graph, beta=beta)
            with torch.no_grad():
                for row in others:
                    model.A1[row, row if key == "itself" else 0] = 50.0
                prediction = model(batch.tokens)
            return cross_entropies(prediction, batch.target, epsilon=1e-3).mean().item()

        best = minimize_scalar(loss, bounds=(0.05, 20), method="bounded")
        assert built.loss < best.fun


def test_choosing_the_scales_on_the_sequences_hardly_flatters() -> None:
    """What the choice gains is below the standard error of the loss itself."""
    graph, model = chain(T - 1), DisentangledTransformer(S, T, (1, 1))
    many = task_of(graph).sample(4000, generator=seeded(7))
    gains, right = [], of(model, graph, many)
    for part in range(8):
        few = many[part * 250 : (part + 1) * 250]
        built = of(model, graph, few)
        model.set_ideal(graph, beta=right.beta, gain=right.gain or 0.0)
        loss = cross_entropies(model(few.tokens).detach(), few.target, epsilon=1e-3)
        gains.append(loss.mean().item() - built.loss)
        assert -1e-5 < gains[-1] < loss.std().item() / math.sqrt(len(few))
    assert sum(gains) / len(gains) < 0.01


# --- Where there is none ---


@pytest.mark.parametrize(
    ("model", "graph"),
    [
        (StandardTransformer(standard_config(S, T, n_layers=2), seed=0), chain(T - 1)),
        (DisentangledTransformer(S, T, (1, 1, 1)), chain(T - 1)),
        (DisentangledTransformer(S, T, (1, 1)), two_parents(T)),
    ],
    ids=["standard", "three_layers", "too_few_heads"],
)
def test_other_models_have_none(model: GraphModel, graph: CausalGraph) -> None:
    losses = observer_of(model, task_of(graph)).losses()
    assert set(losses) == {"loss/eval", "loss/bayes", "loss/gap"}


# --- It disturbs nothing ---


def test_the_model_and_all_generators_stay_as_they_are() -> None:
    model, batch = (
        SimplifiedTransformer(S, T),
        task_of(chain(T - 1)).sample(50, generator=seeded(3)),
    )
    model.parameters_by_name["A1"].grad = torch.ones_like(model.parameters_by_name["A1"])
    tokens, target = batch.tokens.clone(), batch.target.clone()
    with left_as_found(model.hooked):
        assert of(model, chain(T - 1), batch) == of(model, chain(T - 1), batch)
    assert torch.equal(batch.tokens, tokens)
    assert torch.equal(batch.target, target)


def test_the_weights_play_no_part() -> None:
    batch = task_of(chain(T - 1)).sample(50, generator=seeded(3))
    one, other = SimplifiedTransformer(S, T), SimplifiedTransformer(S, T)
    other.set_ideal(chain(T - 1), beta=9.0)
    assert of(one, chain(T - 1), batch) == of(other, chain(T - 1), batch)


def test_members_of_a_batch_have_the_same() -> None:
    task = task_of(FOREST)
    single, member = (
        observer_of(SimplifiedTransformer(S, T), task, kind)
        for kind in (Observer, ClosedFormObserver)
    )
    assert single.construction == member.construction
    assert member.observe().figures["loss/construction"] == single.losses()["loss/construction"]


def test_parts_of_the_sequences_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = task_of(FOREST).sample(50, generator=seeded(3))
    model = SimplifiedTransformer(S, T)
    together = of(model, FOREST, batch)
    monkeypatch.setattr("mechcausal.measures.construction._MAX_ENTRIES", 7 * T)
    apart = of(model, FOREST, batch)
    assert replace(apart, beta=together.beta) == replace(together, loss=apart.loss)
    assert apart.loss == pytest.approx(together.loss, abs=1e-12)
