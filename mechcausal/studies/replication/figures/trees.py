"""Trees: a transformer takes up belief propagation scale by scale.

Source: Garnier-Brun, Mezard, Moscato and Saglietti, ICML 2025 (arXiv 2408.15138).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mechcausal.measures.figures import STEP, History
from mechcausal.pictures.static.task_figures import draw_side_by_side
from mechcausal.studies.replication.figures.base import grouped
from mechcausal.studies.replication.result import Row
from mechcausal.studies.replication.runs import Member, Run
from mechcausal.support.statistics import mean_and_stderr

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

N_SEEDS, KL, ACCURACY = 3, 0.02, 0.95
SETTLED = 20
"""Step from which residual χ² is compared: untrained predictions depend on the leaves."""


def members(quick: bool) -> list[Member]:
    """Masked leaves and the root with three seeds; quick: one, with half the steps."""
    seeds = range(1 if quick else N_SEEDS)
    changes = {"probing__every": 50} | ({"training__joint__steps": 2000} if quick else {})
    label = "short" if quick else ""
    root = {"task__predict": "root", "training__joint__steps": 1000 if quick else 2000}
    return [
        *(Member("tree", seed, changes, label) for seed in seeds),
        *(Member("tree", seed, root, f"root{label}") for seed in seeds),
    ]


def measure(runs: list[Run], quick: bool) -> list[Row]:
    """Distance to exact inference, the order of scales, attention by height, what is left over."""
    del quick
    leaf, root = (_by_prediction(runs)[name] for name in ("leaf", "root"))
    kl = [run.summary["tree/kl_bayes"] for run in leaf]
    quantity = f"masked leaf: KL of belief propagation to the model, nats; must be below {KL}"
    near = Row(
        "trees",
        f"{quantity}, every seed",
        *mean_and_stderr(kl),
        theory=0.0,
        holds=max(kl) < KL,
    )
    rows = [near, _mean("masked leaf: most probable symbol agrees", leaf, "tree/agreement", 1.0)]
    rows += _order(leaf)
    for layer, height in ((0, 1), (1, 2), (2, 3)):
        key = f"tree/attention_L{layer}_height_{height}"
        label = f"layer {layer}: attention to height {height}, relative to uniform"
        rows.append(_mean(label, leaf, key, None))
    agreement = [run.summary["tree/agreement"] for run in root]
    quantity = f"root: most probable symbol agrees; must be at least {ACCURACY}, every seed"
    accurate = min(agreement) >= ACCURACY
    rows.append(Row("trees", quantity, *mean_and_stderr(agreement), theory=1.0, holds=accurate))
    return rows


def _by_prediction(runs: list[Run]) -> dict[str, list[Run]]:
    return grouped(runs, lambda run: run.recipe.task.predict)


def _order(runs: list[Run]) -> list[Row]:
    """Steps at which scales are used by half, and at which their residual information is halved."""
    heights = range(1, (runs[0].recipe.task.depth or 0) + 1)
    used = [[run.summary[f"tree/step_of_scale_{h}"] for h in heights] for run in runs]
    rows = []
    for height, steps in zip(heights, zip(*used, strict=True), strict=True):
        reached = [float(step) for step in steps if step is not None]
        label = f"scale {height}: step at which it is used by half"
        rows.append(Row("trees", label, *(mean_and_stderr(reached) if reached else (None,))))
    ordered = [None not in steps and steps == sorted(steps) for steps in used]
    label = "seeds that take up scales from fine to coarse; must be all"
    share = sum(ordered) / len(ordered)
    rows.append(Row("trees", label, share, theory=1.0, holds=all(ordered)))
    for name, what in (("block", "sibling block"), ("pair", "single leaves of that block")):
        for height in heights[1:]:
            halved = [_halved(run.history, f"tree/residual_{name}_{height}") for run in runs]
            reached = [float(step) for step in halved if step is not None]
            label = f"scale {height}: step at which half of the residual χ² with the {what} is used"
            rows.append(Row("trees", label, *(mean_and_stderr(reached) if reached else (None,))))
    return rows


def _halved(history: History, key: str) -> int | None:
    """The probe step from which a figure stays below half of its value at step `SETTLED`."""
    points = [(int(row[STEP] or 0), float(row[key] or 0.0)) for row in history if key in row]
    settled = [(step, value) for step, value in points if step >= SETTLED]
    below: int | None = None
    for step, value in settled:
        if value >= settled[0][1] / 2:
            below = None
        elif below is None:
            below = step
    return below


def _mean(label: str, runs: list[Run], key: str, theory: float | None) -> Row:
    values = [run.summary[key] for run in runs]
    return Row("trees", label, *mean_and_stderr(values), theory=theory)


def draw(runs: list[Run], quick: bool) -> "Mapping[str, Drawing]":
    """Use of scales and residual information over training, for every seed."""
    del quick
    leaf = _by_prediction(runs)["leaf"]
    histories = {f"seed {run.member.seed}": run.history for run in leaf}
    drawing = draw_side_by_side(histories, "scales", "residuals")
    for axis in drawing.axes[len(histories) :]:
        axis.set_yscale("log")
        axis.set_ylim(bottom=1e-3)
    return {"trees": drawing}
