"""Causal discovery: exact tests, sound graphs, and any model's attention as the source."""

import math
import time
import warnings
from itertools import combinations
from pathlib import Path
from typing import Literal

import mpmath
import networkx as nx
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from transformer_lens import HookedEncoder, HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from probes import PAG, ProbeError, discover, discover_attention, linear_edges, linear_effects
from probes.causal_discovery import PartialCorrelationTest, draw, icd, save_picture
from probes.causal_discovery.causal_learn import causal_learn
from probes.causal_discovery.correlation import correlation, partial_correlation, without_sink
from probes.causal_discovery.independence import p_value
from probes.causal_discovery.orientation import _rules9_and_10, orient
from probes.causal_discovery.pag import Mark
from tests.hugging_face import save_gpt2
from tests.probes.latent_dags import LatentDag, attention_with_sink, latent_dag

SEEDS = range(16)
"""Of the 250 that tests/benchmarks/bench_discovery.py takes."""


# --- The graph ---


def test_a_graph_tells_its_edges_neighbours_distances_and_marks() -> None:
    graph = PAG((2, 3, 7, 9), np.array([[0, 2, 0, 0], [1, 0, 3, 0], [0, 2, 0, 0], [0, 0, 0, 0]]))
    assert str(graph) == "2 o-> 3\n7 --> 3"
    assert graph.mark(2, 3) == Mark.ARROW
    assert graph.mark(3, 7) == Mark.TAIL
    assert graph.neighbours(3) == (2, 7)
    assert graph.distances(2) == {2: 0, 3: 1, 7: 2}
    assert graph.distances(9) == {9: 0}
    assert graph.to_networkx().edges[3, 2]["mark"] == Mark.CIRCLE
    assert set(graph.to_networkx().nodes) == {2, 3, 7, 9}
    assert graph.to_dict()["edges"][0] == {"from": 2, "to": 3, "marks": "o->"}
    assert graph.to_text({2: "a", 3: "b", 7: "c"}).splitlines()[0].endswith("'a' o-> 'b'")
    with pytest.raises(ValueError, match="assignment destination is read-only"):
        graph.marks[0, 1] = 1
    with pytest.raises(ValueError, match="4 is no node"):
        graph.neighbours(4)


@pytest.mark.parametrize("marks", [np.array([[0, 1], [0, 0]]), np.array([[1]])])
def test_marks_that_are_no_graph_are_refused(marks: np.ndarray) -> None:
    with pytest.raises(ValueError, match="an edge"):
        PAG(tuple(range(len(marks))), marks.astype(int))


def test_a_picture_is_drawn_for_any_graph(tmp_path: Path) -> None:
    marks = np.array([[0, 2, 2, 3], [1, 0, 1, 0], [2, 1, 0, 0], [2, 0, 0, 0]])
    save_picture(PAG((0, 1, 2, 5), marks), tmp_path / "a.png", {0: "$x", 1: "\n", 2: "b", 5: "c"})
    save_picture(PAG((0,), np.zeros((1, 1), int)), tmp_path / "one.png")
    assert imread(tmp_path / "a.png").ndim == 3


def test_the_legend_of_a_picture_says_what_every_edge_is() -> None:
    marks = np.array([[0, 3, 0, 0], [3, 0, 3, 0], [0, 1, 0, 1], [0, 0, 3, 0]])
    graph = PAG((0, 1, 2, 3), marks)
    assert [edge.marks for edge in graph.edges()] == ["---", "o--", "--o"]
    (legend,) = draw(graph).legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["--- selected together", "--o cause or selected together"]


def test_the_parts_of_a_picture_do_not_lie_on_each_other(tmp_path: Path) -> None:
    marks = np.array([[0, 3, 2], [3, 0, 2], [2, 1, 0]])
    figure = draw(PAG((0, 1, 2), marks), ["a", "a token of many letters", "c"], title="title " * 30)
    figure.draw_without_rendering()
    (legend,), (axes,) = figure.legends, figure.axes
    arcs, meanings = axes.get_window_extent(), legend.get_window_extent()
    title = axes.title.get_window_extent()
    assert figure.bbox.x0 <= title.x0 < title.x1 <= figure.bbox.x1
    assert arcs.y1 <= title.y0 < title.y1 <= meanings.y0
    assert arcs.height > figure.bbox.height / 4
    assert all(tick.get_window_extent().y0 >= 0 for tick in axes.get_xticklabels())
    with warnings.catch_warnings(action="error"):  # no letter of this in the font
        save_picture(PAG((0,), np.zeros((1, 1), int)), tmp_path / "a.png", ["\u65e5"])


