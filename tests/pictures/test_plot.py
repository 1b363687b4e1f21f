"""Interactive pictures: they hold the numbers of the run, for every kind of graph."""

from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from mechcausal import plot
from mechcausal.pictures.interactive.comparison import groups
from mechcausal.pictures.interactive.graph import WRONG
from mechcausal.pictures.static.style import REFERENCE_GREY
from mechcausal.recipes import Recipe, parse_recipe
from mechcausal.records.run_data import RunData, RunDataError
from tests.run_folders import heads_recipe, recipe_of, run_of, two_parents_recipe

MATRICES = (
    plot.attention,
    plot.gradient,
    plot.gradient_scatter,
    plot.examples,
    plot.causal_graph,
)
CURVES = (
    plot.loss,
    plot.gap,
    plot.recovery,
    plot.correlations,
    plot.formation,
    plot.strategies,
    plot.composition,
)


def manual(*parents: int) -> Recipe:
    data = {"graph": {"preset": "manual", "parents": list(parents)}, "task": {"vocab_size": 3}}
    return parse_recipe(data, source="test")


@pytest.mark.parametrize(
    "recipe",
    [
        recipe_of(),
        manual(-1),
        manual(-1, -1, -1),
        manual(-1, 0, 0, 1, 2),
        recipe_of(graph__preset="icl_pairs"),
        recipe_of(graph__sequence_length=100),
        two_parents_recipe(),
        two_parents_recipe(45),
    ],
    ids=["chain", "two tokens", "no edges", "tree", "pairs", "long", "two parents", "both"],
)
def test_every_picture_is_drawn_for_every_graph(recipe: Recipe) -> None:
    run = run_of(recipe)
    for draw in MATRICES:
        film = plot.film(run, draw, most_frames=2)
        assert film.to_json()
        assert [frame.name for frame in film.frames] == ["0", "40"]
        assert len(film.frames[0].data) == len(draw(run).data)
    for curve in CURVES:
        assert curve(run).to_json()


def test_heads_are_drawn_for_repeated_tokens() -> None:
    run = run_of(heads_recipe())
    figure = plot.heads(run, 13)
    assert np.array_equal(figure.data[0].z, run.frames[13]["heads/prefix_matching"])
    assert len(plot.head_scores(run).data) == 2
    for draw in (plot.causal_graph, plot.attention):
        with pytest.raises(RunDataError, match="no matrix attention/layer0"):
            draw(run)


def heatmaps(figure: go.Figure) -> list[np.ndarray]:
    return [np.asarray(trace.z) for trace in figure.data if trace.type == "heatmap"]


def test_attention_stands_beside_the_true_graph() -> None:
    run = run_of()
    attention, truth = heatmaps(plot.attention(run, 13))
    visible = np.tril(np.ones((8, 8), dtype=bool))
    assert np.array_equal(attention[visible], run.frames[13]["attention/layer0"][visible])
    assert np.isnan(attention[~visible]).all()
    assert np.array_equal(np.nan_to_num(truth), run.truth)


def test_every_head_has_a_picture_until_there_are_too_many() -> None:
    run = run_of(two_parents_recipe())
    first, second, _ = heatmaps(plot.attention(run))
    attention = run.frames[40]["attention/layer0"]
    assert np.array_equal(np.nan_to_num(first), attention[0])
    assert np.array_equal(np.nan_to_num(second), attention[1])
    many = {"attention/layer0": np.repeat(attention[:1], 12, 0) * np.arange(1, 13)[:, None, None]}
    (largest, _) = heatmaps(plot.attention(replace(run, frames={0: many}), 0))
    assert np.allclose(np.nan_to_num(largest), attention[0] * 12)


def test_theory_stands_beside_the_gradient() -> None:
    run = run_of()
    _, g, chi2 = heatmaps(plot.gradient(run))
    assert np.allclose(np.nansum(g, 1), 0, atol=1e-6)
    expected = run.references["theory/g"]
    assert g[5, 2] - g[5, 4] == pytest.approx(expected[5, 2] - expected[5, 4], abs=1e-6)
    assert np.isnan(np.diagonal(chi2)).all()  # a position's information with itself
    assert chi2[5, 4] == pytest.approx(run.references["theory/chi2"][5, 4])
    assert len(heatmaps(plot.gradient(run_of(two_parents_recipe())))) == 3  # no prediction


def test_the_scatter_pairs_gradient_and_prediction() -> None:
    run = run_of()
    others, edges, *_ = plot.gradient_scatter(run, 13).data
    assert len(others.x) + len(edges.x) == 7 * 8 // 2
    assert [tuple(pair) for pair in edges.customdata] == [(i, i - 1) for i in range(1, 7)]
    gradient = run.frames[13]["gradient/pattern"]
    for (query, key), x, y in zip(others.customdata, others.x, others.y, strict=True):
        assert x == pytest.approx(run.references["theory/gradient"][query, key], rel=1e-6)
        assert y == pytest.approx(gradient[query, key] / (query + 1), rel=1e-6)


