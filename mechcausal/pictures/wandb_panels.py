"""W&B panels of a finished run: interactive pictures, tables of edges and heads, the page.

Everything is drawn from the run folder; this module does not import W&B.
"""

import base64
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mechcausal.measures.figures import own_curves
from mechcausal.pictures import interactive
from mechcausal.pictures.interactive.film import thinned
from mechcausal.pictures.interactive.style import by_head
from mechcausal.pictures.static.style import HEAD_SCORES
from mechcausal.records.panels import Panel
from mechcausal.records.run_data import Matrices, RunData

EDGE_COLUMNS = ("step", "row", "parent", "attention", "gradient rank", "g", "chi2")
MOST_ROWS = 10_000
"""Limit on table rows: W&B loads a complete table at once."""
_DIGITS = 5

# Name, drawing function, and the matrix it needs (None for curves).
_FIGURES: tuple[tuple[str, Callable[[RunData], go.Figure], str | None], ...] = (
    ("attention", interactive.attention, "attention/layer0"),
    ("graph", interactive.causal_graph, "attention/layer0"),
    ("first_gradient", lambda r: interactive.gradient(r, _first(r)), "gradient/pattern"),
    (
        "first_gradient_against_theory",
        lambda r: interactive.gradient_scatter(r, _first(r)),
        "gradient/pattern",
    ),
    ("law_by_lag", interactive.law_by_lag, "residual/by_lag"),
    ("residual_map", interactive.residual_map, "residual/by_lag"),
    ("heads", interactive.heads, "heads/prefix_matching"),
    *(
        (name, getattr(interactive, name), None)
        for name in ("loss", "recovery", "correlations", "law", "formation")
    ),
)
_GRAPHLESS = ("heads/prefix_matching", "residual/by_lag")  # matrices whose pictures need no graph


def draw_panels(run: RunData, *, page: Path | None = None) -> dict[str, Panel]:
    """The panels of a run, by the names under which W&B shows them.

    Args:
        run: panels whose data the run lacks are skipped.
        page: report.html; skipped if the file does not exist.

    Raises:
        RunDataError: the run's graph or matrices cannot be read.
    """
    matrices: Matrices = run.frame()[1] if run.steps else {}
    panels: dict[str, Panel] = {}
    for name, draw, needs in _FIGURES:
        has_data = needs is None or (needs in matrices and (run.has_graph or needs in _GRAPHLESS))
        figure = draw(run) if has_data else go.Figure()
        if figure.data:
            panels[f"panels/{name}"] = portable(figure)
    for section in own_curves(run.history):
        panels[f"panels/{section}"] = portable(interactive.own(run, section))
    if run.has_graph and "attention/layer0" in matrices and run.truth.any():
        panels["panels/edges"] = edge_table(run)
    if "heads/prefix_matching" in matrices:
        panels["panels/head_scores"] = head_table(run)
    if page is not None and page.is_file():
        panels["panels/page"] = page
    return panels


def edge_table(run: RunData, *, most_rows: int = MOST_ROWS) -> pd.DataFrame:
    """Attention and gradient of every edge, step by step.

    Columns: `step`, `row` and `parent` (positions), `attention` (maximum over heads),
    `gradient rank` (of the parent among the keys up to the row, by `-dL/dpattern` summed over
    heads; 1 is the largest), and theory's `g` and `chi2`. `g` is NaN for several parents; both are
    NaN for the row that serves the query.

    Args:
        run: a run on a causal graph.
        most_rows: maximum number of rows; steps are thinned evenly to fit.

    Raises:
        RunDataError: the run's graph or matrices cannot be read.
    """
    rows, parents = np.nonzero(run.truth)
    steps = thinned(run.steps, max(2, most_rows // max(len(rows), 1)))
    g, chi2 = (_of_theory(run, name, rows, parents) for name in ("theory/g", "theory/chi2"))
    tables = []
    for step in steps:
        matrices = run.frames[step]
        attention = by_head(matrices["attention/layer0"]).max(0)
        gradient = by_head(matrices["gradient/pattern"]).sum(0)
        tables.append(
            pd.DataFrame(
                {
                    "step": step,
                    "row": rows,
                    "parent": parents,
                    "attention": attention[rows, parents],
                    "gradient rank": _ranks(gradient, rows, parents),
                    "g": g,
                    "chi2": chi2,
                }
            )
        )
    return pd.concat(tables, ignore_index=True)[list(EDGE_COLUMNS)]


def head_table(run: RunData, *, most_rows: int = MOST_ROWS) -> pd.DataFrame:
    """The scores of every head, step by step.

    Args:
        run: a run on repeated tokens.
        most_rows: maximum number of rows; steps are thinned evenly to fit.
    """
    shape = run.frame()[1]["heads/prefix_matching"].shape
    layers, heads = (index.ravel() for index in np.indices(shape))
    tables = []
    for step in thinned(run.steps, max(2, most_rows // max(layers.size, 1))):
        scores = {
            kind.replace("_", " "): run.frames[step][f"heads/{kind}"].ravel()
            for kind in HEAD_SCORES
        }
        tables.append(pd.DataFrame({"step": step, "layer": layers, "head": heads, **scores}))
    return pd.concat(tables, ignore_index=True)


def portable(figure: go.Figure) -> go.Figure:
    """The figure in a form that older Plotly versions can draw, for W&B's pages.

    Numbers become rounded plain lists with null for NaN; the background is white and the size
    automatic.
    """
    content = _plain(figure.to_plotly_json())
    for trace in content["data"]:
        trace.pop("meta", None)
    content["layout"] |= {"paper_bgcolor": "white", "plot_bgcolor": "white", "autosize": True}
    for name in ("width", "height", "meta"):
        content["layout"].pop(name, None)
    return go.Figure(content)


def _first(run: RunData) -> int:
    """The first step with a nonzero gradient: theory predicts the start of training."""
    nonzero = (step for step in run.steps if run.frames[step]["gradient/pattern"].any())
    return next(nonzero, run.steps[0])


def _ranks(gradient: np.ndarray, rows: np.ndarray, parents: np.ndarray) -> list[float]:
    ranks = []
    for row, parent in zip(rows.tolist(), parents.tolist(), strict=True):
        keys = gradient[row, : row + 1]
        known = bool(keys.any()) and math.isfinite(keys[parent])
        ranks.append(float(1 + (keys > keys[parent]).sum()) if known else math.nan)
    return ranks


def _of_theory(run: RunData, name: str, rows: np.ndarray, parents: np.ndarray) -> np.ndarray:
    values = np.full(len(rows), np.nan)
    matrix = run.references.get(name)
    if matrix is not None:
        known = rows < min(run.n_graph_rows, len(matrix))
        values[known] = matrix[rows[known], parents[known]]
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "bdata" in value:
            return _plain(_decoded(value).tolist())
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value


def _decoded(packed: Mapping[str, Any]) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(packed["bdata"]), dtype=packed["dtype"])
    shape = packed.get("shape")
    return values if shape is None else values.reshape([int(n) for n in str(shape).split(",")])