# --- Correlations and p-values ---


def exact_p(attention: np.ndarray, i: int, j: int, given: tuple[int, ...], n_eff: int) -> float:
    """The formula from the exact covariance A Aᵀ in 60 digits."""
    with mpmath.workdps(60):
        rows = mpmath.matrix(attention[[i, j, *given]].tolist())
        inverse = (rows * rows.T) ** -1
        rho = -inverse[0, 1] / mpmath.sqrt(inverse[0, 0] * inverse[1, 1])
        statistic = mpmath.sqrt(n_eff - len(given) - 3) * abs(mpmath.atanh(rho))
        return float(mpmath.erfc(statistic / mpmath.sqrt(2)))


@pytest.mark.parametrize("strength", [0.0, 8.0, 12.0])
@pytest.mark.parametrize("causal", [True, False])
def test_p_values_are_those_of_the_formula(strength: float, causal: bool) -> None:
    attention = attention_with_sink(10, strength=strength, causal=causal)
    test = PartialCorrelationTest(attention, n_eff=64)
    source = np.random.default_rng(0)
    worst = 0.0
    for _ in range(60):
        i, j, *given = (int(k) for k in source.permutation(10)[: int(source.integers(2, 8))])
        ours = test.p_value(i, j, tuple(given))
        worst = max(worst, abs(ours - exact_p(attention, i, j, tuple(given), 64)))
    print(f"largest error of a p-value, sink of {strength:g} logits: {worst:.1e}")
    assert worst < 1e-10


def test_correlation_ignores_the_scale_of_rows_and_hidden_tokens() -> None:
    attention = attention_with_sink(6, strength=2.0)
    scaled = attention * np.arange(1, 7)[:, None]
    np.testing.assert_allclose(correlation(scaled), correlation(attention), atol=1e-12)
    part = correlation(attention[[0, 2, 5]])
    np.testing.assert_allclose(part, correlation(attention)[np.ix_([0, 2, 5], [0, 2, 5])])


def test_conditioning_on_a_first_token_is_dropping_its_row_and_column() -> None:
    attention = attention_with_sink(8)
    np.testing.assert_allclose(
        correlation(without_sink(attention, 0)), correlation(attention[1:, 1:]), atol=1e-9
    )
    np.testing.assert_allclose(
        correlation(without_sink(attention, 0)),
        partial_correlation(attention, (0,))[1:, 1:],
        atol=1e-9,
    )


def test_what_the_given_tokens_determine_keeps_its_edges() -> None:
    uniform = np.full((4, 4), 0.25)
    found = discover_attention(uniform, n_eff=100)
    assert len(found.pag.edges()) == 6
    assert not found.ordered


@pytest.mark.parametrize("causal", [True, False])
def test_given_tokens_that_span_each_other_count_once(causal: bool) -> None:
    attention = attention_with_sink(7, causal=causal)
    attention[4] = attention[3]
    attention[5] = (attention[2] + 3 * attention[3]) / 4
    once, again = (partial_correlation(attention, given) for given in ((2, 3), (2, 3, 4, 5)))
    np.testing.assert_allclose(again, once, atol=1e-12)
    assert np.isnan(once[4:6]).all()
    assert np.isfinite(once[np.ix_([0, 1, 6], [0, 1, 6])]).all()


def test_a_token_that_attends_as_the_sink_does_has_no_correlation_beside_it() -> None:
    attention = attention_with_sink(6, causal=False)
    attention[3] = attention[0]
    beside = correlation(without_sink(attention, 0))
    assert np.isnan(beside[2]).all()
    assert np.isfinite(np.delete(np.delete(beside, 2, 0), 2, 1)).all()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_attention_of_half_precision_is_read_also_when_it_was_widened(kind: torch.dtype) -> None:
    half = torch.from_numpy(attention_with_sink(9, strength=2.0)).to(kind)
    found = discover_attention(half, n_eff=64)
    assert discover_attention(half.float().numpy(), n_eff=64) == found


