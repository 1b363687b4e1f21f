"""Figure 9: twenty random forests, each learned by its own disentangled transformer."""

import math
from collections.abc import Mapping
from functools import cache
from statistics import stdev
from typing import TYPE_CHECKING

import numpy as np

from mechcausal.pictures.static import paper_figures
from mechcausal.studies.replication.evaluation import mean_attention
from mechcausal.studies.replication.result import Row
from mechcausal.studies.replication.runs import Member, Run
from mechcausal.support.statistics import mean_and_stderr

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

PAPER = paper_figures.PAPER
ABOVE_HALF = PAPER.n_above_half / PAPER.n_edges
N_GRAPHS, N_GRAPHS_QUICK = 20, 6


def members(quick: bool) -> list[Member]:
    """One forest for each seed."""
    return [Member("figure9_forest", seed) for seed in range(N_GRAPHS_QUICK if quick else N_GRAPHS)]


def measure(runs: list[Run], quick: bool) -> list[Row]:
    """Attention on the parent: its mean and spread over graphs, and edges above one half."""
    del quick
    by_graph, edges = attention_on_parents(runs)
    mean, stderr = mean_and_stderr(by_graph)
    share = sum(value > 0.5 for value in edges) / len(edges)
    spread = stdev(by_graph) if len(by_graph) > 1 else None
    n = len(by_graph)
    count = f"{sum(value > 0.5 for value in edges)} of {len(edges)} edges"
    return [
        Row(
            "figure9",
            f"mean attention on the parent, {n} forests; must be at least the paper's",
            mean,
            stderr,
            paper=PAPER.mean,
            theory=1.0,
            holds=mean >= PAPER.mean,
        ),
        Row(
            "figure9",
            "its standard deviation over graphs",
            spread,
            None if spread is None else spread / math.sqrt(2 * (n - 1)),
            paper=PAPER.sd,
        ),
        Row("figure9", "smallest over graphs", min(by_graph), paper=PAPER.lowest),
        Row("figure9", "largest over graphs", max(by_graph), paper=PAPER.highest),
        Row(
            "figure9",
            f"share of edges with more than half of the attention ({count}); "
            "must be at least the paper's 176 of 182",
            share,
            math.sqrt(share * (1 - share) / len(edges)),
            paper=ABOVE_HALF,
            theory=1.0,
            holds=share >= ABOVE_HALF,
        ),
    ]


def draw(runs: list[Run], quick: bool) -> "Mapping[str, Drawing]":
    """Our distribution over graphs beside the paper's."""
    del quick
    by_graph, edges = attention_on_parents(runs)
    return {"figure9": paper_figures.draw_graph_distribution(np.array(by_graph), np.array(edges))}


def attention_on_parents(runs: list[Run]) -> tuple[list[float], list[float]]:
    """Attention on the parent: the mean of each graph with edges, and the value of each edge."""
    by_graph, by_edge = [], []
    for run in runs:
        if values := _on_parents(run):
            by_graph.append(sum(values) / len(values))
            by_edge += values
    return by_graph, by_edge


@cache
def _on_parents(run: Run) -> list[float]:
    """Attention on the parent for every edge of one graph."""
    pattern = mean_attention(run)[0]
    return [pattern[child, parent].item() for parent, child in run.graph.edges]
