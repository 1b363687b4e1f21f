"""Plotly pictures of a tracked run."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probes.reading.labelled import LabelledTensor
from probes.watching.agreement import Target
from probes.watching.information import PairwiseInformation
from probes.watching.look import Look

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#4aa3df", "#5b5b5b")
_DASHES = ("solid", "dash", "dot", "dashdot")
_LAYOUT: dict[str, Any] = {"template": "plotly_white", "height": 420, "margin": {"t": 60, "b": 50}}


def tracker_pictures(
    looks: Sequence[Look], information: PairwiseInformation | None, target: Target, prefix: str
) -> dict[str, Any]:
    """The pictures that the looks have data for, by their names in W&B."""
    pictures: dict[str, Any] = {}
    if any(look.scores is not None for look in looks):
        pictures[f"{prefix}heads"] = _heads(looks)
    if any(name.startswith("gradient/") for look in looks for name in look.figures):
        pictures[f"{prefix}agreement"] = _agreement(looks)
    descent = looks[-1].descent if looks else None
    if descent is not None and information is not None and information.by == "position":
        pictures[f"{prefix}gradient"] = _gradient(descent, information, target, looks[-1].step)
    return pictures


def _heads(looks: Sequence[Look]) -> Any:
    """Prefix matching of every head; one colour for each layer, one dash for each head."""
    import plotly.graph_objects as go

    tables = [(look.step, look.scores) for look in looks if look.scores is not None]
    first = tables[0][1]
    figure = go.Figure()
    for row, layer in enumerate(first.layers):
        for head in range(first.n_heads):
            figure.add_scatter(
                x=[step for step, _ in tables],
                y=[scores.prefix_matching[row, head].item() for _, scores in tables],
                name=f"L{layer}H{head}",
                mode="lines+markers",
                line={
                    "color": _COLOURS[row % len(_COLOURS)],
                    "dash": _DASHES[head % len(_DASHES)],
                },
                marker={"size": 4},
            )
    figure.add_hline(
        y=first.threshold, line={"width": 1, "dash": "dot"}, annotation_text="threshold"
    )
    figure.update_layout(
        **_LAYOUT,
        title="Prefix matching of every head",
        xaxis_title="training step",
        yaxis={"title": "prefix matching", "range": [-0.02, 1.02]},
    )
    return figure


def _agreement(looks: Sequence[Look]) -> Any:
    """Correlation and edge hits of each layer; gaps where noise hides the gradient."""
    import plotly.graph_objects as go

    steps = [look.step for look in looks]
    names = sorted({n for look in looks for n in look.figures if n.startswith("gradient/")})
    layers = sorted({name.split("/")[1] for name in names})
    figure = go.Figure()
    for i, layer in enumerate(layers):
        for kind, dash in (("correlation", "solid"), ("edge_hits", "dash"), ("chance", "dot")):
            figure.add_scatter(
                x=steps,
                y=[look.figures.get(f"gradient/{layer}/{kind}") for look in looks],
                name=f"layer {layer.removeprefix('layer')}: {kind.replace('_', ' ')}",
                mode="lines+markers" if kind != "chance" else "lines",
                line={"color": _COLOURS[i % len(_COLOURS)], "dash": dash},
                connectgaps=False,
            )
    figure.update_layout(
        **_LAYOUT,
        title="Gradient on attention against the information of the data",
        xaxis_title="training step",
        yaxis={"title": "correlation, share of rows", "range": [-1.02, 1.02]},
    )
    return figure


def _gradient(
    descent: LabelledTensor, information: PairwiseInformation, target: Target, step: int
) -> Any:
    """The descent direction times the number of keys beside the information of the same rows."""
    from plotly.subplots import make_subplots

    layer = descent.coords["layer"][0]
    values = descent.sel(layer=layer).values.double()
    n = values.shape[-1]
    shift = 1 if target == "next" else 0
    scaled = (values * torch.arange(1, n + 1).unsqueeze(1))[: n - shift]
    chi2 = information.chi2.cpu()[shift:n]
    past = torch.ones_like(chi2, dtype=torch.bool).tril(shift - 1)
    titles = (f"-∂L/∂scores, layer {layer}, step {step}", "χ²-information")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.16)
    largest = scaled[past].abs().max().item()
    panels: list[tuple[Tensor, Mapping[str, Any]]] = [
        (scaled, {"colorscale": "PuOr", "reversescale": True, "zmin": -largest, "zmax": largest}),
        (chi2, {"colorscale": "Viridis", "zmin": 0.0}),
    ]
    for column, (matrix, options) in enumerate(panels, 1):
        cells = torch.where(past, matrix, torch.nan).tolist()
        bar = {"x": 0.42 if column == 1 else 1.0, "thickness": 10}
        figure.add_heatmap(z=cells, row=1, col=column, colorbar=bar, **options)
    predicted = "x[query + 1]" if target == "next" else "x[query]"
    figure.update_xaxes(title_text="key", constrain="domain")
    figure.update_yaxes(autorange="reversed", title_text="query")
    layout = _LAYOUT | {"height": 460, "margin": {"t": 100, "b": 50}}
    figure.update_layout(**layout, title=f"Row by row: what predicts {predicted}")
    return figure