@pytest.mark.parametrize(
    ("kind", "rounding"),
    [
        (torch.float64, -3.4e-33),
        (torch.float64, 3.4e-33),
        (torch.float64, -1e-16),
        (torch.float64, 1e-16),
        (torch.float32, -1e-8),
        (torch.float32, 1e-8),
        (torch.float16, -1e-4),
        (torch.bfloat16, -1e-3),
    ],
)
@pytest.mark.parametrize("widened", [False, True])
def test_rounding_around_zero_is_clipped(kind: torch.dtype, rounding: float, widened: bool) -> None:
    clean = torch.from_numpy(attention_with_sink(6, strength=2.0)).to(kind)
    noisy = clean.clone()
    noisy[0, 4] = noisy[2, 5] = rounding
    found = discover_attention(noisy.double() if widened else noisy, n_eff=64)
    assert found == discover_attention(clean, n_eff=64)
    assert found.ordered
    if rounding < 0:
        np.testing.assert_array_equal(linear_effects(noisy), linear_effects(clean))


@pytest.mark.parametrize(
    ("kind", "weight"),
    [(torch.float64, -1e-9), (torch.float32, -1e-4), (torch.float16, -0.02)],
)
@pytest.mark.parametrize("n", [6, 100])
def test_a_negative_weight_beyond_rounding_is_refused(
    kind: torch.dtype, weight: float, n: int
) -> None:
    attention = torch.from_numpy(attention_with_sink(n, strength=2.0)).to(kind)
    attention[0, 4] = weight
    with pytest.raises(ValueError, match=r"at \[0, 4\]; none may be negative"):
        discover_attention(attention, n_eff=64)


def test_small_attention_to_a_later_token_is_no_rounding() -> None:
    attention = np.tril(np.full((5, 5), 1.0))
    attention[2, 3] = 1e-5
    assert not discover_attention(attention / attention.sum(1, keepdims=True), n_eff=64).ordered
    uniform = torch.full((512, 512), 1 / 512, dtype=torch.bfloat16)
    found = discover_attention(uniform, n_eff=64, positions=(0, 1, 2))
    assert not found.ordered


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (np.array([[1e308, 1e308], [0.0, 1.0]]), "row 0 of the attention sums to inf"),
        (np.array([[np.inf, -np.inf], [0.0, 1.0]]), "inf at"),
        (np.array([[1.0, 0.0], [0.5, 0.45]]), "row 1 of the attention sums to 0.95"),
        (torch.eye(2, dtype=torch.complex64), "real numbers"),
    ],
)
def test_what_is_no_attention_is_refused_without_a_warning(attention, message: str) -> None:
    with warnings.catch_warnings(action="error"), pytest.raises(ValueError, match=message):
        discover_attention(attention, n_eff=64)


def test_n_eff_that_leaves_no_freedom_is_refused() -> None:
    assert p_value(0.0, 3, 7) == 1.0
    with pytest.raises(ValueError, match=r"n_eff is 6.*more than 6.*at most 2"):
        p_value(0.1, 3, 6)
    with pytest.raises(ValueError, match="above 3"):
        PartialCorrelationTest(np.eye(3), n_eff=3)
    with pytest.raises(ValueError, match="max_cond is 4 with n_eff 6; it may be 0 to 2"):
        discover_attention(attention_with_sink(8), n_eff=6, max_cond=4)
    with pytest.raises(ValueError, match="more than 4"):
        discover_attention(attention_with_sink(8, strength=1.0), n_eff=4, alpha=0.9)


# --- Soundness against d-separation ---


def test_the_truth_about_adjacency_is_that_of_asking_for_every_set() -> None:
    for seed in range(12):
        graph = latent_dag(seed, observed=5)
        np.testing.assert_array_equal(graph.adjacent, graph.adjacent_by_force())


@pytest.mark.parametrize(("ordered", "stable"), [(False, False), (True, False), (False, True)])
def test_true_skeleton_and_no_false_mark(ordered: bool, stable: bool) -> None:
    for seed in SEEDS:
        graph = latent_dag(seed)
        found = icd(graph, ordered=ordered, stable=stable)
        np.testing.assert_array_equal(found.pag.marks != Mark.NONE, graph.adjacent)
        assert graph.false_marks(found.pag.marks) == (0, 0)
        assert found.complete
        assert found.tests == len(graph.asked)  # none twice
        for (i, j), given in found.separating_sets.items():
            assert graph.separated(i, j, given)


