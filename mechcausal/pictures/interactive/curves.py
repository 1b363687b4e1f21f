"""Curves of a run over training steps; stage starts and the formation step are marked."""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import plotly.graph_objects as go

from mechcausal.measures.figures import STEP
from mechcausal.pictures.interactive.style import REFERENCE_GREY, new_figure
from mechcausal.records.run_data import RunData

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
REFERENCES = {"loss/bayes": "dash", "loss/construction": "dashdot", "loss/chance": "dash"}
"""Reference losses, drawn in grey, with their line styles."""
_MOST_NAMES = 12
SHARE = {"range": [-0.03, 1.05]}


def loss(run: RunData) -> go.Figure:
    """The loss in nats, with those of Bayes and of the hand-built model."""
    labels = {
        "loss/eval": "evaluation",
        "loss/train": "training",
        "loss/first_copy": "first copy",
        "loss/second_copy": "second copy",
        "loss/bayes": "Bayes",
        "loss/construction": "hand-built",
        "loss/chance": "chance",
    }
    return curves(run, labels, "loss", "nats")


def gap(run: RunData) -> go.Figure:
    """Loss minus its references, or the gain from the context on repeated tokens, in nats."""
    labels = {
        "loss/gap": "evaluation − Bayes",
        "loss/construction_gap": "evaluation − hand-built",
        "loss/in_context_gain": "first − second copy",
    }
    title = "loss above its references" if run.kind == "causal_graph" else "gain from the context"
    return curves(run, labels, title, "nats", rangemode="tozero")


def recovery(run: RunData) -> go.Figure:
    """How much of the graph layer 1's attention and the gradient recover."""
    labels = {
        "graph/recovered": "edges recovered",
        "graph/parent_attention": "attention on the parent",
        "graph/f1": "F1 of the gradient's edges",
        "graph/rows_matched": "rows with all parents",
        "graph/query_attention": "query's attention on its parents",
    }
    if not run.column("graph/query_attention")[0]:  # single parents: equals `graph/recovered`
        labels.pop("graph/rows_matched")
    return curves(run, labels, "graph recovery", "share", **SHARE)


def correlations(run: RunData) -> go.Figure:
    """Correlation of the gradient with theory, and the share of rows whose parent it names."""
    labels = {
        "gradient/pattern_theory_correlation": "∂L/∂pattern with prediction",
        "gradient/theory_correlation": "∂L/∂scores with prediction",
        "gradient/pattern_chi2_correlation": "∂L/∂pattern with χ²",
        "gradient/pattern_shannon_correlation": "∂L/∂pattern with Shannon",
        "gradient/pattern_edge_hits": "rows that name the parent",
    }
    return curves(run, labels, "gradient against theory", "correlation", **_signed(run, labels))


def formation(run: RunData) -> go.Figure:
    """Attention and scores of the induction head."""
    labels = {
        "induction/score": "induction score",
        "induction/attention": "attention, with chance",
        "induction/prefix_matching": "prefix matching",
        "induction/copying": "copying",
        "induction/positional_control": "positional control",
    }
    return curves(run, labels, "induction head", "score", **_signed(run, labels))


def strategies(run: RunData) -> go.Figure:
    """KL divergence of the model's predictions from each strategy, in nats."""
    keys = _keys(run, "strategy/kl_")
    labels = {key: key.removeprefix("strategy/kl_") for key in keys}
    return curves(run, labels, "KL to a strategy", "nats", rangemode="tozero")


def composition(run: RunData) -> go.Figure:
    """K-composition of the last layer's heads with earlier ones."""
    keys = _keys(run, "composition/")
    labels = {key: key.removeprefix("composition/").replace("_", " ") for key in keys}
    return curves(run, labels, "K-composition", "score", rangemode="tozero")


def head_scores(run: RunData, kind: str = "induction") -> go.Figure:
    """One score of every head of a run on repeated tokens.

    Args:
        run: a run on repeated tokens.
        kind: one of `HEAD_SCORES`.
    """
    keys = [key for key in _keys(run, "heads/") if key.endswith(f"/{kind}")]
    labels = {key: key.split("/")[1] for key in keys}
    return curves(run, labels, f"{kind.replace('_', ' ')} by head", "score", **SHARE)


def curves(
    run: RunData, labels: Mapping[str, str], title: str, unit: str, **axis: Any
) -> go.Figure:
    """Figures over training steps; figures that the run lacks are skipped.

    Args:
        run: the run whose history is drawn.
        labels: label of each figure, by key.
        title: title of the picture.
        unit: unit of the vertical axis.
        **axis: further Plotly settings of the vertical axis.
    """
    figure = new_figure(title)
    dashes = cycle(_DASHES)
    for key, label in labels.items():
        steps, values = run.column(key)
        if all(value is None for value in values):
            continue
        reference = key in REFERENCES
        figure.add_scatter(
            x=steps,
            y=values,
            name=label,
            mode="lines" if len(steps) > 1 else "markers",
            line={
                "width": 1.5 if reference else 2,
                "dash": REFERENCES[key] if reference else next(dashes),
                **({"color": REFERENCE_GREY} if reference else {}),
            },
            hovertemplate=f"{label} %{{y:.4g}}<extra></extra>",
            meta={"key": key},
        )
    last = max((int(row[STEP] or 0) for row in run.history), default=0)
    _mark_events(figure, run, last)
    lay_out(figure, last, len(figure.data))
    figure.update_yaxes(title=unit, **axis)
    return figure


def lay_out(figure: go.Figure, last: int, n_names: int) -> None:
    """Set the axes of curves up to step `last`; show a legend unless it has too many names."""
    figure.update_xaxes(title="training step", range=[0, max(last, 1)], nticks=6)
    figure.update_yaxes(nticks=6)
    figure.update_layout(hovermode="x unified", margin={"b": 84}, legend={"y": -0.24})
    # A longer legend leaves no room for the curves; hovering shows the names, too.
    figure.update_layout(showlegend=n_names <= _MOST_NAMES)


def _signed(run: RunData, labels: Mapping[str, str]) -> dict[str, Any]:
    """Settings of an axis from the smallest value (at most 0) to 1."""
    lows = [value for key in labels for value in run.column(key)[1] if value is not None]
    return {"range": [min(-0.03, min(lows, default=0.0) - 0.05), 1.05]}


def _mark_events(figure: go.Figure, run: RunData, last: int) -> None:
    events = [(start, name, "dot") for name, start in run.stage_starts.items() if start]
    if run.formation_step is not None:
        events.append((run.formation_step, "formed", "dash"))
    for number, (step, label, dash) in enumerate(sorted(events)):
        # Two events may be close: the first one's label goes to the left of its line.
        left = (number == 0 and len(events) > 1 and step > 0.2 * last) or step > 0.85 * last
        figure.add_vline(
            x=step,
            line={"width": 1, "dash": dash, "color": REFERENCE_GREY},
            annotation={
                "text": {"stage2": "stage 2"}.get(label, label),
                "font": {"size": 10},
                "y": 1.0,
                "yanchor": "bottom",
                "xanchor": "right" if left else "left",
                "showarrow": False,
            },
        )


def _keys(run: RunData, prefix: str) -> list[str]:
    return sorted({key for row in run.history for key in row if key.startswith(prefix)})