def test_pictures_in_a_row_name_a_kind_of_mark_once() -> None:
    names = [t.name for t in plot.gradient_scatter(run_of(), 13).data if t.showlegend is not False]
    assert names == ["other pairs", "edges", "equal"]


def test_a_film_holds_the_points_of_every_step() -> None:
    run = run_of()
    first = run.steps[0]
    still = {name: np.zeros_like(matrix) for name, matrix in run.frames[first].items()}
    film = plot.film(replace(run, frames={**run.frames, first: still}), plot.gradient_scatter)
    for axis, name in ((film.layout.yaxis, "y"), (film.layout.yaxis2, "y2")):
        points = [t.y for frame in film.frames for t in frame.data if (t.yaxis or "y") == name]
        values = np.concatenate(points)
        assert axis.range[0] < values.min() < values.max() < axis.range[1]
        assert np.ptp(axis.range) < 1.2 * np.ptp(values)


def traces(figure: go.Figure, kind: str, mark: str) -> list[go.Scatter]:
    return [
        t for t in figure.data if t.meta and t.meta["as"] == kind and t.meta.get("kind") == mark
    ]


@pytest.mark.parametrize("recipe", [recipe_of(), manual(-1, 0, 0, 1, 1, 2), two_parents_recipe()])
def test_edges_are_as_wide_as_attention_and_wrong_ones_are_marked(recipe: Recipe) -> None:
    run = run_of(recipe)
    figure = plot.causal_graph(run, 13)
    attention = run.frames[13]["attention/layer0"]
    attention = attention if attention.ndim == 2 else attention.max(0)
    (true,) = traces(figure, "middles", "edge")
    assert len(true.x) == run.truth.sum()
    for row, key, share in true.customdata:
        assert share == pytest.approx(attention[int(row), int(key)])
        assert run.truth[int(row), int(key)] == 1
    (wrong,) = traces(figure, "middles", "wrong")
    assert all(run.truth[int(r), int(k)] == 0 and s >= WRONG for r, k, s in wrong.customdata or ())
    for mark, middles in (("edge", true), ("wrong", wrong)):
        for level, trace in enumerate(traces(figure, "lines", mark)):
            shares = [s for _, _, s in middles.customdata or ()]
            n_lines = sum(level <= 6 * s < level + 1 or (level == 5 and s >= 1) for s in shares)
            assert len(trace.x) == 4 * n_lines


def test_curves_mark_the_change_of_stage_and_the_formation() -> None:
    figure = plot.formation(run_of())
    assert [shape.x0 for shape in figure.layout.shapes] == [20, 27]
    assert [note.text for note in figure.layout.annotations] == ["stage 2", "formed"]
    assert figure.data[0].y == tuple(row["induction/score"] for row in run_of().history)


def seeds(n: int, **changes: float) -> list[RunData]:
    """Runs whose losses lie seed² apart."""
    runs = []
    for seed in range(n):
        run = run_of(recipe_of(seed=seed, **changes))
        runs.append(replace(run, history=moved(run, "loss/eval", seed**2)))
    return runs


def moved(run: RunData, key: str, by: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [dict(row) for row in run.history]
    return [row | {key: row[key] + by} for row in rows]


def test_runs_that_differ_by_their_seed_are_a_mean_with_a_band() -> None:
    runs = [*seeds(3), run_of(recipe_of(task__alpha=0.5))]
    assert [len(members) for members in groups(runs)] == [3, 1]
    figure = plot.overlay(runs, "loss/eval", reference="loss/bayes")
    means = [trace for trace in figure.data if trace.meta]
    expected = np.array([run.column("loss/eval")[1] for run in runs[:3]])
    assert np.allclose(means[0].y, expected.mean(0))
    (band,) = [trace for trace in figure.data if trace.fill]
    upper = expected.mean(0) + expected.std(0, ddof=1)
    assert np.allclose(band.y[:4], upper)


def test_the_loss_stands_beside_bayes_and_the_hand_built_model() -> None:
    figure = plot.loss(run_of())
    grey = {t.name: (t.line.dash, set(t.y)) for t in figure.data if t.line.color == REFERENCE_GREY}
    assert grey == {"Bayes loss": ("dash", {1.0}), "hand-built model's loss": ("dashdot", {1.2})}
    names = [trace.name for trace in plot.gap(run_of()).data]
    assert names == ["loss above Bayes", "loss above the hand-built model"]


def test_curves_of_several_runs_take_several_references() -> None:
    keys = ("loss/bayes", "loss/construction", "no/such")
    figure = plot.overlay(seeds(2), "loss/eval", reference=keys)
    grey = {t.name: (t.line.dash, *t.y) for t in figure.data if t.line.color == REFERENCE_GREY}
    assert grey == {
        "some: Bayes loss": ("dash", 1.0, 1.0),
        "some: hand-built model's loss": ("dashdot", 1.2, 1.2),
    }


def test_runs_without_a_common_step_or_figure_are_still_drawn() -> None:
    first, second = seeds(2)
    second = replace(second, history=moved(second, "train/step", 1))
    assert plot.overlay([first, second], "loss/eval").to_json()
    assert not plot.overlay([first], "no/such").data
    assert not plot.overlay([replace(first, history=())], "loss/eval").data
