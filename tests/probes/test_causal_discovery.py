"""Causal discovery: exact tests, sound graphs, and any model's attention as the source."""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import mpmath
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from transformer_lens.model_bridge import TransformerBridge

from mechcausal.models.adapter import HookedTransformer
from probes import PAG, ProbeError, discover, discover_attention, linear_edges, linear_effects
from probes.causal_discovery import PartialCorrelationTest, SearchResult, draw, icd, save_picture
from probes.causal_discovery.causal_learn import causal_learn
from probes.causal_discovery.independence import p_value
from probes.causal_discovery.linear_model import correlation, partial_correlation, without_sink
from probes.causal_discovery.orientation import _rules9_and_10
from probes.causal_discovery.pag import Mark
from tests.hugging_face import save_gpt2
from tests.lens_versions import needs_lens_3
from tests.probes.families import tiny
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
    with pytest.raises(ValueError, match="4 is not a node"):
        graph.neighbours(4)
    for marks in (np.array([[0, 1], [0, 0]]), np.array([[1]])):
        with pytest.raises(ValueError, match="an edge"):
            PAG(tuple(range(len(marks))), marks)


def test_a_picture_is_drawn_for_any_graph(tmp_path: Path) -> None:
    marks = np.array([[0, 2, 2, 3], [1, 0, 1, 0], [2, 1, 0, 0], [2, 0, 0, 0]])
    save_picture(PAG((0, 1, 2, 5), marks), tmp_path / "a.png", {0: "$x", 1: "\n", 2: "b", 5: "c"})
    assert imread(tmp_path / "a.png").ndim == 3
    with warnings.catch_warnings(action="error"):  # the font lacks this letter
        save_picture(PAG((0,), np.zeros((1, 1), int)), tmp_path / "one.png", ["\u65e5"])


def test_the_legend_explains_every_kind_of_edge() -> None:
    marks = np.array([[0, 3, 0, 0], [3, 0, 3, 0], [0, 1, 0, 1], [0, 0, 3, 0]])
    graph = PAG((0, 1, 2, 3), marks)
    assert [edge.marks for edge in graph.edges()] == ["---", "o--", "--o"]
    (legend,) = draw(graph).legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["--- selected together", "--o cause or selected together"]


def test_the_parts_of_a_picture_do_not_overlap() -> None:
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
    # Correlations do not change with the scale of a row, nor with hidden rows.
    test = PartialCorrelationTest(attention * np.arange(1, 11)[:, None], n_eff=64)
    source = np.random.default_rng(0)
    worst = 0.0
    for _ in range(60):
        i, j, *given = (int(k) for k in source.permutation(10)[: int(source.integers(2, 8))])
        ours = test.p_value(i, j, tuple(given))
        worst = max(worst, abs(ours - exact_p(attention, i, j, tuple(given), 64)))
    print(f"largest error of a p-value, sink of {strength:g} logits: {worst:.1e}")
    assert worst < 1e-10


