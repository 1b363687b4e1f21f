"""Curves of a run over training steps; stage starts and the formation step are marked."""

from collections.abc import Sequence
from itertools import cycle

import plotly.graph_objects as go

from mechcausal.measures.figures import STEP, axis_limits, curves, figure_of, keys_in, own_curves
from mechcausal.pictures.interactive.style import new_figure
from mechcausal.pictures.static.style import REFERENCE_DASHES, REFERENCE_GREY
from mechcausal.records.run_data import RunData

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MOST_NAMES = 12


def loss(run: RunData) -> go.Figure:
    """The loss in nats, with those of Bayes and of the hand-built model."""
    return _draw(run, *curves(run.history, "loss"))


def gap(run: RunData) -> go.Figure:
    """Loss minus its references, or the gain from the context on repeated tokens, in nats."""
    figure = _draw(run, *curves(run.history, "gap"))
    if run.kind == "repeated_tokens":
        figure.update_layout(title_text="gain from the context")
    return figure


def recovery(run: RunData) -> go.Figure:
    """How much of the graph layer 1's attention and the gradient recover."""
    return _draw(run, *curves(run.history, "recovery"))


def correlations(run: RunData) -> go.Figure:
    """Correlation of the gradient with theory, and the share of rows whose parent it names."""
    return _draw(run, *curves(run.history, "correlations"))


def law(run: RunData) -> go.Figure:
    """On text: correlation over lags of the gradient with residual and with raw information."""
    return _draw(run, *curves(run.history, "law"))


def formation(run: RunData) -> go.Figure:
    """Attention and scores of the induction head."""
    return _draw(run, *curves(run.history, "formation"))


def strategies(run: RunData) -> go.Figure:
    """KL divergence of the model's predictions from each strategy, in nats."""
    return _draw(run, *curves(run.history, "strategies"))


def weights(run: RunData) -> go.Figure:
    """Weights of the strategies in the mixture that comes nearest to the model's predictions."""
    return _draw(run, *curves(run.history, "weights"))


def composition(run: RunData) -> go.Figure:
    """K-composition of the last layer's heads with earlier ones."""
    return _draw(run, *curves(run.history, "composition"))


def of_task(run: RunData, group: str) -> go.Figure:
    """Figures of one kind of task over training.

    Args:
        run: a run.
        group: one of `TASK_CURVES`.
    """
    return _draw(run, *curves(run.history, group))


def own(run: RunData, section: str) -> go.Figure:
    """Figures of an experiment of your own that share the part of their keys before the slash.

    Args:
        run: a run with figures that docs/figures.md does not list.
        section: such as "tree" for `tree/kl_root`.
    """
    return _draw(run, section, own_curves(run.history).get(section, []))


def head_scores(run: RunData, kind: str = "prefix_matching") -> go.Figure:
    """One score of every head of a run on repeated tokens.

    Args:
        run: a run on repeated tokens.
        kind: one of `HEAD_SCORES`.
    """
    keys = keys_in(run.history, [f"heads/{{head}}/{kind}"])
    return _draw(run, f"{kind.replace('_', ' ')} by head", keys)


def _draw(run: RunData, title: str, keys: Sequence[str]) -> go.Figure:
    """Figures over training steps."""
    figure = new_figure(title)
    dashes = cycle(_DASHES)
    columns = {key: run.column(key) for key in keys}
    for key, (steps, values) in columns.items():
        if all(value is None for value in values):
            continue
        item = figure_of(key)
        figure.add_scatter(
            x=steps,
            y=values,
            name=item.label,
            mode="lines" if len(steps) > 1 else "markers",
            line={"width": 1.5, "dash": REFERENCE_DASHES[key], "color": REFERENCE_GREY}
            if item.reference
            else {"width": 2, "dash": next(dashes)},
            hovertemplate=f"{item.label} %{{y:.4g}}<extra></extra>",
            meta={"key": key},
        )
    last = max((int(row[STEP] or 0) for row in run.history), default=0)
    _mark_events(figure, run, last)
    lay_out(figure, last, len(figure.data))
    limits = axis_limits(keys, (value for _, values in columns.values() for value in values))
    has_reference = any(figure_of(key).reference for key in keys)
    figure.update_yaxes(
        title=figure_of(keys[0]).unit if keys else None,
        range=limits,
        rangemode="normal" if has_reference else "tozero",
    )
    return figure


def lay_out(figure: go.Figure, last: int, n_names: int) -> None:
    """Set the axes of curves up to step `last`; show a legend unless it has too many names."""
    figure.update_xaxes(title="training step", range=[0, max(last, 1)], nticks=6)
    figure.update_yaxes(nticks=6)
    figure.update_layout(hovermode="x unified", margin={"b": 84}, legend={"y": -0.24})
    # A longer legend leaves no room for the curves; hovering shows the names, too.
    figure.update_layout(showlegend=n_names <= _MOST_NAMES)


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
