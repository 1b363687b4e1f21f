"""Interactive pictures of a run, as Plotly figures for notebooks, pages and W&B.

Each function takes a `RunData`. Pictures of matrices also take one of `run.steps` (default: the
last). `film` turns such a picture into one with a slider over the steps.

    >>> from mechcausal import plot
    >>> from mechcausal.records.run_data import RunData
    >>> plot.film(RunData.load("my_run"), plot.attention).show()  # doctest: +SKIP
"""

from mechcausal.pictures.interactive.comparison import overlay
from mechcausal.pictures.interactive.curves import (
    composition,
    correlations,
    formation,
    gap,
    head_scores,
    law,
    loss,
    of_task,
    own,
    recovery,
    strategies,
    weights,
)
from mechcausal.pictures.interactive.film import film
from mechcausal.pictures.interactive.graph import causal_graph
from mechcausal.pictures.interactive.lags import law_by_lag, residual_map
from mechcausal.pictures.interactive.matrices import attention, examples, gradient, heads
from mechcausal.pictures.interactive.scatter import gradient_scatter

__all__ = [
    "attention",
    "causal_graph",
    "composition",
    "correlations",
    "examples",
    "film",
    "formation",
    "gap",
    "gradient",
    "gradient_scatter",
    "head_scores",
    "heads",
    "law",
    "law_by_lag",
    "loss",
    "of_task",
    "overlay",
    "own",
    "recovery",
    "residual_map",
    "strategies",
    "weights",
]
