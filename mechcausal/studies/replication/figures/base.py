"""The definition of a figure, and helpers that several figures share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal, TypeVar

from jaxtyping import Float
from torch import Tensor

from mechcausal.measures.figures import STEP, History
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.pictures.static import paper_figures
from mechcausal.studies.replication.evaluation import mean_attention
from mechcausal.studies.replication.result import Row
from mechcausal.studies.replication.runs import Member, Run
from mechcausal.support.statistics import mean_and_stderr, sequence_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

K = TypeVar("K")


@dataclass(frozen=True)
class Figure:
    """The runs that a figure needs, its rows and its pictures.

    Attributes:
        members: the runs; the argument is `quick`.
        measure: rows of the table, from those runs in the same order, and `quick`.
        draw: pictures by name, `<figure>` or `<figure>_<part>`.
        group: "paper", a figure of the first paper, which has settings of its own; "theory", a
            claim about its models; "tasks", a task beyond it.
    """

    members: Callable[[bool], list[Member]]
    measure: Callable[[list[Run], bool], list[Row]]
    draw: Callable[[list[Run], bool], Mapping[str, "Drawing"]]
    group: Literal["paper", "theory", "tasks"] = "paper"


def loss_curves(runs: list[Run]) -> tuple[dict[str, History], dict[str, float]]:
    """Loss histories by seed, and the Bayes loss, for `paper_figures.draw_loss`.

    Each run is evaluated on its own sequences, which have their own Bayes loss. Each curve is
    therefore the mean Bayes loss over runs plus the run's gap to its own Bayes loss.
    """
    bayes = fmean(float(run.summary["loss/bayes"]) for run in runs)

    def shifted(run: Run) -> History:
        rows = ((row[STEP], row["loss/gap"]) for row in run.history)
        return [{STEP: s, "loss/eval": bayes + gap} for s, gap in rows if gap is not None]

    return {f"seed {run.member.seed}": shifted(run) for run in runs}, {"Bayes": bayes}


def loss_rows(
    figure: str,
    label: str,
    values: Mapping[str, Sequence[Float[Tensor, "batch"]]],
    *,
    gap: float | None,
    paper: Mapping[str, float],
) -> list[Row]:
    """Rows of losses, from the loss of every fresh sequence of each run.

    The standard error is the larger of those over seeds and over sequences.

    Args:
        figure: the figure.
        label: what was trained.
        values: by the name of the loss, a tensor for each seed.
        gap: nats above Bayes that "loss above Bayes" must stay within; None without a condition.
        paper: the paper's values, by name.
    """
    rows = []
    for name, by_run in values.items():
        means = [sequence_mean(value) for value in by_run]
        ours, over_seeds = mean_and_stderr([mean for mean, _ in means])
        stderr = max(over_seeds or 0.0, *(error for _, error in means))
        quantity, theory, holds = f"{label}: {name}, nats", None, None
        if name == "loss above Bayes":
            theory = 0.0
            if gap is not None:
                quantity += f"; must be ≤ {gap}, every seed"
                holds = all(mean <= gap for mean, _ in means)
        expected = paper.get(name)
        row = Row(figure, quantity, ours, stderr, paper=expected, theory=theory, holds=holds)
        rows.append(row)
    return rows


def draw_attention(run: Run, label: str) -> "Drawing":
    """Each head's layer-1 attention beside the graph."""
    attention = mean_attention(run).cpu()
    return paper_figures.draw_heads(attention, run.graph, f"{label}: layer-1 attention")


def disentangled(run: Run) -> DisentangledTransformer:
    """The model of a run whose recipe trains a disentangled one."""
    assert isinstance(run.model, DisentangledTransformer)
    return run.model


def grouped(runs: list[Run], key: Callable[[Run], K]) -> dict[K, list[Run]]:
    """Runs by a property of each, in the order in which its values appear."""
    groups: dict[K, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def by_recipe(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs of the same recipe, by its name."""
    return grouped(runs, lambda run: run.member.recipe)
