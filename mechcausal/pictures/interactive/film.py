"""A picture of one step made into a film: Plotly's frames, slider and play button."""

from collections.abc import Callable

import numpy as np
import plotly.graph_objects as go

from mechcausal.records.run_data import RunData, RunDataError


def film(
    run: RunData, draw: Callable[[RunData, int], go.Figure], *, most_frames: int = 40
) -> go.Figure:
    """The picture at every step kept, behind a slider.

    Args:
        run: a run.
        draw: what is drawn: `attention`, `gradient`, `gradient_scatter`, `examples`,
            `causal_graph`, `heads`.
        most_frames: of more steps as many are taken, spread evenly; the first and last are kept.

    Raises:
        RunDataError: no matrices were kept.
    """
    steps = thinned(run.steps, most_frames)
    if not steps:
        raise RunDataError(f"{run.folder or run.name}: no matrices were kept")
    figure = draw(run, steps[0])
    figure.frames = [go.Frame(data=draw(run, step).data, name=str(step)) for step in steps]
    _hold_axes(figure)
    cut = {"transition": {"duration": 0}}  # markers that change their shape cannot be blended
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
    """Vertical axes that hold every frame's points: Plotly would keep those of the first one."""
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
            room = 0.06 * (np.ptp(values) or 1.0)
            axis.range = (values.min() - room, values.max() + room)


def thinned(steps: tuple[int, ...], most: int) -> tuple[int, ...]:
    """At most so many of the steps, spread evenly; the first and the last are among them.

    Example:
        >>> thinned((0, 1, 2, 3, 10), 3)
        (0, 2, 10)
    """
    if len(steps) <= most:
        return steps
    picked = np.linspace(0, len(steps) - 1, max(most, 2)).round().astype(int)
    return tuple(steps[i] for i in picked)
