"""In-context graphs: a tailored model infers the graph of each context, and the kernel.

Source: "How Transformers Learn Causal Structures In-Context", ICLR 2026.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mechcausal.pictures.static.task_figures import draw_side_by_side
from mechcausal.studies.replication.result import Row
from mechcausal.studies.replication.runs import Member, Run
from mechcausal.support.statistics import mean_and_stderr

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

N_SEEDS = 3
TOP1, COLUMN, ROW_ERROR = 0.005, 0.15, 0.3


def members(quick: bool) -> list[Member]:
    """The recipe, and the same from uniform attention to columns, with three seeds; quick: one."""
    seeds = range(1 if quick else N_SEEDS)
    uniform = {"model__own_column": 0.0}
    return [
        *(Member("in_context_graphs", seed) for seed in seeds),
        *(Member("in_context_graphs", seed, uniform, "uniform") for seed in seeds),
    ]


def measure(runs: list[Run], quick: bool) -> list[Row]:
    """Loss, parents, kernel and first gradient; and the loss from uniform attention to columns."""
    del quick
    own, uniform = _groups(runs)
    behind = [run.summary["parents/oracle_top1"] - run.summary["parents/top1"] for run in own]
    columns, rows = _values(own, "kernel/column_error"), _values(own, "kernel/row_error")
    named, gaps = _values(own, "parents/first_gradient_named"), _values(uniform, "loss/gap")
    return [
        _row("loss above Bayes, nats", _values(own, "loss/gap"), theory=0.0),
        _row(
            "KL of the posterior of the parents to attention", _values(own, "parents/posterior_kl")
        ),
        _row(
            f"parents that attention names fewer than Bayes' rule; must be within {TOP1}, every "
            "seed",
            behind,
            theory=0.0,
            holds=max(abs(value) for value in behind) <= TOP1,
        ),
        _row(
            f"error of the kernel by columns; must be below {COLUMN}, every seed",
            columns,
            theory=0.0,
            holds=max(columns) < COLUMN,
        ),
        _row(
            f"error of the kernel by rows, which nothing determines; must be above {ROW_ERROR}, "
            "every seed",
            rows,
            holds=min(rows) > ROW_ERROR,
        ),
        _row("examples that some head chooses", _values(own, "copies/examples_chosen"), theory=1.0),
        _row(
            "positions whose parent the first gradient names; must be all",
            named,
            theory=1.0,
            holds=min(named) == 1.0,
        ),
        _row(
            "correlation of the first gradient with χ²", _values(own, "parents/first_gradient_chi2")
        ),
        _row("from uniform attention to columns: loss above Bayes, nats", gaps),
    ]


def draw(runs: list[Run], quick: bool) -> "Mapping[str, Drawing]":
    """Losses and the kernel over training, from both starts."""
    del quick
    own, uniform = _groups(runs)
    histories = {"own column first": own[0].history, "uniform start": uniform[0].history}
    return {"in_context_graphs": draw_side_by_side(histories, "loss", "kernel")}


def _groups(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    own = [run for run in runs if not run.member.changes]
    return own, [run for run in runs if run.member.changes]


def _values(runs: list[Run], key: str) -> list[float]:
    return [run.summary[key] for run in runs]


def _row(
    quantity: str, values: list[float], *, theory: float | None = None, holds: bool | None = None
) -> Row:
    mean, stderr = mean_and_stderr(values)
    return Row("in_context_graphs", quantity, mean, stderr, theory=theory, holds=holds)