def test_fewer_tests_than_fci_and_its_skeleton() -> None:
    counts = {"ours": 0, "ordered": 0, "fci": 0}
    for seed in SEEDS:
        ours, fci = latent_dag(seed), latent_dag(seed)
        counts["ours"] += icd(ours).tests
        counts["ordered"] += icd(latent_dag(seed), ordered=True).tests
        found = causal_learn(fci, "fci")
        counts["fci"] += found.tests
        np.testing.assert_array_equal(found.pag.marks != Mark.NONE, ours.adjacent)
        assert set(found.separating_sets) == {
            (i, j) for i, j in np.ndindex(ours.adjacent.shape) if i < j and not ours.adjacent[i, j]
        }
    assert counts["ordered"] < counts["ours"] < counts["fci"]


class _Interrupted:
    """An oracle after whose first answers no time is left."""

    def __init__(self, graph: LatentDag, answers: int) -> None:
        self.graph, self.answers = graph, answers
        self.n_variables = graph.n_variables

    def p_value(self, i: int, j: int, given: tuple[int, ...]) -> float:
        return self.graph.p_value(i, j, given)

    def independent(self, i: int, j: int, given: tuple[int, ...]) -> bool:
        self.answers -= 1
        if self.answers == 0:
            time.sleep(0.05)
        return self.graph.independent(i, j, given)


@pytest.mark.parametrize("ordered", [False, True])
def test_a_search_that_is_stopped_is_sound(ordered: bool) -> None:
    for seed in range(12):
        for limit in ({"max_cond": seed % 4}, {"time_budget": 0.04}):
            graph = latent_dag(seed)
            test = graph if "max_cond" in limit else _Interrupted(graph, 5 + 15 * seed)
            found = icd(test, ordered=ordered, **limit)
            assert not (graph.adjacent & (found.pag.marks == Mark.NONE)).any()
            assert graph.false_marks(found.pag.marks) == (0, 0)
            if "max_cond" in limit and found.complete:
                np.testing.assert_array_equal(found.pag.marks != Mark.NONE, graph.adjacent)


@pytest.mark.parametrize(("ordered", "stable"), [(False, False), (True, False), (False, True)])
def test_a_search_is_complete_where_a_larger_set_could_not_be_asked(
    ordered: bool, stable: bool
) -> None:
    seen = set()
    for seed in SEEDS[:6]:
        everything = icd(latent_dag(seed), ordered=ordered, stable=stable)
        for max_cond in range(5):
            found = icd(latent_dag(seed), ordered=ordered, stable=stable, max_cond=max_cond)
            assert found.complete == (found.tests == everything.tests)
            seen.add((found.complete, bool(found.pag.edges())))
    assert seen >= {(True, True), (False, True)}


@pytest.mark.parametrize("method", ["pc", "fci"])
def test_causal_learn_is_complete_where_a_larger_set_could_not_be_asked(
    method: Literal["pc", "fci"],
) -> None:
    seen = set()
    for seed in SEEDS[:4]:
        everything = causal_learn(latent_dag(seed), method)
        for max_cond in range(5):
            found = causal_learn(latent_dag(seed), method, max_cond=max_cond)
            if found.complete:
                assert found.pag == everything.pag
                assert found.tests == everything.tests
            elif method == "pc":
                assert found.tests < everything.tests
            seen.add((found.complete, bool(found.pag.edges())))
    assert seen >= {(True, True), (False, True)}


def test_no_time_leaves_the_complete_graph() -> None:
    found = icd(latent_dag(0), time_budget=0.0)
    assert (found.reached, found.complete, found.tests) == (None, False, 0)
    assert (found.pag.marks[~np.eye(len(found.pag.nodes), dtype=bool)] == Mark.CIRCLE).all()


# --- Rules on graphs small enough to read ---


def marked(n: int, *edges: tuple[int, str, int]) -> np.ndarray:
    marks = np.zeros((n, n), dtype=int)
    for i, text, j in edges:
        marks[j, i] = {"o": 1, "<": 2, "-": 3}[text[0]]
        marks[i, j] = {"o": 1, ">": 2, "-": 3}[text[2]]
    return marks


def test_rule_10_wants_its_paths_possibly_directed() -> None:
    causes = [(0, "o->", 4), (2, "-->", 4), (3, "-->", 4), (1, "<->", 4)]
    pointing = marked(5, *causes, (0, "o-o", 3), (0, "o-o", 1), (1, "o-o", 2))
    backwards = marked(5, *causes, (0, "o-o", 3), (0, "o-o", 1), (1, "<-o", 2))
    for marks, expected in ((pointing, Mark.TAIL), (backwards, Mark.CIRCLE)):
        _rules9_and_10(marks)
        assert marks[4, 0] == expected


