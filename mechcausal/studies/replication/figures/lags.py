"""Selective lags: three layers against two.

Source: D'Angelo, Croce and Flammarion, ICLR 2025. The lag of each sequence has to be inferred; a
third layer can select the true lag's key by attention.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mechcausal.pictures.static.task_figures import draw_side_by_side
from mechcausal.studies.replication.figures.base import grouped
from mechcausal.studies.replication.result import Row
from mechcausal.studies.replication.runs import Member, Run
from mechcausal.support.statistics import mean_and_stderr

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

LAYERS, N_SEEDS = (3, 2), 3
GAP, SHARE, RATIO = 0.02, 0.85, 2.0


def members(quick: bool) -> list[Member]:
    """Both depths with three seeds; quick: one."""
    return [
        Member("selective_lags", seed, {"model__n_layers": layers}, f"{layers}layers")
        for layers in LAYERS
        for seed in range(1 if quick else N_SEEDS)
    ]


def measure(runs: list[Run], quick: bool) -> list[Row]:
    """Loss above Bayes, the true lag's share of attention, and the ratio of both depths."""
    del quick
    rows, gaps = [], {}
    for layers, group in _by_layers(runs).items():
        gaps[layers] = [run.summary["loss/gap"] for run in group]
        shares = [run.summary["lags/true_share"] for run in group]
        gap_label = f"{layers} layers: loss above Bayes, nats"
        share_label = f"{layers} layers: true lag's share of the last layer's attention to lags"
        low = close = None
        if layers == max(LAYERS):
            gap_label += f"; must be below {GAP}, every seed"
            share_label += f"; must be above {SHARE}, every seed"
            low, close = max(gaps[layers]) < GAP, min(shares) > SHARE
        rows.append(Row("lags", gap_label, *mean_and_stderr(gaps[layers]), theory=0.0, holds=low))
        posterior = mean_and_stderr([run.summary["lags/posterior"] for run in group])[0]
        share = mean_and_stderr(shares)
        rows.append(Row("lags", share_label, *share, theory=posterior, holds=close))
    ratios = [two / three for two, three in zip(gaps[2], gaps[3], strict=True)]
    quantity = f"loss above Bayes, 2 layers / 3 layers; must be at least {RATIO:g}, every seed"
    holds = min(ratios) >= RATIO
    return [*rows, Row("lags", quantity, *mean_and_stderr(ratios), holds=holds)]


def draw(runs: list[Run], quick: bool) -> "Mapping[str, Drawing]":
    """Losses and attention over training, for both depths."""
    del quick
    first = {f"{layers} layers": group[0].history for layers, group in _by_layers(runs).items()}
    return {"lags": draw_side_by_side(first, "loss", "lags")}


def _by_layers(runs: list[Run]) -> dict[int, list[Run]]:
    return grouped(runs, lambda run: run.recipe.model.n_layers)
