"""The figure of interventions shows every effect at its row, with its standard error."""

import pytest
from matplotlib.axes import Axes

from mechcausal.graphs import CausalGraph, chain, two_parents
from mechcausal.measures.interventions import EdgeEffects, InterventionEffect, edge_effects
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.pictures.static.effect_figures import draw_edge_effects
from mechcausal.tasks import Batch, build_task
from mechcausal.tasks.priors import DirichletPrior
from tests.oracles import forest, seeded
from tests.pictures.test_paper_figures import check_picture


def sample(graph: CausalGraph, n: int = 64) -> Batch:
    task = build_task(graph, DirichletPrior.symmetric(0.3, vocab_size=3))
    return task.sample(n, generator=seeded(1))


def dots(axis: Axes) -> dict[str, list[tuple[float, float]]]:
    """Row and rise of every dot, by the label of its kind."""
    positions = {}
    for container in axis.containers:
        line = container.lines[0]  # type: ignore[attr-defined]
        pairs = zip(line.get_xdata(), line.get_ydata(), strict=True)
        positions[str(container.get_label())] = [(round(x), float(y)) for x, y in pairs]
    return positions


def means(axis: Axes) -> list[float]:
    return [float(patch.get_height()) for patch in axis.patches]  # type: ignore[attr-defined]


def test_every_effect_is_a_dot_at_its_row_and_every_mean_a_bar() -> None:
    graph = chain(6)
    model = SimplifiedTransformer(3, 7)
    model.set_ideal(graph)
    effects = edge_effects(model, graph, sample(graph), epsilon=1e-3)
    figure = draw_edge_effects(effects, "a chain")
    check_picture(figure)
    by_row, bars = figure.axes
    expected = {
        label: [(effect.child, effect.rise) for effect in effects.of(kind)]
        for kind, label in (
            ("edge", "edge knocked out"),
            ("redirect", "edge to a wrong parent"),
            ("non_edge", "non-edge knocked out"),
        )
    }
    assert dots(by_row) == expected
    assert len(expected["edge knocked out"]) == len(graph.edges)
    assert means(bars) == [effects.means[kind][0] for kind in ("edge", "redirect", "non_edge")]
    legend = by_row.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == set(expected)
    assert figure.get_suptitle() == "a chain"


def test_effects_of_several_parents_are_drawn() -> None:
    graph = two_parents(7)
    model = DisentangledTransformer(3, 7, (2, 1))
    model.set_ideal(graph)
    effects = edge_effects(model, graph, sample(graph), epsilon=1e-3)
    figure = draw_edge_effects(effects, "two parents")
    check_picture(figure)
    rows = [row for row, _ in dots(figure.axes[0])["edge knocked out"]]
    assert rows == [child for child, parents in enumerate(graph.parents[:-1]) for _ in parents]


@pytest.mark.parametrize("graph", [forest(-1, 0), forest(-1, -1, -1)])
def test_few_edges_or_none_are_drawn_too(graph: CausalGraph) -> None:
    model = SimplifiedTransformer(3, graph.sequence_length)
    model.set_ideal(graph)
    check_picture(
        draw_edge_effects(edge_effects(model, graph, sample(graph), epsilon=1e-3), "forest")
    )


def test_a_single_sequence_has_no_standard_error_and_is_drawn() -> None:
    effect = InterventionEffect("edge", 0.5, float("nan"), 1.0, child=2, parent=1, head=0)
    figure = draw_edge_effects(EdgeEffects((effect,), {"edge": (0.5, float("nan"))}), "one")
    check_picture(figure)
    assert dots(figure.axes[0]) == {"edge knocked out": [(2, 0.5)]}
