"""The paper's figures: each is drawn and shows the data it is given, under the right names."""

import math

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from mechcausal.graphs import CausalGraph, chain, k_gram, two_parents
from mechcausal.measures.blocks import block_shares, solution_blocks
from mechcausal.measures.matching import match_heads
from mechcausal.measures.plateaus import Plateau
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.pictures.static.paper_figures import (
    PAPER,
    draw_blocks,
    draw_graph_distribution,
    draw_heads,
    draw_loss,
)
from mechcausal.pictures.static.style import OTHER_COLOUR
from tests.oracles import random_patterns, seeded


def random_model(graph: CausalGraph, heads: tuple[int, ...]) -> DisentangledTransformer:
    model = DisentangledTransformer(3, graph.sequence_length, heads)
    model.initialise(scale=1.0, generator=seeded(1))
    with torch.no_grad():
        model.W.copy_(torch.randn(model.W.shape, generator=seeded(2)))
    return model


def check_picture(figure: Figure) -> None:
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
    assert min(pixels.shape[:2]) > 200
    assert pixels[..., :3].std() > 1


def image(axis: Axes) -> np.ndarray:
    (picture,) = axis.get_images()
    return np.asarray(picture.get_array())


def circles(axis: Axes) -> set[tuple[int, int]]:
    centres = [centre for dots in axis.collections for centre in dots.get_offsets().tolist()]
    return {(int(x), int(y)) for x, y in centres}


@pytest.mark.parametrize(
    ("graph", "heads"), [(chain(5), (1, 1)), (two_parents(6), (2, 1)), (k_gram(6, 3), (3, 1))]
)
def test_blocks_show_the_weights_of_every_block(graph: CausalGraph, heads: tuple[int, ...]) -> None:
    model = random_model(graph, heads)
    figure = draw_blocks(model, graph)
    check_picture(figure)
    drawn = {f"blocks/{axis.get_label()}": axis for axis in figure.axes}
    assert set(drawn) == set(block_shares(model))
    for layer, n_heads in enumerate(heads):
        for head in range(n_heads):
            matrix = model.A(layer)[head].detach().numpy()
            for query in model.streams(layer):
                for key in model.streams(layer):
                    axis = drawn[f"blocks/A{layer + 1}.{head}/{query}:{key}"]
                    block = model.block(layer, head, query, key).detach().numpy()
                    assert np.array_equal(image(axis), block)
                    limits = axis.get_images()[0].get_clim()
                    assert limits == pytest.approx(np.percentile(matrix, (15, 100)))
    for stream in model.streams(2):
        readout = model.readout(stream).detach().numpy().T
        assert np.array_equal(image(drawn[f"blocks/W/{stream}"]), readout)
    framed = {name for name, axis in drawn.items() if axis.get_frame_on()}
    assert framed == set(solution_blocks(model, graph))


def test_blocks_are_named_as_what_came_in_or_was_attended() -> None:
    figure = draw_blocks(random_model(chain(5), (2, 1)))
    texts = [text.get_text() for text in figure.texts]
    assert {"input", "attn 1.0", "attn 1.1", "attn 2.0", "attn 2.0 of 1.1", "Output"} <= set(texts)
    for matrix in ("A1, head 0", "A1, head 1", "A2, head 0", "W transposed"):
        assert sum(text.startswith(f"{matrix}: colours from ") for text in texts) == 1
    assert "Position" in texts
    assert not any(axis.get_frame_on() for axis in figure.axes)


def test_blocks_of_an_untrained_model_are_drawn() -> None:
    check_picture(draw_blocks(DisentangledTransformer(3, 6, (1, 1))))


def test_blocks_lie_apart_and_within_the_figure() -> None:
    figure = draw_blocks(random_model(k_gram(6, 3), (3, 1)))
    boxes = [axis.get_position() for axis in figure.axes]
    assert all(0 <= b.x0 < b.x1 <= 1 and 0 <= b.y0 < b.y1 <= 1 for b in boxes)
    for number, a in enumerate(boxes):
        for b in boxes[:number]:
            assert a.x1 < b.x0 or b.x1 < a.x0 or a.y1 < b.y0 or b.y1 < a.y0


