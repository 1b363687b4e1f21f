"""Figures 2, 6 and 8: one parent per position; disentangled and standard transformers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mechcausal.measures.blocks import block_effects, block_shares
from mechcausal.pictures.static import paper_figures
from mechcausal.studies.replication.evaluation import fresh_batch, losses, precise
from mechcausal.studies.replication.figures.base import (
    by_recipe,
    disentangled,
    draw_attention,
    loss_curves,
    loss_rows,
)
from mechcausal.studies.replication.result import Row
from mechcausal.studies.replication.runs import Member, Run
from mechcausal.support.statistics import mean_and_stderr, sequence_mean
from mechcausal.tasks import soft_cross_entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

GRAPHS = {
    "figure2_chain": "chain",
    "figure2_icl": "in-context pairs",
    "figure2_random": "random graph",
    "figure2_manual": "graph by hand",
}
# The loss of the authors' Bayes predictor, and of the same with correctly counted roots (S = 10,
# T = 20, alpha = 0.1), nats. The true Bayes loss is lower: roots too inform about the matrix.
BAYES = {"figure2_chain": (1.776, 1.763), "figure2_icl": (1.962, 1.928)}
CHAIN_GAP = 0.05  # nats above Bayes that the chain must come within
MLP_LOSS, MLP_GAP, MLP_EDGES = 1.763, 0.02, 0.95


def members(quick: bool) -> list[Member]:
    """Each graph with three seeds; quick: one, with half the steps for all but the chain."""
    if not quick:
        return [Member(recipe, seed) for recipe in GRAPHS for seed in range(3)]
    shorter = {"training__joint__steps": 2000, "probing__every": 200}
    chain, *others = GRAPHS
    return [Member(chain), *(Member(name, changes=shorter, label="short") for name in others)]


def measure_losses(runs: list[Run], quick: bool) -> list[Row]:
    """Edges recovered, and the loss against the true Bayes loss and the authors' Bayes loss."""
    rows = []
    for recipe, group in by_recipe(runs).items():
        rows += _measure_graph("figure2", GRAPHS[recipe], recipe, group, quick)
    return rows


# The blocks of the paper's solution: matrix, block, what it does.
BLOCKS = (
    ("A1.0", "position:position", "A1 in position × position"),
    ("A2.0", "token:0.0/token", "A2 in token × attended token"),
    ("W", "1.0/token", "W in the token that layer 2 attends to"),
)


def measure_blocks(runs: list[Run], quick: bool) -> list[Row]:
    """Rise of the loss without each block: the paper's bright blocks must have the largest."""
    del quick
    rows = []
    for recipe, group in by_recipe(runs).items():
        effects = [_block_effects(run) for run in group]
        shares = [block_shares(disentangled(run)) for run in group]
        for matrix, block, description in BLOCKS:
            name = f"blocks/{matrix}/{block}"
            rise, stderr = mean_and_stderr([effect[name] for effect in effects])
            largest = all(e[name] == _largest(e, f"blocks/{matrix}/") for e in effects)
            quantity = (
                f"{GRAPHS[recipe]}: rise of the loss without {description}, nats; must be the "
                "largest of its matrix, every seed"
            )
            rows.append(Row("figure6", quantity, rise, stderr, holds=largest))
            share, spread = mean_and_stderr([share[name] for share in shares])
            quantity = f"{GRAPHS[recipe]}: share of the squared norm of its matrix in {description}"
            rows.append(Row("figure6", quantity, share, spread, theory=1.0))
    return rows


def _block_effects(run: Run) -> dict[str, float]:
    batch, epsilon = fresh_batch(run, 1), run.recipe.training.epsilon

    def loss() -> float:
        prediction = run.model(batch.tokens)
        return soft_cross_entropy(prediction, batch.target, epsilon=epsilon).item()

    return block_effects(disentangled(run), loss)


def _largest(values: Mapping[str, float], prefix: str) -> float:
    return max(value for name, value in values.items() if name.startswith(prefix))