def test_rules_of_selection_bias_make_a_circle_of_circles_undirected() -> None:
    ring = marked(4, (0, "o-o", 1), (1, "o-o", 2), (2, "o-o", 3), (3, "o-o", 0))
    separating = {(0, 2): (1, 3), (1, 3): (0, 2)}
    undirected = orient(ring, separating, selection_bias=True)
    assert (undirected[ring > 0] == Mark.TAIL).all()
    np.testing.assert_array_equal(orient(ring, separating), ring)


def test_rules_of_selection_bias_finish_where_paths_cannot_be_counted() -> None:
    left = np.arange(20) < 10
    edges = (left[:, None] != left).astype(int)
    others = {
        (i, j): tuple(np.flatnonzero(left != left[i]).tolist())
        for i, j in combinations(range(20), 2)
        if left[i] == left[j]
    }
    undirected = orient(edges, others, selection_bias=True)
    assert (undirected[edges > 0] == Mark.TAIL).all()


def test_under_selection_bias_no_order_is_taken_for_known() -> None:
    # No set separates 0 and 2 without 3, which is later than both.
    undirected = nx.Graph([(0, 3), (3, 2), (2, 1), (1, 0)])
    joint = np.linalg.inv(np.eye(4) + nx.laplacian_matrix(undirected, range(4)).toarray())
    attention = np.linalg.cholesky(joint)
    attention /= attention.sum(1, keepdims=True)
    found = discover_attention(attention, n_eff=10**6, selection_bias=True)
    assert not found.ordered
    assert {frozenset(edge[:2]) for edge in found.pag.edges()} == set(
        map(frozenset, undirected.edges)
    )
    assert {edge.marks for edge in found.pag.edges()} == {"---"}
    with pytest.raises(ValueError, match="ordered and selection_bias exclude each other"):
        discover_attention(attention, n_eff=64, selection_bias=True, ordered=True)


# --- Linear effects ---