@pytest.mark.parametrize(
    ("graph", "n_heads"),
    [(chain(7), 1), (two_parents(8), 2), (k_gram(8, 3), 3), (k_gram(8, 3), 2), (chain(7), 5)],
)
def test_heads_circle_the_parents_that_they_serve(graph: CausalGraph, n_heads: int) -> None:
    attention = random_patterns(n_heads, 8, seed=3)
    figure = draw_heads(attention, graph, "some title")
    check_picture(figure)
    assert figure.get_suptitle() == "some title"
    *panels, truth = figure.axes
    matching = match_heads(attention, graph)
    served = {child: (graph.parents[child], heads) for child, heads in matching.rows.items()}
    if matching.query is not None:
        served[7] = (graph.query_parents or (), matching.query)
    colours = [to_hex(axis.title.get_color()) for axis in panels]
    assert len(set(colours)) == len(panels) == n_heads
    for head, axis in enumerate(panels):
        assert np.array_equal(image(axis), attention[head].numpy())
        expected = {
            (parent, child)
            for child, (parents, heads) in served.items()
            for parent, by in zip(parents, heads, strict=True)
            if by == head
        }
        assert circles(axis) == expected
        assert f"{len(expected)} parents" in axis.get_title()
    colour_of = dict(enumerate(colours)) | {None: OTHER_COLOUR}
    expected_truth = np.ones((8, 8, 3))
    for child, (parents, heads) in served.items():
        for parent, by in zip(parents, heads, strict=True):
            expected_truth[child, parent] = to_rgb(colour_of[by])
    assert np.allclose(image(truth), expected_truth)


def test_the_row_of_the_query_is_marked_where_it_serves_the_query() -> None:
    for graph, marked in ((two_parents(8), True), (chain(7), False)):
        for axis in draw_heads(random_patterns(2, 8, seed=3), graph, "").axes:
            assert ("query" in {text.get_text() for text in axis.texts}) == marked
            assert bool(axis.patches) == marked


def test_loss_shows_histories_levels_and_plateaus() -> None:
    histories: dict[str, list[dict[str, float | int | None]]] = {
        f"seed {seed}": [
            {"train/step": step, "loss/eval": 2.0 - step / 300 - seed / 10, "loss/bayes": 0.9}
            for step in range(0, 300, 10)
        ]
        for seed in range(3)
    }
    histories["seed 0"][3]["loss/eval"] = math.nan
    histories["seed 1"].append({"train/step": 900, "loss/eval": None})
    levels = {"Bayes": 0.9, "bigram": 0.91, "uniform": 2.1}
    figure = draw_loss(histories, levels, [Plateau(0, 50, 1.9, "uniform")])
    check_picture(figure)
    (axis,) = figure.axes
    assert axis.get_xscale() == "log"
    lines = {str(line.get_label()): line for line in axis.get_lines()}
    for seed in range(3):
        x, y = (np.asarray(side) for side in lines[f"seed {seed}"].get_data())
        assert len(x) == (29 if seed == 0 else 30)
        assert (x[0], y[0]) == (1, pytest.approx(2.0 - seed / 10))
    heights = [np.asarray(line.get_ydata())[0] for line in axis.get_lines()[3:]]
    assert heights == list(levels.values())
    names = {text.get_text(): text.get_position() for text in axis.texts}
    assert {"uniform", "Bayes 0.900", "bigram 0.910", "uniform 2.100"} == set(names)
    assert names["bigram 0.910"][1] - names["Bayes 0.900"][1] > 0.04
    assert len(axis.patches) == 1
    legend = axis.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(histories)


def test_loss_of_many_graphs_needs_no_legend() -> None:
    rows = [{"train/step": step, "loss/eval": 1.0} for step in (0, 10)]
    figure = draw_loss({f"graph {n}": rows for n in range(20)}, {})
    assert figure.axes[0].get_legend() is None
    assert len({to_hex(line.get_color()) for line in figure.axes[0].get_lines()}) == 20


def test_graph_distribution_stands_beside_the_papers() -> None:
    per_graph = np.array([0.9, 0.7, math.nan, 0.8])
    per_edge = np.array([0.4, 0.6, 0.9, 0.97, 0.5])
    figure = draw_graph_distribution(per_graph, per_edge)
    check_picture(figure)
    graphs, edges = figure.axes
    dots = graphs.get_lines()[-1]
    assert np.asarray(dots.get_ydata()).tolist() == [0.7, 0.8, 0.9]
    legend = graphs.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["paper: range", "paper: 0.837 ± 0.054", "ours: 0.800 ± 0.100"]
    bands = [
        patch.get_extents().transformed(graphs.transData.inverted()) for patch in graphs.patches
    ]
    assert (bands[0].y0, bands[0].y1) == pytest.approx((PAPER.lowest, PAPER.highest))
    assert bands[1].y1 - bands[1].y0 == pytest.approx(2 * PAPER.sd)
    assert edges.get_title() == "above 0.5: 3 of 5 (paper: 176 of 182)"
    assert (
        sum(bar.get_path().get_extents(bar.get_patch_transform()).y1 for bar in edges.patches) == 5
    )


@pytest.mark.parametrize("n", [0, 1])
def test_graph_distribution_of_few_graphs_is_drawn(n: int) -> None:
    check_picture(draw_graph_distribution(np.full(n, 0.8), np.full(n, 0.8)))


def test_drawing_leaves_pyplot_alone() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    draw_blocks(random_model(chain(5), (1, 1)))
    draw_loss({}, {})
    assert plt.get_fignums() == before
