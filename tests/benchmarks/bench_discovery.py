"""Causal discovery against known graphs: errors, numbers of tests, skeleton F1, and times.

pytest -s tests/benchmarks/bench_discovery.py
"""

import time
from collections.abc import Callable

import networkx as nx
import numpy as np
import pytest

from probes.causal_discovery import PartialCorrelationTest, icd, linear_edges
from probes.causal_discovery.causal_learn import causal_learn
from probes.causal_discovery.pag import Mark
from tests.probes.latent_dags import LatentDag, attention_with_sink, latent_dag

pytestmark = pytest.mark.benchmark

GRAPHS = 250
SEM_GRAPHS = 30


def test_oracle_graphs() -> None:
    """Random graphs with hidden variables, every question answered by d-separation."""
    names = ("OrdICD", "ICD", "ICD stable", "FCI (causal-learn)")
    rows = {name: np.zeros(5) for name in names}
    for seed in range(GRAPHS):
        for name in names:
            graph = latent_dag(seed)
            if name.startswith("FCI"):
                marks = causal_learn(graph, "fci").pag.marks
            else:
                ordered, stable = name == "OrdICD", name.endswith("stable")
                marks = icd(graph, ordered=ordered, stable=stable).pag.marks
            right = ((marks != Mark.NONE) == graph.adjacent).all()
            circles = (marks == Mark.CIRCLE).sum()
            rows[name] += (right, *graph.false_marks(marks), circles, len(graph.asked))
    print(f"\n{GRAPHS} graphs         skeletons  false heads  false tails  circles left  tests")
    for name, (right, heads, tails, circles, tests) in rows.items():
        print(
            f"{name:18} {right:11.0f} {heads:12.0f} {tails:12.0f} {circles:13.0f} "
            f"{tests / GRAPHS:8.1f}"
        )
        assert right == GRAPHS
        assert heads + tails == 0 or name.startswith("FCI")  # its rule R5 gives false tails
    assert rows["OrdICD"][-1] < rows["ICD"][-1] < rows["FCI (causal-learn)"][-1]


# --- Attention of a random linear structural equation model ---


def random_sem(
    seed: int, *, hidden: int, degree: float, nodes: int = 10
) -> tuple[LatentDag, np.ndarray]:
    """A graph, and the attention A = (I − G)⁻¹ Λ of a model on it: triangular, rows summing to 1.

    Edges j → i (j < i) with equal probability, on average `degree` a node; a node gives its
    parents a share of 0.5 to 0.9 in parts of at least 0.2 of it before normalising, and keeps
    Λ = 1 − Σ_j G_ij for itself.
    """
    source = np.random.default_rng(seed)
    edges = np.tril(source.random((nodes, nodes)) < degree / (nodes - 1), -1)
    weights = np.where(edges, source.uniform(0.2, 1.0, (nodes, nodes)), 0.0)
    totals = weights.sum(1, keepdims=True)
    shares = source.uniform(0.5, 0.9, (nodes, 1))
    effects = np.divide(weights * shares, totals, out=np.zeros_like(weights), where=totals > 0)
    attention = np.linalg.solve(np.eye(nodes) - effects, np.diag(1 - effects.sum(1)))
    dag = nx.DiGraph()
    dag.add_nodes_from(range(nodes))
    dag.add_edges_from((int(j), int(i)) for i, j in np.argwhere(edges))
    forks = [node for node in dag if dag.out_degree(node) > 1]
    source.shuffle(forks)
    gone = set(forks[:hidden])
    return LatentDag(dag, tuple(node for node in range(nodes) if node not in gone)), attention


def skeleton_f1(estimated: np.ndarray, truth: np.ndarray) -> float:
    true, false = (estimated & truth).sum(), (estimated & ~truth).sum()
    missing = (~estimated & truth).sum()
    return float(2 * true / max(1, 2 * true + false + missing))


ENGINES: dict[str, Callable[[PartialCorrelationTest], np.ndarray]] = {
    "ICD": lambda test: icd(test).pag.marks != Mark.NONE,
    "OrdICD": lambda test: icd(test, ordered=True).pag.marks != Mark.NONE,
    "FCI": lambda test: causal_learn(test, "fci").pag.marks != Mark.NONE,
}
LISTED = {
    (64, False): (0.62, 0.82, 0.59, 1.00),
    (768, False): (0.86, 0.91, 0.88, 1.00),
    (64, True): (0.53, 0.70, 0.51, 0.82),
    (768, True): (0.80, 0.87, 0.77, 0.82),
    (10**6, True): (0.96, 0.97, 0.94, 0.82),
}


def direct_skeleton(attention: np.ndarray, observed: tuple[int, ...]) -> np.ndarray:
    """The direct reading of the observed rows and columns, rows scaled to sum to 1 again."""
    part = attention[np.ix_(observed, observed)]
    estimated = np.zeros(part.shape, dtype=bool)
    for j, i in linear_edges(part / part.sum(1, keepdims=True)):
        estimated[i, j] = estimated[j, i] = True
    return estimated


@pytest.mark.parametrize("degree", [2.0, 3.0])
def test_random_sem_attention(degree: float) -> None:
    """Skeleton F1 at alpha = 0.01 for three n_eff, with and without hidden tokens."""
    print(f"\nmean skeleton F1 (as listed), {SEM_GRAPHS} graphs a cell, {degree:g} parents a node")
    print("   n_eff  hidden          ICD       OrdICD          FCI       direct   OrdICD - ICD")
    for (n_eff, with_hidden), listed in LISTED.items():
        scores = []
        for seed in range(SEM_GRAPHS):
            graph, attention = random_sem(seed, hidden=2 * with_hidden, degree=degree)
            test = PartialCorrelationTest(attention[list(graph.observed)], n_eff=n_eff)
            row = [skeleton_f1(engine(test), graph.adjacent) for engine in ENGINES.values()]
            direct = direct_skeleton(attention, graph.observed)
            scores.append([*row, skeleton_f1(direct, graph.adjacent)])
        values = np.array(scores)
        cells = "  ".join(
            f"{m:4.2f} ({w:4.2f})" for m, w in zip(values.mean(0), listed, strict=True)
        )
        gain = values[:, 1] - values[:, 0]
        print(
            f"{n_eff:8}  {with_hidden!s:6} {cells}   {gain.mean():+.2f} ± "
            f"{gain.std(ddof=1) / SEM_GRAPHS**0.5:.2f}"
        )


def test_many_tokens_beside_a_sink() -> None:
    """Seconds for 24 tokens with a sink of +8 logits, n_eff = 768."""
    print("\nspread of logits  OrdICD s  tests  edges     ICD s  tests  edges  complete")
    for spread in (0.1, 0.5, 1.0, 2.0, 4.0):
        test = PartialCorrelationTest(attention_with_sink(24, spread=spread), n_eff=768)
        cells = []
        for ordered in (True, False):
            start = time.perf_counter()
            graph = icd(test, ordered=ordered, time_budget=20.0)
            seconds = time.perf_counter() - start
            cells.append(f"{seconds:9.2f} {graph.tests:6} {len(graph.pag.edges()):6}")
        print(f"{spread:16} {'  '.join(cells)}  {graph.complete}")