def test_direct_reading_gives_back_the_effects() -> None:
    source = np.random.default_rng(0)
    effects = np.tril(source.random((7, 7)) * (source.random((7, 7)) < 0.4), -1) / 7
    attention = np.linalg.solve(np.eye(7) - effects, np.diag(1 - effects.sum(1)))
    np.testing.assert_allclose(linear_effects(attention), effects, atol=1e-12)
    expected = {(int(j), int(i)) for i, j in np.argwhere(effects)}
    assert set(linear_edges(torch.from_numpy(attention))) == expected
    with pytest.raises(ValueError, match="cannot be inverted"):
        linear_effects(np.array([[1.0, 0.0], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="threshold"):
        linear_edges(attention, -1.0)


# --- Time ---


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_many_tokens_beside_a_sink_finish(spread: float) -> None:
    attention = attention_with_sink(24, spread=spread)
    ordered = discover_attention(attention, n_eff=768)
    assert ordered.ordered
    assert ordered.complete
    found = discover_attention(attention, n_eff=768, ordered=False, time_budget=0.01)
    assert not found.complete
    assert len(found.pag.edges()) > 24


# --- Models ---


def test_the_deepest_layer_of_a_model_is_read(build) -> None:
    model = build(n_layers=2, n_heads=2, d_head=8, d_model=16)
    tokens = torch.tensor([3, 1, 4, 1, 5, 0])
    _, cache = model.run_with_cache(tokens)
    found = discover(model, tokens, head=1)
    assert (found.layer, found.head, found.n_eff, found.ordered) == (1, 1, 8, True)
    pattern = cache["pattern", 1][0, 1]
    assert found.pag == discover_attention(pattern, n_eff=8).pag
    first = discover(model, tokens[None], layer=0, n_eff=50, positions=(5, 2, 0))
    rows = cache["pattern", 0][0, 0, [0, 2, 5]].double().numpy()
    expected = icd(PartialCorrelationTest(rows, n_eff=50), ordered=True)
    np.testing.assert_array_equal(first.pag.marks, expected.pag.marks)
    assert first.pag.nodes == (0, 2, 5)


def test_values_take_the_covariance_of_what_is_mixed(build) -> None:
    model = build(n_layers=1, n_heads=2, d_head=6, d_model=12)
    tokens = torch.tensor([3, 1, 4, 2])
    _, cache = model.run_with_cache(tokens)
    z = cache["z", 0][0, :, 1].double().numpy()
    found = discover(model, tokens, head=1, n_eff=100, values=True)
    assert found.values
    expected = icd(PartialCorrelationTest(z, n_eff=100), ordered=True)
    np.testing.assert_array_equal(found.pag.marks, expected.pag.marks)


def test_a_conditioned_sink_is_no_node(model: HookedTransformer) -> None:
    tokens = torch.tensor([0, 1, 2, 3, 4])
    found = discover(model, tokens, n_eff=64, sink="conditioned")
    assert found.pag.nodes == (1, 2, 3, 4)
    assert found.sink == "conditioned"
    with pytest.raises(ValueError, match="the sink is position 9"):
        discover(model, tokens, n_eff=64, sink="conditioned", sink_position=9)


def test_bidirectional_models_know_no_order(build) -> None:
    model = build(attention_dir="bidirectional", d_head=16, d_model=32)
    tokens = torch.tensor([3, 1, 4, 1, 5, 0])
    assert not discover(model, tokens, n_eff=64).ordered
    assert discover(model, tokens, n_eff=64, ordered=True).ordered
    names = ("n_layers", "d_model", "d_head", "n_heads", "d_vocab", "attention_dir", "n_ctx")
    sizes = {name: getattr(model.cfg, name) for name in names}
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        encoder = HookedEncoder({**sizes, "d_mlp": 8, "act_fn": "gelu"})
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data.normal_(generator=generator)
    assert len(discover(encoder, tokens, n_eff=64).pag.nodes) == 6


def test_a_bridge_is_read(tmp_path: Path) -> None:
    save_gpt2(tmp_path, tokenizer=True)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    tokens = torch.tensor([3, 1, 4, 1, 5])
    for values in (False, True):
        found = discover(bridge, tokens, n_eff=1000, values=values)
        assert (found.layer, found.ordered, found.complete) == (1, True, True)


def test_one_token_is_a_graph_without_edges(model: HookedTransformer) -> None:
    found = discover(model, torch.tensor([1]), n_eff=64)
    assert (found.pag.nodes, found.pag.edges(), found.tests) == ((0,), [], 0)


@pytest.mark.parametrize("engine", ["fci", "pc"])
def test_the_other_engines_agree_on_a_chain(engine) -> None:
    chain = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    ours = discover_attention(chain, n_eff=1000, ordered=False)
    theirs = discover_attention(chain, n_eff=1000, engine=engine)
    assert ours.pag == theirs.pag
    assert ours.separating_sets == theirs.separating_sets == {(0, 2): (1,)}
    assert theirs.to_dict()["engine"] == engine
    for name, value in (
        ("time_budget", 1.0),
        ("ordered", True),
        ("stable", True),
        ("selection_bias", True),
    ):
        with pytest.raises(ValueError, match=f"{name} goes with engine 'icd', not '{engine}'"):
            discover_attention(chain, n_eff=1000, engine=engine, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 7}, "layer 7 does not exist"),
        ({"head": 9}, "head 9 does not exist: layer 1 has 2 heads, 0 to 1"),
        ({"head": -1}, "head -1 does not exist"),
        ({"n_eff": 2}, "n_eff is 2"),
        ({"n_eff": math.nan}, "n_eff is nan"),
        ({"alpha": 1.0}, "alpha is 1"),
        ({"positions": (0, 9)}, "positions are"),
        ({"positions": ()}, "positions are"),
        ({"time_budget": -1.0}, "time_budget is -1"),
        ({"max_cond": -1}, "max_cond is -1"),
    ],
)
def test_bad_arguments_are_refused(model: HookedTransformer, options, message: str) -> None:
    with pytest.raises((ValueError, ProbeError), match=message):
        discover(model, torch.tensor([1, 2, 3]), **{"n_eff": 64, **options})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), "at least one"),
        (torch.zeros(2, 3, dtype=torch.int64), "2 sequences"),
        (torch.full((3,), 99), "vocabulary"),
        (torch.zeros(40, dtype=torch.int64), "do not fit the context of 12"),
    ],
)
def test_bad_tokens_are_refused(model: HookedTransformer, tokens, message: str) -> None:
    with pytest.raises((ValueError, ProbeError), match=message):
        discover(model, tokens, n_eff=64)
