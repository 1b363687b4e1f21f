"""Figures 5 and 7: several parents per position, several heads in layer 1."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mechcausal.measures.plateaus import Drop, Plateau, find_drops, find_plateaus, steepest_drop
from mechcausal.pictures.static import paper_figures
from mechcausal.studies.replication.evaluation import losses, precise
from mechcausal.studies.replication.figures.base import (
    by_recipe,
    disentangled,
    draw_attention,
    loss_curves,
    loss_rows,
)
from mechcausal.studies.replication.result import Row
from mechcausal.studies.replication.runs import Member, Run
from mechcausal.support.statistics import mean_and_stderr

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

PAPERS = "figure5_two_parents"
GRAPHS = {
    PAPERS: "two parents",
    "figure5_trigrams": "trigrams",
    "figure5_fourgrams": "fourgrams",
}
# Read off the paper's plot, nats; its loss drops between steps 3,000 and 4,000.
PLATEAU, FINAL, BAYES = 1.17, 0.889, 0.875
GAP, ROWS = 0.02, 0.95


def members(quick: bool) -> list[Member]:
    """The paper's graph with three seeds, the others with two; quick: one."""
    n_seeds = dict.fromkeys(GRAPHS, 1) if quick else dict.fromkeys(GRAPHS, 2) | {PAPERS: 3}
    return [Member(recipe, seed) for recipe in GRAPHS for seed in range(n_seeds[recipe])]


def measure_losses(runs: list[Run], quick: bool) -> list[Row]:
    """Final loss against Bayes, plateau and drop."""
    rows = []
    for recipe, group in by_recipe(runs).items():
        label, in_paper = GRAPHS[recipe], recipe == PAPERS
        by_run = [losses(run, 2 * precise(quick)) for run in group]
        values = {
            "loss": [v["model"] for v in by_run],
            "Bayes loss": [v["bayes"] for v in by_run],
            "loss above Bayes": [v["model"] - v["bayes"] for v in by_run],
        }
        paper = {"loss": FINAL, "Bayes loss": BAYES, "loss above Bayes": FINAL - BAYES}
        rows += loss_rows("figure5", label, values, gap=GAP, paper=paper if in_paper else {})
        rows += _plateau_rows(label, group, in_paper)
    return rows


def _plateau_rows(label: str, group: list[Run], in_paper: bool) -> list[Row]:
    """The steepest drop, and the plateau or shoulder before it."""
    drops = [drop for drop in map(_drop, group) if drop is not None]
    condition = "; must be found in every seed" if in_paper else ""
    holds = len(drops) == len(group) if in_paper else None
    quantity = f"{label}: plateau (or shoulder) before the drop, nats{condition}"
    paper_level, paper_step = (PLATEAU, 3500.0) if in_paper else (None, None)
    if not drops:
        return [Row("figure5", quantity, None, paper=paper_level, holds=holds)]
    levels = [plateau.level for plateau, _ in drops]
    steps = [drop.middle for _, drop in drops]
    heights = [drop.height for _, drop in drops]
    level, step, height = (mean_and_stderr(values) for values in (levels, steps, heights))
    drop_label = f"{label}: step of the drop (the paper's of 65,536 steps of its own schedule)"
    return [
        Row("figure5", quantity, *level, paper=paper_level, holds=holds),
        Row("figure5", drop_label, *step, paper=paper_step),
        Row("figure5", f"{label}: height of the drop, nats", *height),
    ]


def _drop(run: Run) -> tuple[Plateau, Drop] | None:
    drops = find_drops(run.history)
    if not drops:
        return steepest_drop(run.history)
    drop = max(drops, key=lambda drop: drop.height)
    before = [p for p in find_plateaus(run.history) if p.stop <= drop.start]
    return before[-1], drop


def measure_heads(runs: list[Run], quick: bool) -> list[Row]:
    """Heads matched to parents, row by row."""
    del quick
    rows = []
    for recipe, group in by_recipe(runs).items():
        label = GRAPHS[recipe]
        for name, quantity, has_condition in (
            ("graph/rows_matched", f"rows whose parents all have a head; must be ≥ {ROWS}", True),
            (
                "graph/identified_rows_matched",
                "the same without rows in which other attention predicts as well; "
                f"must be ≥ {ROWS}",
                True,
            ),
            ("graph/recovered", "edges that get their head's attention", False),
            ("graph/parent_attention", "mean attention of the matched head on its parent", False),
            ("graph/head_consistency", "rows in which heads keep their parents", False),
        ):
            values = [run.summary[name] for run in group if run.summary.get(name) is not None]
            if values:
                ours, stderr = mean_and_stderr(values)
                holds = all(value >= ROWS for value in values) if has_condition else None
                row = Row("figure7", f"{label}: {quantity}", ours, stderr, theory=1.0, holds=holds)
                rows.append(row)
    return rows


def draw_losses(runs: list[Run], quick: bool) -> "Mapping[str, Drawing]":
    """Loss against Bayes and the strategies, plateaus marked."""
    del quick
    drawings: dict[str, Any] = {}
    for recipe, group in by_recipe(runs).items():
        histories, levels = loss_curves(group)
        drawings[f"figure5_{recipe.split('_', 1)[1]}"] = paper_figures.draw_loss(
            histories, levels, plateaus=_plateau_before_drop(group[0])
        )
    return drawings


def _plateau_before_drop(run: Run) -> list[Plateau]:
    plateau_and_drop = _drop(run)
    return [] if plateau_and_drop is None else [plateau_and_drop[0]]


def draw_heads(runs: list[Run], quick: bool) -> "Mapping[str, Drawing]":
    """Each head's attention beside the graph, and the blocks of A1, A2 and W."""
    del quick
    drawings: dict[str, Any] = {}
    for recipe, group in by_recipe(runs).items():
        run, name = group[0], recipe.split("_", 1)[1]
        drawings[f"figure7_{name}_heads"] = draw_attention(run, GRAPHS[recipe])
        drawings[f"figure7_{name}_blocks"] = paper_figures.draw_blocks(disentangled(run), run.graph)
    return drawings