def test_conditioning_on_a_first_token_drops_its_row_and_column() -> None:
    attention = attention_with_sink(8)
    conditioned = correlation(without_sink(attention, 0))
    np.testing.assert_allclose(conditioned, correlation(attention[1:, 1:]), atol=1e-9)
    np.testing.assert_allclose(conditioned, partial_correlation(attention, (0,))[1:, 1:], atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
def test_linearly_dependent_rows_are_conditioned_on_once(causal: bool) -> None:
    attention = attention_with_sink(7, causal=causal)
    attention[4] = attention[3]
    attention[5] = (attention[2] + 3 * attention[3]) / 4
    once, again = (partial_correlation(attention, given) for given in ((2, 3), (2, 3, 4, 5)))
    np.testing.assert_allclose(again, once, atol=1e-12)
    assert np.isnan(once[4:6]).all()
    assert np.isfinite(once[np.ix_([0, 1, 6], [0, 1, 6])]).all()


def test_a_token_that_the_given_tokens_determine_keeps_its_edges() -> None:
    uniform = discover_attention(np.full((4, 4), 0.25), n_eff=100)
    assert len(uniform.pag.edges()) == 6
    assert not uniform.ordered
    attention = attention_with_sink(6, causal=False)
    attention[3] = attention[0]
    without = correlation(without_sink(attention, 0))
    assert np.isnan(without[2]).all()
    assert np.isfinite(np.delete(np.delete(without, 2, 0), 2, 1)).all()


# --- Attention as input ---


@pytest.mark.parametrize(
    ("kind", "rounding"),
    [
        *((torch.float64, sign * size) for sign in (-1, 1) for size in (3.4e-33, 1e-16)),
        *((torch.float32, sign * 1e-8) for sign in (-1, 1)),
        (torch.float16, -1e-4),
        (torch.bfloat16, -1e-3),
    ],
)
def test_rounding_near_zero_is_clipped_whatever_the_float_type(
    kind: torch.dtype, rounding: float
) -> None:
    clean = torch.from_numpy(attention_with_sink(6, strength=2.0)).to(kind)
    noisy = clean.clone()
    noisy[0, 4] = noisy[2, 5] = rounding
    expected = discover_attention(clean, n_eff=64)
    assert expected.ordered
    for attention in (noisy, noisy.double(), clean.double().numpy()):
        assert discover_attention(attention, n_eff=64) == expected
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
    assert not discover_attention(uniform, n_eff=64, positions=(0, 1, 2)).ordered


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (np.array([[1e308, 1e308], [0.0, 1.0]]), "row 0 of the attention sums to inf"),
        (np.array([[np.inf, -np.inf], [0.0, 1.0]]), "inf at"),
        (np.array([[1.0, 0.0], [0.5, 0.45]]), "row 1 of the attention sums to 0.95"),
        (np.array([[1.0, 0.0], [np.nan, 1.0]]), r"the attention has nan at \[1, 0\]"),
        (np.zeros((0, 0)), "one square matrix"),
        (torch.eye(2, dtype=torch.complex64), "real numbers"),
    ],
)
def test_an_invalid_pattern_is_refused_without_a_warning(attention: Any, message: str) -> None:
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
    with pytest.raises(ValueError, match="n_eff is needed"):
        discover_attention(attention_with_sink(8))


# --- Soundness against d-separation ---

Search = Callable[..., SearchResult]
SEARCHES: dict[str, Search] = {
    "icd": icd,
    "ordered": lambda test, **limits: icd(test, ordered=True, **limits),
    "stable": lambda test, **limits: icd(test, stable=True, **limits),
    "fci": lambda test, **limits: causal_learn(test, "fci", **limits),
    "pc": lambda test, **limits: causal_learn(test, "pc", **limits),
}


@cache
def searched(name: str, seed: int) -> tuple[LatentDag, SearchResult]:
    """A graph and the result of a search without limits."""
    graph = latent_dag(seed)
    return graph, SEARCHES[name](graph)


def test_adjacency_by_ancestors_equals_adjacency_by_all_sets() -> None:
    for seed in range(12):
        graph = latent_dag(seed, observed=5)
        np.testing.assert_array_equal(graph.adjacent, graph.adjacent_by_force())


@pytest.mark.parametrize("name", ["icd", "ordered", "stable", "fci"])
def test_true_skeleton_and_no_false_mark(name: str) -> None:
    for seed in SEEDS:
        graph, result = searched(name, seed)
        np.testing.assert_array_equal(result.pag.marks != Mark.NONE, graph.adjacent)
        assert set(result.separating_sets) == {
            (i, j)
            for i, j in np.ndindex(graph.adjacent.shape)
            if i < j and not graph.adjacent[i, j]
        }
        if name != "fci":  # its rule R5 gives false tails
            assert graph.false_marks(result.pag.marks) == (0, 0)
            assert result.complete
            assert result.tests == len(graph.asked)  # none twice
            for (i, j), given in result.separating_sets.items():
                assert graph.separated(i, j, given)


def test_fewer_tests_than_fci() -> None:
    counts = {
        name: sum(searched(name, seed)[1].tests for seed in SEEDS)
        for name in ("ordered", "icd", "fci")
    }
    assert counts["ordered"] < counts["icd"] < counts["fci"]


@dataclass(frozen=True, eq=False)
class _Slow(LatentDag):
    """Uses up the time at one of its answers."""

    answers: int = 0

    def independent(self, i: int, j: int, given: tuple[int, ...]) -> bool:
        if len(self.asked) == self.answers:
            time.sleep(0.05)
        return super().independent(i, j, given)


