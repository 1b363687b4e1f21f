"""Animate a picture over the recorded steps, with a slider and a play button."""

from collections.abc import Callable

import numpy as np
import plotly.graph_objects as go

from mechcausal.records.run_data import RunData, RunDataError


def film(
    run: RunData, draw: Callable[[RunData, int], go.Figure], *, most_frames: int = 40
) -> go.Figure:
    """A picture at every recorded step, with a slider.

    Args:
        run: the run to draw.
        draw: draws one step: `attention`, `gradient`, `gradient_scatter`, `examples`,
            `causal_graph`, `heads`.
        most_frames: maximum number of frames, spread evenly over the steps.

    Raises:
        RunDataError: the run has no matrices.
    """
    steps = thinned(run.steps, most_frames)
    if not steps:
        raise RunDataError(f"{run.folder or run.name}: no matrices were kept")
    figure = draw(run, steps[0])
    figure.frames = [go.Frame(data=draw(run, step).data, name=str(step)) for step in steps]
    _hold_axes(figure)
    # Plotly cannot interpolate markers that change their symbol.
    cut = {"transition": {"duration": 0}}
    at_once = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, **cut}
    moves = [
        {"method": "animate", "args": [[str(step)], at_once], "label": f"{step:,}"}
        for step in steps
    ]
    play = {"frame": {"duration": 250, "redraw": True}, "fromcurrent": True, **cut}
    figure.update_layout(
        sliders=[
            {"steps": moves, "currentvalue": {"prefix": "step "}, "y": -0.3, "pad": {"t": 30}}
        ],
        updatemenus=[
            {
                "type": "buttons",
                "direction": "left",
                "x": 0.0,
                "y": 1.22,
                "buttons": [
                    {"label": "play", "method": "animate", "args": [None, play]},
                    {"label": "pause", "method": "animate", "args": [[None], at_once]},
                ],
            }
        ],
    )
    figure.update_layout(height=(figure.layout.height or 450) + 100, margin={"t": 90, "b": 150})
    return figure


def _hold_axes(figure: go.Figure) -> None:
    """Set the y-ranges to include every frame: Plotly keeps those of the first frame."""
    for axis in figure.select_yaxes():
        name = axis.plotly_name.replace("axis", "")
        drawn = [
            np.asarray(trace.y, dtype=float)
            for frame in figure.frames
            for trace in frame.data
            if trace.type == "scatter" and (trace.yaxis or "y") == name
        ]
        values = np.concatenate([*drawn, []])
        values = values[np.isfinite(values)]
        if axis.range is None and values.size:
            margin = 0.06 * (np.ptp(values) or 1.0)
            axis.range = (values.min() - margin, values.max() + margin)


def thinned(steps: tuple[int, ...], most: int) -> tuple[int, ...]:
    """At most `most` of the steps, spread evenly, always with the first and the last.

    Example:
        >>> thinned((0, 1, 2, 3, 10), 3)
        (0, 2, 10)
    """
    if len(steps) <= most:
        return steps
    picked = np.linspace(0, len(steps) - 1, max(most, 2)).round().astype(int)
    return tuple(steps[i] for i in picked)
