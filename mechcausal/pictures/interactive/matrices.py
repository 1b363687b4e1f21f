"""Matrices of one probe step, each beside its reference."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int

from mechcausal.pictures.interactive.style import (
    ATTENTION_SCALE,
    COLORBAR,
    INFORMATION_SCALE,
    LARGE,
    MARK_COLOUR,
    MOST_HEADS,
    SIGNED_SCALE,
    add_squares,
    by_head,
    causal,
    draw_matrix,
    head_choices,
    head_label,
    in_a_row,
    limit_of,
    mark_parents,
    new_figure,
    reduced,
)
from mechcausal.pictures.static.style import HEAD_SCORES
from mechcausal.records.run_data import RunData, RunDataError


def attention_panels(run: RunData, step: int | None = None) -> list[go.Figure]:
    """Layer-1 attention, one picture per head, beside the true graph; squares mark parents.

    The true graph is shown as ideal attention: each row is uniform over the position's parents.

    Args:
        run: a run on a causal graph.
        step: one of `run.steps`; the last when absent.

    Raises:
        RunDataError: the run has no matrices, or none at this step.
    """
    figures = _of_heads(
        run, step, "attention/layer0", "layer-1 attention", high=1.0, unit="attention"
    )
    several = run.graph.query_parents is not None
    title = "true graph (last row: query)" if several else "true graph"
    ideal = causal(run.ideal_attention)
    figures.append(draw_matrix(ideal, title, high=1.0, unit="share of the parent"))
    for figure in figures:
        mark_parents(figure, run)
    return figures


def gradient_panels(run: RunData, step: int | None = None) -> list[go.Figure]:
    """The gradient on the layer-1 pattern beside the paper's g and the chi-squared information.

    The gradient `-dL/dpattern` and g are centred by row over the keys up to the query, as in the
    softmax. Information is shown over the keys before the query and is not centred.

    Raises:
        RunDataError: the run has no matrices, or none at this step.
    """
    title = "−∂L/∂pattern"
    figures = _of_heads(run, step, "gradient/pattern", title, signed=True, unit=title)
    for figure in figures:
        mark_parents(figure, run, MARK_COLOUR)
    return figures + _theory_panels(run)


def _theory_panels(run: RunData) -> list[go.Figure]:
    """g and the information, as far as the run has them."""
    figures = []
    if "theory/g" in run.references:
        g = np.tril(run.references["theory/g"])
        n_keys = np.arange(1, len(g) + 1)[:, None]
        centred = causal(g - g.sum(1, keepdims=True) / n_keys)
        figures.append(
            draw_matrix(centred, "theory: g minus its row's mean", signed=True, unit="g − mean")
        )
    if "theory/chi2" in run.references:
        n = run.graph.n_positions
        chi2 = causal(run.references["theory/chi2"][:n, :n], -1)
        figures.append(
            draw_matrix(chi2, "theory: χ²-information", unit="χ²", scale=INFORMATION_SCALE)
        )
    for figure in figures:
        mark_parents(figure, run, MARK_COLOUR, run.n_graph_rows)
    return figures


def example_panels(run: RunData, step: int | None = None) -> list[go.Figure]:
    """The last layer's attention from the last position of example sequences, with their tokens.

    Squares mark the targets of an induction head: positions whose parents hold the query's token.

    Raises:
        RunDataError: the run has no such matrices.
    """
    _, matrices = run.frame(step, needs="attention/examples")
    values, tokens = matrices["attention/examples"], run.examples
    if tokens is None:
        raise RunDataError(f"{run.folder or run.name}: the tokens of its examples were not kept")
    n_heads = min(values.shape[1], MOST_HEADS)
    return [_example_figure(run, values[:, head], tokens, head, n_heads) for head in range(n_heads)]


def _example_figure(
    run: RunData,
    values: Float[np.ndarray, "example key"],
    tokens: Int[np.ndarray, "example key"],
    head: int,
    n_heads: int,
) -> go.Figure:
    n_examples, length = values.shape
    layer = _last_layer(run)
    figure = new_figure(f"{layer} attention of the query{head_label(head, n_heads)}")
    has_text = length <= LARGE
    figure.add_heatmap(
        z=values.astype(np.float32),
        zmin=0.0,
        zmax=1.0,
        colorscale=ATTENTION_SCALE,
        text=[[str(token) for token in row] for row in tokens.tolist()],
        texttemplate="%{text}" if has_text else None,
        textfont={"size": float(np.clip(320 / length, 8, 14))},
        xgap=1 if has_text else 0,
        ygap=3,
        hovertemplate="sequence %{y}, position %{x}<br>token %{text}"
        "<br>attention %{z:.4g}<extra></extra>",
        colorbar=COLORBAR | {"len": 0.5, "y": -0.22},
        meta={"from": "attention/examples", "head": head, "as": "rows"},
    )
    targets = run.example_targets
    if targets is not None and has_text and bool(targets.any()):
        rows, columns = np.nonzero(targets)
        size = float(np.clip(460 / length, 8, 24))
        add_squares(figure, rows, columns, "parent holds the query's token", size=size)
    figure.update_xaxes(
        title="position (the last one is the query)", showgrid=False, zeroline=False, nticks=12
    )
    figure.update_yaxes(
        title="example",
        range=[n_examples - 0.5, -0.5],
        dtick=1,
        showgrid=False,
        zeroline=False,
    )
    figure.update_layout(margin={"b": 78})
    return figure


def _last_layer(run: RunData) -> str:
    model = run.recipe.model
    layers = {"simplified": 2, "disentangled": len(model.heads), "standard": model.n_layers}
    return f"layer-{layers[model.kind]}" if model.kind in layers else "last-layer"


def own_panels(run: RunData, step: int | None = None, *, name: str) -> list[go.Figure]:
    """A matrix of an experiment of your own, one picture for each entry of a leading axis.

    Args:
        run: a run with matrices.
        step: one of `run.steps`; the last when absent.
        name: of a matrix with two axes, or three.

    Raises:
        RunDataError: the run has no such matrix, or none at this step.
    """
    values = by_head(run.frame(step, needs=name)[1][name].astype(np.float64))
    signed = bool((values < 0).any())
    choices = head_choices(len(values), name)
    is_attention = name.startswith("attention/")
    row, column = ("query position", "key position") if is_attention else ("row", "column")
    figures = []
    for head in choices:
        figure = new_figure(name + head_label(head, len(choices)).replace("head", "no."))
        matrix = reduced(values, head)
        limit = 1.0 if is_attention else limit_of(matrix)
        figure.add_heatmap(
            z=matrix.astype(np.float32),
            zmin=-limit if signed else 0.0,
            zmax=limit,
            colorscale=SIGNED_SCALE if signed else ATTENTION_SCALE,
            hovertemplate=f"{row} %{{y}}, {column} %{{x}}<br>%{{z:.4g}}<extra></extra>",
            colorbar=COLORBAR,
            meta={"from": name, "head": head, "as": "matrix", "signed": signed},
        )
        figure.update_xaxes(title=column, showgrid=False, zeroline=False, tickformat="d")
        figure.update_yaxes(
            title=row, showgrid=False, zeroline=False, tickformat="d", autorange="reversed"
        )
        figure.update_layout(margin={"b": 78})
        figures.append(figure)
    return figures


def head_panels(run: RunData, step: int | None = None) -> list[go.Figure]:
    """Scores of every head of a run on repeated tokens, by layer (rows) and head (columns).

    Raises:
        RunDataError: the run has no matrices, or none at this step.
    """
    _, matrices = run.frame(step, needs="heads/prefix_matching")
    figures = []
    for kind in HEAD_SCORES:
        values = matrices[f"heads/{kind}"]
        figure = new_figure(kind.replace("_", " "))
        settings: dict[str, Any] = {"showgrid": False, "zeroline": False, "tickformat": "d"}
        figure.add_heatmap(
            z=values.astype(np.float32),
            zmin=0.0,
            zmax=1.0,
            colorscale=ATTENTION_SCALE,
            texttemplate="%{z:.2f}" if values.size <= 100 else None,
            xgap=2,
            ygap=2,
            hovertemplate="layer %{y}, head %{x}<br>score %{z:.4f}<extra></extra>",
            colorbar=COLORBAR,
            meta={"from": f"heads/{kind}", "as": "plain"},
        )
        figure.update_xaxes(title="head", dtick=1 if values.shape[1] <= 16 else None, **settings)
        figure.update_yaxes(
            title="layer", dtick=1 if len(values) <= 16 else None, autorange="reversed", **settings
        )
        figure.update_layout(margin={"b": 78})
        figures.append(figure)
    return figures


def _of_heads(
    run: RunData, step: int | None, name: str, title: str, *, signed: bool = False, **settings: Any
) -> list[go.Figure]:
    """A matrix of layer 1, one figure per head."""
    values = by_head(run.frame(step, needs=name)[1][name])
    choices = head_choices(len(values), name)
    return [
        draw_matrix(
            causal(reduced(values, head)),
            title + head_label(head, len(choices)),
            signed=signed,
            meta={"from": name, "head": head, "as": "matrix", "signed": signed},
            **settings,
        )
        for head in choices
    ]


attention = in_a_row(attention_panels)
gradient = in_a_row(gradient_panels)
examples = in_a_row(example_panels, width=760)
heads = in_a_row(head_panels)
