"""Edges of the graph are used and non-edges are not: by exact counts, and on a model trained."""

import pytest
import torch
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.graphs.presets import chain, icl_pairs, k_gram, random_forest, two_parents
from mechcausal.measures.interventions import (
    InterventionEffect,
    Kind,
    edge_effects,
    patch_ideal,
    sequence_losses,
)
from mechcausal.models.base import GraphModel
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.tasks import Batch, SingleParentTask, build_task, soft_cross_entropy
from mechcausal.tasks.priors import DirichletPrior
from probes import edit_attention, knock_out
from tests.oracles import forest, seeded

close = torch.testing.assert_close
EPSILON = 1e-3


def sample(graph: CausalGraph, *, vocab_size: int, n: int = 256, seed: int = 0) -> Batch:
    prior = DirichletPrior.symmetric(0.1, vocab_size=vocab_size)
    return build_task(graph, prior).sample(n, generator=seeded(seed))


def ideal(
    graph: CausalGraph, *, vocab_size: int, strength: float = 200.0, beta: float = 5.0
) -> SimplifiedTransformer:
    """At strength 200 the pattern is one-hot to the last bit."""
    model = SimplifiedTransformer(vocab_size, graph.sequence_length)
    model.set_ideal(graph, strength=strength, beta=beta)
    return model


def losses_by_hand(model: SimplifiedTransformer, pattern: Tensor, batch: Batch) -> Tensor:
    """From the model's formula, with a layer-1 pattern given; without hooks."""
    one_hot = torch.nn.functional.one_hot(batch.tokens, model.vocab_size).float()
    scores = pattern @ one_hot @ model.A2 @ one_hot[:, -1:].mT
    f = (scores.softmax(1) * one_hot).sum(1)
    smoothed = (f + EPSILON) / (1 + model.vocab_size * EPSILON)
    return -(batch.target * smoothed.log()).sum(1).double()


def pair(effect: InterventionEffect) -> tuple[int, int]:
    """The edge, or the non-edge, (parent, child)."""
    assert effect.parent is not None
    assert effect.child is not None
    return effect.parent, effect.child


def trained() -> tuple[SimplifiedTransformer, CausalGraph, Batch]:
    """Algorithm 1 on a forest of 11 positions, 150 + 150 steps, and sequences not trained on."""
    graph = random_forest(11, edge_probability=0.8, generator=seeded(4))
    task = SingleParentTask(graph, DirichletPrior.symmetric(0.1, vocab_size=3))
    model = SimplifiedTransformer(3, 12)
    model.initialise(beta0=1.0)
    generator = seeded(1)
    for name, lr in (("A1", 0.1), ("A2", 0.05)):
        optimizer = torch.optim.Adam([model.parameters_by_name[name]], lr=lr)
        for _ in range(150):
            batch = task.sample(512, generator=generator)
            optimizer.zero_grad()
            soft_cross_entropy(model(batch.tokens), batch.target, epsilon=EPSILON).backward()
            optimizer.step()
    return model, graph, task.sample(2000, generator=seeded(2))


def test_losses_average_to_the_training_loss() -> None:
    graph = chain(7)
    model, batch = ideal(graph, vocab_size=3), sample(graph, vocab_size=3)
    losses = sequence_losses(model, batch, epsilon=EPSILON)
    expected = soft_cross_entropy(model(batch.tokens), batch.target, epsilon=EPSILON)
    close(losses.mean(), expected.double())
    certain = Batch(torch.tensor([[0, 1, 0]]), torch.tensor([[0.0, 1.0, 0.0]]))
    assert sequence_losses(ideal(chain(2), vocab_size=3), certain, epsilon=0.0).isfinite().all()


# --- Edges ---


