"""The gradient of layer-1 attention against information theory, entry by entry."""

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float

from mechcausal.pictures.interactive.style import by_head, in_a_row, new_figure
from mechcausal.pictures.static.style import EDGE_COLOUR, OTHER_COLOUR
from mechcausal.records.run_data import RunData

_MOST_POINTS = 1500  # browsers animate more points too slowly


def scatter_panels(run: RunData, step: int | None = None) -> list[go.Figure]:
    """The gradient against the predicted gradient, and against chi-squared information.

    The y-axis is `-dL/dpattern`, summed over heads. Against the predicted gradient it is divided by
    the number of keys, like a gradient on the scores of uniform attention. For several parents
    there is no prediction.

    Raises:
        RunDataError: the run has no matrices, or none at this step.
    """
    _, matrices = run.frame(step, needs="gradient/pattern")
    n = run.n_graph_rows
    measured = by_head(matrices["gradient/pattern"]).sum(0)
    visible = np.tril(np.ones((n, n), dtype=bool))
    figures = []
    if "theory/gradient" in run.references:
        predicted = run.references["theory/gradient"][:n, :n]
        figure = _scatter(run, measured, predicted, visible, per_key=True)
        ends = [float(predicted[visible].min()), float(predicted[visible].max())]
        figure.add_scatter(
            x=ends, y=ends, mode="lines", name="equal", line={"width": 1, "dash": "dash"}
        )
        figure.update_layout(title_text="gradient against its prediction")
        figure.update_xaxes(title="predicted gradient")
        figure.update_yaxes(title="−∂L/∂pattern ÷ keys")
        figures.append(figure)
    if "theory/chi2" in run.references:
        chi2 = run.references["theory/chi2"][:n, :n]
        figure = _scatter(run, measured, chi2, np.tril(visible, -1), per_key=False)
        figure.update_layout(title_text="gradient against χ²-information")
        figure.update_xaxes(title="χ²-information")
        figure.update_yaxes(title="−∂L/∂pattern")
        figures.append(figure)
    return figures


def _scatter(
    run: RunData,
    measured: Float[np.ndarray, "query key"],
    expected: Float[np.ndarray, "pos pos"],
    mask: Bool[np.ndarray, "pos pos"],
    *,
    per_key: bool,
) -> go.Figure:
    n, length = len(mask), len(measured)
    is_edge = run.truth[:n, :n].astype(bool)
    figure = new_figure("")
    for chosen, name, marker in (
        (mask & ~is_edge, "other pairs", {"color": OTHER_COLOUR, "size": 6, "symbol": "circle"}),
        (mask & is_edge, "edges", {"color": EDGE_COLOUR, "size": 9, "symbol": "diamond"}),
    ):
        queries, keys = np.nonzero(chosen)
        if name == "other pairs" and len(queries) > _MOST_POINTS:
            picked = np.linspace(0, len(queries) - 1, _MOST_POINTS).round().astype(int)
            name = f"{_MOST_POINTS:,} of {len(queries):,} other pairs"
            queries, keys = queries[picked], keys[picked]
        values = measured[queries, keys] / (queries + 1 if per_key else 1)
        figure.add_scatter(
            x=expected[queries, keys].astype(np.float32),
            y=values.astype(np.float32),
            customdata=np.stack([queries, keys], 1).astype(np.int16),
            mode="markers",
            name=name,
            marker=marker | {"opacity": 0.8},
            hovertemplate="query %{customdata[0]}, key %{customdata[1]}<br>theory %{x:.4g}"
            "<br>gradient %{y:.4g}<extra></extra>",
            meta={
                "from": "gradient/pattern",
                "head": "sum",
                "as": "points",
                "per_key": per_key,
                "index": (queries * length + keys).tolist(),
            },
        )
    figure.update_layout(margin={"b": 78})
    figure.update_xaxes(nticks=6, exponentformat="power")
    figure.update_yaxes(nticks=6, exponentformat="power")
    return figure


gradient_scatter = in_a_row(scatter_panels)