@pytest.mark.parametrize("ordered", [False, True])
def test_a_stopped_search_is_sound(ordered: bool) -> None:
    for seed in range(12):
        for limit in ({"max_cond": seed % 4}, {"time_budget": 0.04}):
            graph = latent_dag(seed)
            if "time_budget" in limit:
                graph = _Slow(graph.dag, graph.observed, answers=4 + 15 * seed)
            result = icd(graph, ordered=ordered, **limit)
            assert not (graph.adjacent & (result.pag.marks == Mark.NONE)).any()
            assert graph.false_marks(result.pag.marks) == (0, 0)
            if "max_cond" in limit and result.complete:
                np.testing.assert_array_equal(result.pag.marks != Mark.NONE, graph.adjacent)
    result = icd(latent_dag(0), ordered=ordered, time_budget=0.0)
    assert (result.reached, result.complete, result.tests) == (None, False, 0)
    assert len(result.pag.edges()) == math.comb(len(result.pag.nodes), 2)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_is_complete_exactly_when_no_larger_set_is_left(name: str) -> None:
    kinds = set()
    for seed in SEEDS[: 4 if name in ("fci", "pc") else 6]:
        everything = searched(name, seed)[1]
        for max_cond in range(5):
            result = SEARCHES[name](latent_dag(seed), max_cond=max_cond)
            if result.complete:
                assert result.pag == everything.pag
                assert result.tests == everything.tests
            elif name != "fci":  # FCI's later tests have no limit
                assert result.tests < everything.tests
            kinds.add((result.complete, bool(result.pag.edges())))
    assert kinds >= {(True, True), (False, True)}


def test_rule_10_needs_possibly_directed_paths() -> None:
    causes = [(0, "o->", 4), (2, "-->", 4), (3, "-->", 4), (1, "<->", 4), (0, "o-o", 3)]
    for last, expected in (("o-o", Mark.TAIL), ("<-o", Mark.CIRCLE)):
        marks = np.zeros((5, 5), dtype=int)
        for i, text, j in [*causes, (0, "o-o", 1), (1, last, 2)]:
            marks[j, i] = {"o": 1, "<": 2, "-": 3}[text[0]]
            marks[i, j] = {"o": 1, ">": 2, "-": 3}[text[2]]
        _rules9_and_10(marks)
        assert marks[4, 0] == expected


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_many_tokens_beside_a_sink_finish(spread: float) -> None:
    attention = attention_with_sink(24, spread=spread)
    ordered = discover_attention(attention, n_eff=768)
    assert ordered.ordered
    assert ordered.complete
    stopped = discover_attention(attention, n_eff=768, ordered=False, time_budget=0.01)
    assert not stopped.complete
    assert len(stopped.pag.edges()) > 24


@pytest.mark.parametrize("engine", ["fci", "pc"])
def test_the_other_engines_agree_on_a_chain(engine: Literal["fci", "pc"]) -> None:
    chain = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    ours = discover_attention(chain, n_eff=1000, ordered=False)
    theirs = discover_attention(chain, n_eff=1000, engine=engine)
    assert ours.pag == theirs.pag
    assert ours.separating_sets == theirs.separating_sets == {(0, 2): (1,)}
    assert theirs.to_dict()["engine"] == engine
    for name, value in (("time_budget", 0.0), ("ordered", True), ("stable", True)):
        with pytest.raises(ValueError, match=f"{name} goes with engine 'icd', not '{engine}'"):
            discover_attention(chain, n_eff=1000, engine=engine, **{name: value})


# --- Linear effects ---


def test_linear_effects_recover_the_effects_of_a_model_without_hidden_tokens() -> None:
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


# --- Models ---


@pytest.mark.parametrize("values", [False, True])
def test_a_head_of_a_model_is_read(build: Any, values: bool) -> None:
    model = build(n_layers=2, n_heads=2, d_head=8, d_model=16)
    tokens = torch.tensor([3, 1, 4, 1, 5, 0])
    _, cache = model.run_with_cache(tokens)

    def rows(layer: int, head: int) -> np.ndarray:
        if values:
            return np.asarray(cache["z", layer][0, :, head].double().numpy())
        return np.asarray(cache["pattern", layer][0, head].double().numpy())

    deepest = discover(model, tokens, head=1, values=values)
    assert (deepest.layer, deepest.head, deepest.n_eff, deepest.ordered) == (1, 1, 8, True)
    assert deepest.values == values
    expected = icd(PartialCorrelationTest(rows(1, 1), n_eff=8), ordered=True)
    assert deepest.pag == expected.pag
    first = discover(model, tokens[None], layer=0, n_eff=50, positions=(5, 2, 0), values=values)
    test = PartialCorrelationTest(rows(0, 0)[[0, 2, 5]], n_eff=50)
    np.testing.assert_array_equal(first.pag.marks, icd(test, ordered=True).pag.marks)
    assert first.pag.nodes == (0, 2, 5)
    alone = discover(model, torch.tensor([1]), n_eff=64, values=values)
    assert (alone.pag.nodes, alone.pag.edges(), alone.tests) == ((0,), [], 0)