def test_an_edge_matters_where_the_parent_holds_the_query() -> None:
    graph = forest(-1, 0, 1, -1, 1, 0)
    model = ideal(graph, vocab_size=4)
    batch = sample(graph, vocab_size=4, n=400)
    undisturbed = sequence_losses(model, batch, epsilon=EPSILON)
    with edit_attention(model.hooked, {0: knock_out([(2, 1)])}):
        rises = sequence_losses(model, batch, epsilon=EPSILON) - undisturbed
    # The row becomes uniform over the keys 0 and 2: without the query among the three, no change.
    touched = (batch.tokens[:, :3] == batch.tokens[:, -1:]).any(1)
    assert not rises[~touched].any()
    matches = batch.tokens[:, 1] == batch.tokens[:, -1]
    only_there = matches & (batch.tokens[:, [0, 2]] != batch.tokens[:, -1:]).all(1)
    assert only_there.any()
    # Position 2 was a match and is none any more: its token loses probability.
    weight = (batch.target * torch.eye(4)[batch.tokens[:, 2]]).sum(1)
    assert (rises[only_there & (weight > 0.9)] > 0).all()


def test_every_effect_is_what_the_formula_gives_with_that_pattern() -> None:
    graph = forest(-1, 0, 1, -1, 1, 0)
    model = ideal(graph, vocab_size=3, strength=2.0)
    batch = sample(graph, vocab_size=3)
    effects = edge_effects(model, graph, batch, epsilon=EPSILON, generator=seeded(5)).effects
    pattern = model.attention1().detach()
    undisturbed = losses_by_hand(model, pattern, batch)
    for effect in effects:
        changed = pattern.clone()
        lost: list[tuple[int, int]] = []
        if effect.kind in ("edge", "non_edge"):
            lost = [pair(effect)]
        elif effect.kind == "all_edges":
            lost = list(graph.edges)
        elif effect.kind == "redirect":
            old, new = pattern[effect.child, [effect.parent, effect.new_parent]]
            changed[effect.child, effect.parent] = new
            changed[effect.child, effect.new_parent] = old
        else:
            assert effect.kind == "roots"
            changed[3] = torch.tensor([0.25] * 4 + [0.0] * 3)
        for parent, child in lost:
            changed[child, parent] = 0.0
            changed[child] /= changed[child].sum()
        rises = losses_by_hand(model, changed, batch) - undisturbed
        assert effect.loss == pytest.approx(undisturbed.mean().item(), abs=1e-6)
        assert effect.rise == pytest.approx(rises.mean().item(), abs=1e-6)
        assert effect.stderr == pytest.approx(rises.std().item() / 16, abs=1e-6)


def test_keys_without_attention_change_nothing() -> None:
    graph = random_forest(11, edge_probability=0.8, generator=seeded(4))
    model, batch = ideal(graph, vocab_size=3), sample(graph, vocab_size=3)
    measured = edge_effects(model, graph, batch, epsilon=EPSILON)
    assert len(measured.of("non_edge")) == len(measured.of("edge")) == len(graph.edges)
    for effect in measured.of("non_edge"):
        assert abs(effect.rise) < 1e-7
    (roots,) = measured.of("roots")
    # The ideal rows of roots are uniform already.
    assert abs(roots.rise) < 1e-7
    assert measured.means["edge"][0] > 5 * measured.means["edge"][1]


def test_what_is_done_where() -> None:
    graph = forest(-1, 0, 0, 2, -1, 4)
    model, batch = ideal(graph, vocab_size=3), sample(graph, vocab_size=3, n=16)
    measured = edge_effects(model, graph, batch, epsilon=EPSILON)
    assert [pair(effect) for effect in measured.of("edge")] == list(graph.edges)
    assert [pair(effect) for effect in measured.of("redirect")] == list(graph.edges)
    for effect in measured.of("non_edge"):
        key, child = pair(effect)
        assert 0 <= key <= child
        assert (key, child) not in graph.edges
    for effect in measured.of("redirect"):
        parent, child = pair(effect)
        # Position 1 has no other earlier position: it copies itself.
        allowed = {1} if child == 1 else set(range(child)) - {parent}
        assert effect.new_parent in allowed
    assert {effect.head for effect in measured.effects} == {0, None}
    counts = {kind: len(measured.of(kind)) for kind in ("all_edges", "roots", "query")}
    assert counts == {"all_edges": 1, "roots": 1, "query": 0}


