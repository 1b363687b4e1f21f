"""Curves of several runs; runs that differ only in their seed become a mean with a band."""

import json
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from mechcausal.measures.figures import figure_of
from mechcausal.pictures.interactive.curves import lay_out
from mechcausal.pictures.interactive.style import new_figure
from mechcausal.pictures.static.style import REFERENCE_DASHES, REFERENCE_GREY
from mechcausal.records.run_data import RunData

_COLOURS = ("#0f7ac6", "#d55e00", "#009e73", "#c0629b", "#a07c00", "#7a6fd0")
_DASHES = ("solid", "dash", "dot", "dashdot")
_MOST_LINES = 12  # maximum number of single runs drawn per group


def groups(runs: Sequence[RunData]) -> list[list[RunData]]:
    """Group runs whose recipes differ only in the seed, in the order of the runs."""
    by_recipe: dict[str, list[RunData]] = {}
    for run in runs:
        values = run.comparable()
        values.pop("seed", None)
        values.pop("device", None)
        by_recipe.setdefault(json.dumps(values, sort_keys=True), []).append(run)
    return list(by_recipe.values())


def overlay(
    runs: Sequence[RunData],
    key: str,
    *,
    title: str | None = None,
    reference: str | Sequence[str] = (),
    labels: Sequence[str] | None = None,
) -> go.Figure:
    """One figure of several runs over training steps.

    Runs of one recipe with different seeds are thin lines. Their mean is a thick line with a band
    of one standard deviation to each side, at the steps that all of these runs have.

    Args:
        runs: in any order.
        key: name of the figure in metrics.jsonl.
        title: title of the picture; the figure's name when absent.
        reference: one or more keys of figures to draw in grey, such as the Bayes loss.
        labels: one name per group of runs, in the order of `groups`.
    """
    figure, grouped = new_figure(title or figure_of(key).title), groups(runs)
    references = [reference] if isinstance(reference, str) else reference
    last = 1
    for number, members in enumerate(grouped):
        label = labels[number] if labels else escaped(members[0].recipe.name)
        colour = _COLOURS[number % len(_COLOURS)]
        dash = _DASHES[number // len(_COLOURS) % len(_DASHES)]
        columns = [dict(zip(*run.column(key), strict=True)) for run in members]
        columns = [column for column in columns if any(v is not None for v in column.values())]
        if not columns:
            continue
        last = max(last, *(max(column) for column in columns))
        line = {"color": colour, "dash": dash}
        if len(columns) > 1:
            _add_band(figure, columns, colour, label)
            for column in columns[:_MOST_LINES]:
                figure.add_scatter(
                    x=list(column),
                    y=list(column.values()),
                    mode="lines",
                    line=line | {"width": 0.8},
                    opacity=0.35,
                    legendgroup=label,
                    showlegend=False,
                    hoverinfo="skip",
                )
        steps = _common_steps(columns)
        figure.add_scatter(
            x=steps,
            y=[float(np.mean([column[step] for column in columns])) for step in steps],
            mode="lines" if len(steps) > 1 else "markers",
            name=label + (f" (mean of {len(columns)})" if len(columns) > 1 else ""),
            legendgroup=label,
            line=line | {"width": 2.5},
            hovertemplate=f"{label} %{{y:.4g}}<extra></extra>",
            meta={"key": key},
        )
        for name in references:
            levels = [row[name] for run in members for row in run.history[-1:] if name in row]
            known = [level for level in levels if level is not None]
            if known:
                level = float(np.mean(known))
                dashes = REFERENCE_DASHES.get(name, "dash")
                reference_name = figure_of(name).label
                figure.add_scatter(
                    x=[0, last],
                    y=[level, level],
                    mode="lines",
                    name=f"{label}: {reference_name}",
                    legendgroup=label,
                    showlegend=False,
                    line={"color": REFERENCE_GREY, "dash": dashes, "width": 1},
                    hovertemplate=f"{label}: {reference_name} %{{y:.4g}}<extra></extra>",
                )
    lay_out(figure, last, len(grouped))
    return figure


def escaped(text: str) -> str:
    """Escape text so that Plotly does not interpret it as markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _common_steps(columns: Sequence[dict[int, float | None]]) -> list[int]:
    shared = set.intersection(*({s for s, v in c.items() if v is not None} for c in columns))
    return sorted(shared)


def _add_band(
    figure: go.Figure, columns: Sequence[dict[int, float | None]], colour: str, label: str
) -> None:
    steps = _common_steps(columns)
    values = np.array([[column[step] for step in steps] for column in columns], dtype=float)
    mean, spread = values.mean(0), values.std(0, ddof=1)
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    figure.add_scatter(
        x=[*steps, *reversed(steps)],
        y=[*(mean + spread), *(mean - spread)[::-1]],
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.18)",
        line={"width": 0},
        mode="lines",
        legendgroup=label,
        showlegend=False,
        hoverinfo="skip",
        name=f"{label}: one standard deviation",
    )