def test_a_conditioned_sink_is_no_node(model: HookedTransformer) -> None:
    tokens = torch.tensor([0, 1, 2, 3, 4])
    discovery = discover(model, tokens, n_eff=64, sink="conditioned")
    assert discovery.pag.nodes == (1, 2, 3, 4)
    assert discovery.sink == "conditioned"
    with pytest.raises(ValueError, match="the sink is position 9"):
        discover(model, tokens, n_eff=64, sink="conditioned", sink_position=9)


def test_bidirectional_models_have_no_order(build: Any) -> None:
    model = build(attention_dir="bidirectional", d_head=16, d_model=32)
    tokens = torch.tensor([3, 1, 4, 1, 5, 0])
    assert not discover(model, tokens, n_eff=64).ordered
    assert discover(model, tokens, n_eff=64, ordered=True).ordered


def hooked_encoder() -> Any:
    from transformer_lens import HookedEncoder

    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 32, "d_head": 16, "d_mlp": 8, "n_ctx": 12}
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        encoder = HookedEncoder({**sizes, "d_vocab": 7, "act_fn": "gelu"})
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data.normal_(generator=generator)
    return encoder


@pytest.mark.parametrize(
    "make",
    [pytest.param(hooked_encoder, marks=needs_lens_3), lambda: tiny("BERT")],
    ids=["HookedEncoder", "BERT"],
)
def test_an_encoder_is_read(make: Callable[[], Any]) -> None:
    with warnings.catch_warnings(action="ignore"):  # BERT's patterns cannot be edited
        discovery = discover(make(), torch.tensor([3, 1, 4, 1, 5, 0]), n_eff=64)
    assert len(discovery.pag.nodes) == 6


def test_a_bridge_is_read(tmp_path: Path) -> None:
    save_gpt2(tmp_path, tokenizer=True)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    tokens = torch.tensor([3, 1, 4, 1, 5])
    for values in (False, True):
        discovery = discover(bridge, tokens, n_eff=1000, values=values)
        assert (discovery.layer, discovery.ordered, discovery.complete) == (1, True, True)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([1, 2, 3], {"layer": 7}, "layer 7 does not exist"),
        ([1, 2, 3], {"head": 9}, "head 9 does not exist: layer 1 has 2 heads, 0 to 1"),
        ([1, 2, 3], {"head": -1}, "head -1 does not exist"),
        ([1, 2, 3], {"n_eff": 2}, "n_eff is 2"),
        ([1, 2, 3], {"n_eff": math.nan}, "n_eff is nan"),
        ([1, 2, 3], {"n_eff": math.inf}, "n_eff is inf"),
        ([1, 2, 3], {"alpha": 1.0}, "alpha is 1"),
        ([1, 2, 3], {"positions": (0, 9)}, "positions are"),
        ([1, 2, 3], {"positions": ()}, "positions are"),
        ([1, 2, 3], {"time_budget": -1.0}, "time_budget is -1"),
        ([1, 2, 3], {"max_cond": -1}, "max_cond is -1"),
        ([], {}, "at least one"),
        ([[0, 0, 0], [0, 0, 0]], {}, "2 sequences"),
        ([99, 99, 99], {}, "vocabulary"),
        ([0] * 40, {}, "do not fit the context of 12"),
    ],
)
def test_bad_input_is_refused(
    model: HookedTransformer, tokens: list[Any], options: dict[str, Any], message: str
) -> None:
    ids = torch.tensor(tokens, dtype=torch.int64)
    with pytest.raises((ValueError, ProbeError), match=message):
        discover(model, ids, **{"n_eff": 64, **options})


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="n_effective"):
        discover_attention(np.eye(2), n_effective=64)  # type: ignore[call-arg]