def test_draws_follow_the_generator() -> None:
    graph = chain(9)
    model, batch = ideal(graph, vocab_size=3), sample(graph, vocab_size=3, n=8)

    def drawn(seed: int | None) -> list[int | None]:
        generator = None if seed is None else seeded(seed)
        measured = edge_effects(model, graph, batch, epsilon=EPSILON, generator=generator)
        return [effect.new_parent or effect.parent for effect in measured.effects]

    state = torch.get_rng_state()
    assert drawn(None) == drawn(0)
    assert drawn(0) != drawn(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_and_figures_are_plain() -> None:
    graph = icl_pairs(5)
    model, batch = ideal(graph, vocab_size=3), sample(graph, vocab_size=3, n=16)
    measured = edge_effects(model, graph, batch, epsilon=EPSILON)
    rows = measured.rows()
    assert len(rows) == len(measured.effects) == 3 * 2 + 2
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert {type(value) for row in rows for value in row.values()} <= {str, int, float, type(None)}
    figures = measured.figures()
    for kind in ("edge", "non_edge", "redirect"):
        mean = sum(effect.rise for effect in measured.of(kind)) / 2
        assert figures[f"interventions/{kind}_rise"] == pytest.approx(mean)
    difference = figures["interventions/edge_rise"] - figures["interventions/non_edge_rise"]
    assert figures["interventions/edge_minus_non_edge_rise"] == pytest.approx(difference)
    (everything,) = measured.of("all_edges")
    assert figures["interventions/all_edges_rise"] == everything.rise
    assert figures["interventions/all_edges_stderr"] == everything.stderr


def test_a_graph_without_edges_has_only_roots() -> None:
    graph = forest(-1, -1, -1)
    model, batch = ideal(graph, vocab_size=3), sample(graph, vocab_size=3, n=8)
    measured = edge_effects(model, graph, batch, epsilon=EPSILON)
    assert [effect.kind for effect in measured.effects] == ["roots"]
    assert measured.means == {}
    for effect in patch_ideal(model, graph, batch, epsilon=EPSILON):
        assert abs(effect.rise) < 1e-7


# --- Ideal patterns ---


def by_kind(effects: tuple[InterventionEffect, ...]) -> dict[Kind, InterventionEffect]:
    return {effect.kind: effect for effect in effects}


def test_ideal_into_ideal_changes_nothing() -> None:
    graph = random_forest(11, edge_probability=0.8, generator=seeded(4))
    model, batch = ideal(graph, vocab_size=3, strength=50.0), sample(graph, vocab_size=3)
    effects = by_kind(patch_ideal(model, graph, batch, epsilon=EPSILON, beta=5.0))
    assert set(effects) == {
        "ideal_into_trained",
        "trained_into_ideal",
        "whole_trained_into_ideal",
    }
    for effect in effects.values():
        assert abs(effect.rise) < 1e-7
        assert effect.stderr < 1e-7
        assert effect.loss == pytest.approx(
            sequence_losses(model, batch, epsilon=EPSILON).mean().item(), abs=1e-6
        )


def test_the_ideal_pattern_repairs_layer_1_and_an_untrained_one_spoils_the_ideal_model() -> None:
    graph = chain(11)
    model = SimplifiedTransformer(3, 12)
    model.initialise(beta0=5.0)
    batch = sample(graph, vocab_size=3, n=500)
    effects = by_kind(patch_ideal(model, graph, batch, epsilon=EPSILON, beta=5.0))
    undisturbed = sequence_losses(ideal(graph, vocab_size=3), batch, epsilon=EPSILON).mean().item()
    repaired = effects["ideal_into_trained"]
    # Untrained rows are uniform, as the ideal rows of roots and of the query are.
    assert repaired.loss + repaired.rise == pytest.approx(undisturbed, abs=1e-6)
    assert repaired.rise < -10 * repaired.stderr
    for kind in ("trained_into_ideal", "whole_trained_into_ideal"):
        assert effects[kind].loss == pytest.approx(undisturbed, abs=1e-6)
        assert effects[kind].rise == pytest.approx(-repaired.rise, abs=1e-6)


# --- A model that learned the graph ---


def test_a_trained_model_uses_every_edge_and_nothing_else_and_its_pattern_is_ideal() -> None:
    model, graph, batch = trained()
    measured = edge_effects(model, graph, batch, epsilon=EPSILON)
    for effect in measured.of("edge"):
        assert effect.rise > 3 * effect.stderr
    smallest = min(effect.rise for effect in measured.of("edge"))
    for effect in measured.of("non_edge"):
        assert abs(effect.rise) < 0.2 * smallest
    rise, stderr = measured.means["edge_minus_non_edge"]
    assert rise > 10 * stderr
    assert measured.means["redirect"][0] > 10 * measured.means["redirect"][1]
    (everything,) = measured.of("all_edges")
    assert everything.rise > 10 * everything.stderr
    assert everything.rise > measured.means["edge"][0]
    effects = by_kind(patch_ideal(model, graph, batch, epsilon=EPSILON))
    for kind in ("ideal_into_trained", "trained_into_ideal"):
        assert abs(effects[kind].rise) < 0.02 * everything.rise


# --- Several heads, several parents ---


def hand_built(graph: CausalGraph, *, swapped: bool = False) -> DisentangledTransformer:
    model = DisentangledTransformer(3, graph.sequence_length, (2, 1))
    model.set_ideal(graph)
    if swapped:
        # In one row the heads take each other's parent.
        with torch.no_grad():
            first, second = (model.block(0, head, "position", "position") for head in (0, 1))
            row = first[4].clone()
            first[4], second[4] = second[4], row
    return model


@pytest.mark.parametrize("swapped", [False, True])
def test_heads_are_matched_to_parents_row_by_row(swapped: bool) -> None:
    graph = two_parents(8)
    model, batch = hand_built(graph, swapped=swapped), sample(graph, vocab_size=3, n=64)
    measured = edge_effects(model, graph, batch, epsilon=EPSILON)
    heads = {(effect.child, effect.parent): effect.head for effect in measured.of("edge")}
    assert (heads[4, 1], heads[4, 3]) == ((1, 0) if swapped else (0, 1))
    assert (heads[6, 2], heads[6, 5]) == (0, 1)
    (effect,) = patch_ideal(model, graph, batch, epsilon=EPSILON)
    assert effect.kind == "ideal_into_trained"
    # But for position 1, of one parent and a head to spare, the hand-built pattern is the ideal.
    if swapped:
        with torch.no_grad():
            model.block(0, 1, "position", "position")[1, 0] = 50.0
        (effect,) = patch_ideal(model, graph, batch, epsilon=EPSILON)
        assert abs(effect.rise) < 1e-6


def test_the_last_row_serves_the_query() -> None:
    graph = k_gram(8, 2)
    model, batch = hand_built(graph), sample(graph, vocab_size=3, n=400)
    measured = edge_effects(model, graph, batch, epsilon=EPSILON)
    assert max(pair(effect)[1] for effect in measured.of("edge")) == 6
    (query,) = measured.of("query")
    assert (query.child, query.head) == (7, None)
    with edit_attention(model.hooked, {0: knock_out([(7, 6), (7, 7)])}):
        without = sequence_losses(model, batch, epsilon=EPSILON)
    rises = without - sequence_losses(model, batch, epsilon=EPSILON)
    assert query.rise == pytest.approx(rises.mean().item(), abs=1e-6)
    assert "interventions/query_rise" in measured.figures()


def test_more_parents_than_heads_have_no_ideal_pattern() -> None:
    graph = two_parents(6)
    model = DisentangledTransformer(3, 6, (1, 1))
    batch = sample(graph, vocab_size=3, n=8)
    with pytest.raises(ValueError, match="position 2 has 2 parents, layer 1 1 heads"):
        patch_ideal(model, graph, batch, epsilon=EPSILON)
    assert edge_effects(model, graph, batch, epsilon=EPSILON).of("query")


@pytest.mark.parametrize("call", [edge_effects, patch_ideal])
def test_lengths_must_agree(call) -> None:
    model: GraphModel = ideal(chain(5), vocab_size=3)
    batch = sample(chain(5), vocab_size=3, n=4)
    with pytest.raises(ValueError, match="sequences of 6, 5 and 6 tokens"):
        call(model, chain(4), batch, epsilon=EPSILON)
