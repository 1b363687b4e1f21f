"""Pictures of a run on text: information and gradient by lag."""

import numpy as np
import plotly.graph_objects as go

from mechcausal.measures.figures import STEP, figure_of, keys_in
from mechcausal.pictures.interactive.style import ATTENTION_SCALE, MOST_HEADS, in_a_row, new_figure
from mechcausal.pictures.static.style import REFERENCE_GREY
from mechcausal.records.run_data import RunData

_FLOOR = 0.01  # residual information below it has the darkest colour
_GRADIENT = "−∂L/∂pattern"


def law_panels(run: RunData, step: int | None = None) -> list[go.Figure]:
    """Residual information by lag, layer 1's gradient by lag, and one against the other.

    Grey is the χ²-information of the text, of which residual information is what the model has not
    used. Of more than `MOST_HEADS` heads, the first ones are drawn.

    Raises:
        RunDataError: the run has no such matrices, or none at this step.
    """
    _, matrices = run.frame(step, needs="residual/by_lag")
    residual, gradient = matrices["residual/by_lag"][0], matrices["gradient/by_lag"]
    lags = np.arange(1, len(residual) + 1)
    information = new_figure("residual information by lag")
    if "text/chi2" in run.references:
        information.add_scatter(
            x=lags,
            y=run.references["text/chi2"][0].astype(np.float32),
            name="in the text",
            mode="lines",
            line={"color": REFERENCE_GREY, "dash": "dash", "width": 1.5},
            hovertemplate="lag %{x}<br>in the text %{y:.4g}<extra></extra>",
        )
    information.add_bar(
        x=lags,
        y=residual,
        name="not used yet",
        hovertemplate="lag %{x}<br>not used yet %{y:.4g}<extra></extra>",
        meta={"from": "residual/by_lag", "as": "row", "row": 0},
    )
    information.update_yaxes(title="χ²", rangemode="tozero")
    by_lag, scatter = new_figure("gradient by lag"), new_figure("gradient against information")
    for head, values in enumerate(gradient[:MOST_HEADS]):
        meta = {"from": "gradient/by_lag", "as": "row", "row": head}
        name = f"head {head}"
        by_lag.add_scatter(
            x=lags,
            y=values,
            name=name,
            mode="lines+markers",
            line={"width": 1.5},
            marker={"size": 5},
            hovertemplate=f"{name}, lag %{{x}}<br>%{{y:.4g}}<extra></extra>",
            meta=meta,
        )
        scatter.add_scatter(
            x=residual,
            y=values,
            name=name,
            mode="markers",
            marker={"size": 7, "opacity": 0.85},
            text=[f"lag {lag}" for lag in lags],
            hovertemplate=f"{name}, %{{text}}<br>χ² %{{x:.4g}}<br>{_GRADIENT} %{{y:.4g}}"
            "<extra></extra>",
            meta=meta | {"x": "residual/by_lag"},
        )
    by_lag.update_yaxes(title=_GRADIENT)
    scatter.update_xaxes(title="residual information, χ²")
    scatter.update_yaxes(title=_GRADIENT)
    for figure in (information, by_lag):
        figure.update_xaxes(title="lag", nticks=9)
    for figure in (information, by_lag, scatter):
        figure.update_layout(margin={"b": 78})
        figure.update_yaxes(nticks=6)
    return [information, by_lag, scatter]


def residual_map(run: RunData) -> go.Figure:
    """Residual information by lag (rows) over training (columns); colours are logarithmic."""
    figure = new_figure("residual information by lag")
    keys = keys_in(run.history, ["residual/lag{lag}"])
    rows = [row for row in run.history if keys and row.get(keys[0]) is not None]
    if not rows:
        return figure
    values = np.array([[row.get(key) for row in rows] for key in keys], dtype=float)
    low, high = np.log10(_FLOOR), max(np.log10(np.nanmax(values).clip(min=10 * _FLOOR)), -1.0)
    ticks = np.arange(low, np.floor(high) + 1)
    figure.add_heatmap(
        x=[int(row[STEP] or 0) for row in rows],
        y=list(range(1, len(keys) + 1)),
        z=np.log10(values.clip(min=_FLOOR)).astype(np.float32),
        customdata=values.astype(np.float32),
        zmin=low,
        zmax=high,
        colorscale=ATTENTION_SCALE,
        hovertemplate="step %{x}, lag %{y}<br>χ² %{customdata:.4g}<extra></extra>",
        colorbar={
            "title": {"text": "χ²"},
            "thickness": 10,
            "outlinewidth": 0,
            "tickvals": ticks.tolist(),
            "ticktext": [f"{10**tick:g}" for tick in ticks],
        },
        meta={"keys": {key: figure_of(key).label for key in keys[:4]}},
    )
    figure.update_xaxes(title="training step", showgrid=False)
    figure.update_yaxes(title="lag", autorange="reversed", showgrid=False, nticks=9)
    return figure


law_by_lag = in_a_row(law_panels)
