"""Edges over replicates of a search: stable ones are true, on graphs that are known."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from probes import discover, discover_attention
from probes.causal_discovery import bootstrap, bootstrap_model, draw
from probes.causal_discovery.stability import VARIATIONS
from tests.probes.latent_dags import LatentDag, latent_dag

N_EFF = 300


def attention_of(dag: LatentDag, seed: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Attention whose linear model has the graph's edges, and the positions that are seen.

    `A = (I - G)^-1 Λ` with positive weights; its rows are scaled to sum to 1.
    """
    source = np.random.default_rng(seed)
    n = len(dag.dag)
    effects = np.zeros((n, n))
    for cause, effect in dag.dag.edges:
        effects[effect, cause] = source.uniform(0.3, 0.9)
    matrix = np.linalg.inv(np.eye(n) - effects)
    return matrix / matrix.sum(1, keepdims=True), dag.observed


def test_true_edges_are_stable_and_false_ones_less():
    true: list[float] = []
    false: list[float] = []
    for seed in range(12):
        dag = latent_dag(seed, observed=6)
        attention, observed = attention_of(dag, seed)
        options: dict[str, Any] = {"positions": observed, "n_eff": 60, "ordered": False}
        discovery = discover_attention(attention, **options)
        stability = bootstrap(
            discovery, attention[None, None], replicates=40, over=("values",), **options
        )
        for pair in stability.pairs:
            i, j = observed.index(pair.start), observed.index(pair.end)
            (true if dag.adjacent[i, j] else false).append(pair.joined)
    assert len(true) > 60
    assert len(false) >= 15
    # Three standard errors of a difference of means.
    spread = np.sqrt(np.var(true) / len(true) + np.var(false) / len(false))
    assert np.mean(true) - np.mean(false) > max(0.3, 3 * spread)


def test_shares_are_those_of_searches_made_by_hand():
    dag = latent_dag(0, observed=6)
    attention, observed = attention_of(dag, 0)
    options: dict[str, Any] = {"positions": observed, "n_eff": N_EFF}
    discovery = discover_attention(attention, **options)
    stability = bootstrap(
        discovery, attention[None, None], replicates=9, over=("n_eff",), seed=3, **options
    )
    source = np.random.default_rng(3)
    graphs = []
    for _ in range(9):
        n_eff = (N_EFF / 2, N_EFF, 2 * N_EFF)[int(source.integers(3))]
        graphs.append(discover_attention(attention, **options | {"n_eff": n_eff}).pag)
    assert [(p.start, p.end, p.marks) for p in stability.edges] == discovery.pag.edges()
    for pair in stability.pairs:
        marks = [
            next((e for e in graph.edges() if {e.start, e.end} == {pair.start, pair.end}), None)
            for graph in graphs
        ]
        assert pair.joined == pytest.approx(sum(edge is not None for edge in marks) / 9)
        if pair.marks:
            same = [edge == (pair.start, pair.end, pair.marks) for edge in marks]
            assert pair.same == pytest.approx(sum(same) / 9)
        assert sum(pair.shares.values()) == pytest.approx(1)
    known = {(e.start, e.end) for e in discovery.pag.edges()}
    assert not known & {(p.start, p.end) for p in stability.missing}


@pytest.mark.parametrize("values", [False, True])
def test_heads_and_layers_of_a_model_vary(build: Any, values: bool):
    model: Any = build(n_layers=3, n_heads=3, n_ctx=8)
    tokens = torch.arange(7)
    options: dict[str, Any] = {"n_eff": 40}
    discovery = discover(model, tokens, layer=1, head=2, values=values, **options)
    fixed = bootstrap_model(model, tokens, discovery, replicates=4, over=("n_eff",), **options)
    assert list(fixed.n_eff) == [20, 40, 80]
    varied = bootstrap_model(
        model, tokens, discovery, replicates=40, over=("heads", "layers"), **options
    )
    # Every replicate is the graph of one of the nine heads.
    graphs = [
        discover(model, tokens, layer=layer, head=head, values=values, **options).pag
        for layer in range(3)
        for head in range(3)
    ]
    pairs = {frozenset((e.start, e.end)) for graph in graphs for e in graph.edges()}
    seen = {frozenset((p.start, p.end)) for p in varied.pairs if p.joined}
    assert seen <= pairs
    assert len(seen) > len(pairs) / 2
    everything = bootstrap_model(model, tokens, discovery, replicates=3, **options)
    assert everything.over == VARIATIONS


def test_small_n_eff_limits_the_sets_instead_of_failing():
    dag = latent_dag(1, observed=8)
    attention, observed = attention_of(dag, 1)
    options: dict[str, Any] = {"positions": observed, "n_eff": 12}
    discovery = discover_attention(attention, **options)
    stability = bootstrap(discovery, attention[None, None], replicates=6, **options)
    assert list(stability.n_eff) == [6, 12, 24]


def test_exports_and_refusals():
    attention = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    discovery = discover_attention(attention, n_eff=1000)
    stability = bootstrap(discovery, attention[None, None], replicates=5, n_eff=1000)
    content = json.loads(json.dumps(stability.to_dict()))
    assert content["replicates"] == 5
    assert (content["pairs"][0]["from"], content["pairs"][0]["to"]) == (0, 1)
    figure = draw(discovery.pag, shares={(0, 1): 0.25, (1, 2): 1.0})
    lines = figure.axes[0].lines
    assert sorted({line.get_alpha() or 1.0 for line in lines}) == [0.25, 1.0]
    assert {"25%", "100%"} <= {text.get_text() for text in figure.axes[0].texts}
    with pytest.raises(ValueError, match="replicates is 0"):
        bootstrap(discovery, attention[None, None], replicates=0, n_eff=1000)
    with pytest.raises(ValueError, match=r"over is \[\]"):
        bootstrap(discovery, attention[None, None], over=(), n_eff=1000)
