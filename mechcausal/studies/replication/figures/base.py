"""The definition of a figure, and helpers that several figures share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from mechcausal.measures.figures import History
from mechcausal.studies.replication.result import Row
from mechcausal.studies.replication.runs import Member, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


@dataclass(frozen=True)
class Figure:
    """The runs that a figure needs, its rows and its pictures.

    Attributes:
        members: the runs; the argument is `quick`.
        measure: rows of the table, from those runs in the same order, and `quick`.
        draw: pictures by name, `<figure>` or `<figure>_<part>`.
    """

    members: Callable[[bool], list[Member]]
    measure: Callable[[list[Run], bool], list[Row]]
    draw: Callable[[list[Run], bool], Mapping[str, "Drawing"]]


def loss_curves(runs: list[Run]) -> tuple[dict[str, History], dict[str, float]]:
    """Loss histories by seed, and the Bayes loss, for `paper_figures.draw_loss`.

    Each run is evaluated on its own sequences, which have their own Bayes loss. Each curve is
    therefore the mean Bayes loss over runs plus the run's gap to its own Bayes loss.
    """
    bayes = fmean(float(run.summary["loss/bayes"]) for run in runs)

    def shifted(run: Run) -> History:
        rows = ((row["train/step"], row["loss/gap"]) for row in run.history)
        return [{"train/step": s, "loss/eval": bayes + gap} for s, gap in rows if gap is not None]

    return {f"seed {run.member.seed}": shifted(run) for run in runs}, {"Bayes": bayes}


def by_recipe(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs of the same recipe, by its name."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.member.recipe, []).append(run)
    return groups
