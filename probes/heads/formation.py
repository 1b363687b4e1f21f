"""When heads form: their scores at the checkpoints of a training run."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.heads.head_scores import score_heads
from probes.heads.head_table import HeadScores
from probes.reading.errors import ProbeError

Axis = Literal["step", "log"]


@dataclass(frozen=True, eq=False)
class Formation:
    """A score of every head along training, and when each head formed.

    Attributes:
        steps: the training steps, rising.
        layers: the model's number of each layer.
        score: the name of the score.
        threshold: the score at which a head counts as formed.
        scores: the score at every step, `[step, layer, head]`.
        first_crossing: the first step at which the score reaches the threshold, as defined by
            `HeadScores.reaches`; NaN if never.
        midpoint: the step at the middle of the fitted sigmoid; NaN if the fit failed.
        midpoint_low: lower end of the midpoint's confidence interval.
        midpoint_high: upper end of that interval.
        confidence: the confidence level of that interval.
    """

    steps: tuple[int, ...]
    layers: tuple[int, ...]
    score: str
    threshold: float
    scores: Float[Tensor, "step layer head"]
    first_crossing: Float[Tensor, "layer head"]
    midpoint: Float[Tensor, "layer head"]
    midpoint_low: Float[Tensor, "layer head"]
    midpoint_high: Float[Tensor, "layer head"]
    confidence: float

    def to_frame(self) -> Any:
        """A pandas frame with one row per head and step; a head's formation is in each of its rows.

        Columns: `layer`, `head`, `step`, the score's name, `first_crossing`, `midpoint`,
        `midpoint_low`, `midpoint_high`.
        """
        import pandas as pd  # type: ignore[import-untyped, unused-ignore]

        formed = ("first_crossing", "midpoint", "midpoint_low", "midpoint_high")
        return pd.DataFrame(
            {
                "layer": layer,
                "head": head,
                "step": step,
                self.score: self.scores[i, row, head].item(),
                **{name: getattr(self, name)[row, head].item() for name in formed},
            }
            for row, layer in enumerate(self.layers)
            for head in range(self.scores.shape[2])
            for i, step in enumerate(self.steps)
        )


def track_formation(
    checkpoints: Iterable[tuple[int, nn.Module | HeadScores]],
    *,
    score: str = "prefix_matching",
    threshold: float = 0.4,
    axis: Axis = "step",
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
    **scoring: Any,
) -> Formation:
    """The score of every head along a run, and the step at which each head formed.

    The first crossing is the first checkpoint at which the score reaches the threshold
    (`HeadScores.reaches`). To the scores of a head that crosses, the function fits
    `low + (high - low) / (1 + exp(-(x - m) / w))` by least squares, with `x` the step or
    `log(1 + step)`. The midpoint is m, its interval `m ± t · sqrt(cov[m, m])` with Student's t at
    the residual degrees of freedom, both converted to steps. If the rise is sharper than the
    spacing of the checkpoints, the interval is widened to the two on either side. The midpoint is
    NaN with fewer than five checkpoints, if the fit fails, or if m lies outside the steps. Models
    are scored one at a time, all on the same sequences.

    Args:
        checkpoints: pairs of a step and either the model at that step or its scores. Steps in
            any order, each once. A generator may reload the same model for every step.
        score: the name of a score in `HeadScores`.
        threshold: the score at which a head counts as formed.
        axis: x in the fit: "step", or "log" for `log(1 + step)`.
        confidence: the confidence level of the interval, between 0 and 1.
        generator: the source of randomness, reset to its first state before every checkpoint.
        **scoring: further arguments of `score_heads`.

    Returns:
        The scores at every step, and the formation steps of every head.

    Raises:
        ValueError: no checkpoints, a negative or repeated step, an unknown score or axis.
        ProbeError: checkpoints with different heads, or as `score_heads`.

    Source:
        Olsson et al. 2022, "In-context Learning and Induction Heads".

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> formation = track_formation([(0, model), (10, model)], n_sequences=4)
    >>> formation.scores.shape, formation.first_crossing
    (torch.Size([2, 1, 2]), tensor([[nan, nan]]))
    """
    if axis not in ("step", "log"):
        raise ValueError(f'axis is {axis!r}; allowed: "step", "log"')
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1")
    source = torch.Generator().manual_seed(0) if generator is None else generator
    state = source.get_state()
    tables: dict[int, HeadScores] = {}
    for step, checkpoint in checkpoints:
        if step in tables or step < 0:
            raise ValueError(f"step {step} is {'given twice' if step in tables else 'negative'}")
        if not isinstance(checkpoint, HeadScores):
            source.set_state(state)
            checkpoint = score_heads(checkpoint, generator=source, threshold=threshold, **scoring)
        tables[step] = checkpoint
    if not tables:
        raise ValueError("no checkpoints were given")
    steps = sorted(tables)
    values = _stacked([tables[step] for step in steps], score)
    crossing = torch.full(values.shape[1:], torch.nan)
    fits = torch.full((3, *values.shape[1:]), torch.nan)
    reached = torch.stack([tables[step].reaches(score, threshold).cpu() for step in steps])
    for row, head in reached.any(0).nonzero().tolist():
        crossing[row, head] = steps[int(reached[:, row, head].nonzero()[0])]
        fit = _sigmoid_midpoint(steps, values[:, row, head], axis, confidence)
        fits[:, row, head] = torch.tensor(fit)
    return Formation(
        steps=tuple(steps),
        layers=tables[steps[0]].layers,
        score=score,
        threshold=threshold,
        scores=values,
        first_crossing=crossing,
        midpoint=fits[0],
        midpoint_low=fits[1],
        midpoint_high=fits[2],
        confidence=confidence,
    )


def _stacked(tables: Sequence[HeadScores], score: str) -> Float[Tensor, "step layer head"]:
    shapes = {(table.layers, table.n_heads) for table in tables}
    if len(shapes) > 1:
        raise ProbeError(f"checkpoints differ in their (layers, heads): {sorted(shapes)}")
    return torch.stack([table.score(score).float().cpu() for table in tables])


def _sigmoid(x: Any, low: float, high: float, middle: float, width: float) -> Any:
    from scipy.special import expit

    return low + (high - low) * expit((x - middle) / width)


def _sigmoid_midpoint(
    steps: Sequence[int], curve: Float[Tensor, "step"], axis: Axis, confidence: float
) -> tuple[float, float, float]:
    """Midpoint of the fitted sigmoid, lower and upper end of its interval, in steps; else NaN."""
    from scipy.optimize import curve_fit
    from scipy.stats import t

    unknown = (math.nan, math.nan, math.nan)
    x = np.asarray(steps, dtype=float)
    if axis == "log":
        x = np.log1p(x)
    y = curve.double().numpy()
    if len(x) < 5 or not np.isfinite(y).all():
        return unknown
    # Scale x to [0, 1], so that the same bounds and start values suit every run.
    origin, scale = x[0], x[-1] - x[0]
    u = (x - origin) / scale
    start = u[np.argmax(y >= (y.min() + y.max()) / 2)]
    bounds = ([-0.5, -0.5, -0.5, 1e-4], [1.5, 1.5, 1.5, 1.0])
    try:
        with warnings.catch_warnings(action="ignore"):
            parameters, covariance = curve_fit(
                _sigmoid, u, y, p0=(y.min(), y.max(), start, 0.05), bounds=bounds, maxfev=5000
            )
    except (RuntimeError, ValueError):
        return unknown
    low, high, middle, width = parameters
    margin = t.ppf((1 + confidence) / 2, len(x) - 4) * math.sqrt(covariance[2, 2])
    if not (math.isfinite(margin) and high > low and 0 <= middle <= 1):
        return unknown
    lower, upper = middle - margin, middle + margin
    after = max(1, int(np.searchsorted(u, middle)))
    if width < (u[after] - u[after - 1]) / 4:
        lower, upper = min(lower, u[after - 1]), max(upper, u[after])
    ends = [origin + scale * end for end in (middle, lower, upper)]
    if axis == "log":
        ends = [math.expm1(min(end, 700.0)) for end in ends]
    return ends[0], ends[1], ends[2]