def draw_losses(runs: list[Run], quick: bool) -> "Mapping[str, Drawing]":
    """Loss against Bayes for each graph; layer-1 attention of the first seed beside the graph."""
    del quick
    drawings: dict[str, Any] = {}
    for recipe, group in by_recipe(runs).items():
        histories, levels = loss_curves(group)
        name = recipe.split("_", 1)[1]
        drawings[f"figure2_{name}_loss"] = paper_figures.draw_loss(histories, levels)
        drawings[f"figure2_{name}_attention"] = draw_attention(group[0], GRAPHS[recipe])
    return drawings


def draw_blocks(runs: list[Run], quick: bool) -> "Mapping[str, Drawing]":
    """A1, A2 and W of the first seed, block by block."""
    del quick
    return {
        f"figure6_{recipe.split('_', 1)[1]}": paper_figures.draw_blocks(
            disentangled(group[0]), group[0].graph
        )
        for recipe, group in by_recipe(runs).items()
    }


def mlp_members(quick: bool) -> list[Member]:
    """The standard transformer with three seeds; quick: one."""
    return [Member("figure8_mlp", seed) for seed in range(1 if quick else 3)]


def measure_mlp(runs: list[Run], quick: bool) -> list[Row]:
    """Edges named by layer 1's mean pattern, loss, and loss above Bayes."""
    recovered, stderr = mean_and_stderr([run.summary["graph/recovered"] for run in runs])
    label = f"edges named by layer 1; must be ≥ {MLP_EDGES}"
    row = Row(
        "figure8", label, recovered, stderr, paper=1.0, theory=1.0, holds=recovered >= MLP_EDGES
    )
    values = _against_bayes([losses(run, precise(quick)) for run in runs])
    paper = {"loss": MLP_LOSS}
    return [row, *loss_rows("figure8", "chain, MLP", values, gap=MLP_GAP, paper=paper)]


def draw_mlp(runs: list[Run], quick: bool) -> "Mapping[str, Drawing]":
    """Loss against Bayes, and layer 1's mean pattern beside the chain."""
    del quick
    histories, levels = loss_curves(runs)
    return {
        "figure8_loss": paper_figures.draw_loss(histories, levels),
        "figure8_attention": draw_attention(runs[0], "chain, MLP"),
    }


def _measure_graph(
    figure: str, label: str, recipe: str, group: list[Run], quick: bool
) -> list[Row]:
    recovered, stderr = mean_and_stderr([run.summary["graph/recovered"] for run in group])
    attention, spread = mean_and_stderr([run.summary["graph/parent_attention"] for run in group])
    rows = [
        Row(
            figure,
            f"{label}: share of edges recovered; must be 1",
            recovered,
            stderr,
            paper=1.0,
            theory=1.0,
            holds=recovered == 1.0,
        ),
        Row(figure, f"{label}: mean attention on the parent", attention, spread, theory=1.0),
    ]
    gap = CHAIN_GAP if recipe == "figure2_chain" else None
    by_run = [losses(run, precise(quick)) for run in group]
    rows += loss_rows(figure, label, _against_bayes(by_run), gap=gap, paper={})
    values = by_run[0]
    bayes, bayes_stderr = sequence_mean(values["bayes"])
    rows.append(Row(figure, f"{label}: Bayes loss, nats", bayes, bayes_stderr))
    paper, corrected = BAYES.get(recipe, (None, None))
    for name, description, paper_value, theory in (
        ("miscounted", "loss of the authors' Bayes predictor, which miscounts roots", paper, None),
        ("counted", "the same with roots counted right", None, corrected),
    ):
        ours, stderr = sequence_mean(values[name])
        expected = paper_value if paper_value is not None else theory
        condition = "" if expected is None else "; must agree within 3 standard errors"
        holds = None if expected is None else abs(ours - expected) <= 3 * stderr
        quantity = f"{label}: {description}, nats{condition}"
        row = Row(figure, quantity, ours, stderr, paper=paper_value, theory=theory, holds=holds)
        rows.append(row)
    return rows


def _against_bayes(by_run: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
    """The loss of every sequence, and how far it is above Bayes, for each run."""
    return {
        "loss": [values["model"] for values in by_run],
        "loss above Bayes": [values["model"] - values["bayes"] for values in by_run],
    }
