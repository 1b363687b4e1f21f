"""Figures: they are drawn for every kind of graph, and are pictures of something."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image as mpimg

from mechcausal.graphs import CausalGraph, chain, manual, random_tree
from mechcausal.pictures.static.run_figures import draw_curves, draw_figures, heatmaps
from mechcausal.recipes import Recipe
from mechcausal.tasks.priors import DirichletPrior
from mechcausal.theory import PairwiseTheory, pairwise_theory

NAMES = ("attention/layer0", "gradient/scores", "gradient/pattern")


def theory_of(graph: CausalGraph) -> PairwiseTheory:
    generator = torch.Generator().manual_seed(0)
    prior = DirichletPrior.symmetric(0.5, vocab_size=3)
    return pairwise_theory(graph, prior, n_priors=20, generator=generator, beta0=1.0)


def matrices_of(graph: CausalGraph, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random attention and gradients of the right shape."""
    generator = torch.Generator().manual_seed(seed)
    t = graph.sequence_length
    scores = torch.randn(t, t, generator=generator)
    future = torch.ones(t, t, dtype=torch.bool).triu(1)
    attention = scores.masked_fill(future, -torch.inf).softmax(-1)
    return {NAMES[0]: attention, NAMES[1]: scores.tril(), NAMES[2]: scores.tril()}


def history_of(n_rows: int) -> list[dict[str, float | int | None]]:
    """Rows in which figures are missing, None or numbers by turns."""
    rows: list[dict[str, float | int | None]] = []
    for i in range(n_rows):
        value = 1 / (i + 1)
        row: dict[str, float | int | None] = {"train/step": i, "loss/eval": value}
        if i % 2:
            row |= {"graph/recovered": value, "strategy/kl_uniform": None}
        if i % 3:
            row |= {"gradient/chi2_correlation": math.nan, "induction/score": value}
        rows.append(row)
    return rows


def check_pictures(files: dict[str, Path]) -> None:
    assert set(files) == {"figures/attention", "figures/gradient", "figures/curves"}
    for path in files.values():
        pixels = mpimg.imread(path)
        assert min(pixels.shape[:2]) > 200
        assert pixels[..., :3].std() > 0.01


@pytest.mark.parametrize(
    "graph",
    [
        chain(7),
        manual([-1, -1, -1]),
        chain(1),
        random_tree(99, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["chain", "no edges", "two tokens", "hundred tokens"],
)
def test_figures_are_drawn_for_every_kind_of_graph(graph: CausalGraph, tmp_path: Path) -> None:
    files = draw_figures(
        tmp_path / "new" / "figures",
        recipe=Recipe(name="some"),
        theory=theory_of(graph),
        history=history_of(12),
        matrices={step: matrices_of(graph, step) for step in (0, 3, 7)},
        stage_starts=[0, 5],
    )
    check_pictures(files)


def test_figures_of_a_single_look(tmp_path: Path) -> None:
    graph = chain(4)
    files = draw_figures(
        tmp_path,
        recipe=Recipe(),
        theory=theory_of(graph),
        history=history_of(1),
        matrices={0: matrices_of(graph)},
        stage_starts=[0],
    )
    check_pictures(files)


def test_figures_of_a_gradient_that_is_zero(tmp_path: Path) -> None:
    graph = chain(4)
    zeros = {name: torch.zeros(5, 5) for name in NAMES}
    files = draw_figures(
        tmp_path,
        recipe=Recipe(),
        theory=theory_of(graph),
        history=history_of(2),
        matrices={0: zeros},
        stage_starts=[0],
    )
    check_pictures(files)


def test_curves_show_the_hand_built_model_beside_bayes() -> None:
    references = {"loss/bayes": 0.1, "loss/construction": 0.2}
    figure = draw_curves([row | references for row in history_of(5)], [0])
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(lines) == ["evaluation loss", "Bayes loss", "hand-built model's loss"]
    assert set(lines["hand-built model's loss"].get_ydata()) == {0.2}
    assert len({lines[name].get_linestyle() for name in lines}) == 3


@pytest.mark.parametrize("n_rows", [0, 1, 2000])
def test_curves_take_histories_of_any_length_with_gaps(n_rows: int) -> None:
    figure = draw_curves(history_of(n_rows), [0, n_rows // 2])
    drawn = [len(line.get_xdata()) for axis in figure.axes for line in axis.get_lines()]
    assert max(drawn, default=0) == (n_rows if n_rows > 1 else max(drawn, default=0))


@pytest.mark.parametrize("length", [2, 8, 100, 400])
def test_heatmaps_are_pairs_of_squares_in_colour(length: int) -> None:
    graph = chain(length - 1)
    pictures = heatmaps(matrices_of(graph), theory_of(graph))
    assert set(pictures) == set(NAMES)
    scale = max(1, math.ceil(320 / length))
    for picture in pictures.values():
        assert picture.dtype == np.uint8
        assert picture.shape == (length * scale, 2 * length * scale + 8, 3)


def test_heatmap_of_attention_on_parents_looks_like_the_true_graph() -> None:
    graph = chain(7)
    attention = torch.zeros(8, 8)
    for parent, child in graph.edges:
        attention[child, parent] = 1.0
    picture = heatmaps({"attention/layer0": attention}, theory_of(graph))["attention/layer0"]
    side = picture.shape[0]
    assert np.array_equal(picture[:, :side], picture[:, side + 8 :])
    assert picture[:, :side].std() > 0


def test_heatmap_of_the_predicted_gradient_looks_like_the_prediction() -> None:
    graph = chain(7)
    theory = theory_of(graph)
    predicted = theory.predicted_gradient.float()
    n_keys = torch.arange(1, 9).unsqueeze(1)
    pictures = heatmaps(
        {"gradient/scores": predicted * 3, "gradient/pattern": predicted * n_keys}, theory
    )
    for picture in pictures.values():
        side = picture.shape[0]
        left, right = picture[:, :side].astype(int), picture[:, side + 8 :].astype(int)
        assert np.abs(left - right).max() <= 3  # rounding of float32 to a colour


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    """No figure stays open, and no display is asked for."""
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    draw_curves(history_of(5), [0])
    assert plt.get_fignums() == before
