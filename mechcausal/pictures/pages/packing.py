"""Pack a run's numbers compactly into a page.

Each matrix is quantised to 16 bits over its own range; causal matrices store only the lower
triangle.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from mechcausal.measures.figures import STEP, Value
from mechcausal.pictures.interactive.film import thinned
from mechcausal.pictures.interactive.style import by_head, head_choices, reduced
from mechcausal.pictures.static.style import HEAD_SCORES
from mechcausal.records.run_data import RunData

LEVELS = 65_534
"""Number of quantisation steps between a matrix's smallest and largest entry."""
DIGITS = 6
"""Significant digits of figures."""
MOST_BYTES = 12_000_000
"""Limit on the base64 text of all matrices at all steps."""
MISSING = 65_535
"""Code of NaN."""

PAGE_MATRICES = {
    "attention/layer0": True,
    "gradient/pattern": True,
    "attention/examples": False,
    **{f"heads/{kind}": False for kind in HEAD_SCORES},
}
"""The matrices that a page shows, and whether only their lower triangle matters."""


def pack_frames(run: RunData, *, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Pack the matrices that the page shows, at as many steps as fit.

    Returns:
        `steps`, `kept` (the number of steps of the run) and `matrices`, by name: `shape`,
        `triangle` (whether only the lower triangle is stored), `low` and `high` of every step, and
        `data`, the base64 of little-endian 16-bit codes of all steps.
    """
    if not run.steps:
        return {"steps": [], "kept": 0, "matrices": {}}
    names = page_matrices(run)
    first = _chosen(run.frame()[1], names)
    per_step = sum(_text_bytes(values) for values in first.values())
    steps = thinned(run.steps, max(2, most_bytes // max(per_step, 1)))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in first}
    ranges: dict[str, list[tuple[float, float]]] = {name: [] for name in first}
    for step in steps:
        matrices = _chosen(run.frames[step], names)
        for name, values in first.items():
            # A run resumed by another version may lack a matrix at some steps.
            matrix = matrices.get(name, np.full_like(values, np.nan))
            codes, low, high = quantise(_flat(matrix, names[name]))
            parts[name].append(codes)
            ranges[name].append((low, high))
    return {
        "steps": list(steps),
        "kept": len(run.steps),
        "matrices": {
            name: {
                "shape": list(values.shape),
                "triangle": names[name],
                "low": [low for low, _ in ranges[name]],
                "high": [high for _, high in ranges[name]],
                "data": base64.b64encode(np.concatenate(parts[name]).tobytes()).decode(),
            }
            for name, values in first.items()
        },
    }


def quantise(values: Shaped[np.ndarray, "n"]) -> tuple[np.ndarray, float, float]:
    """16-bit codes of the values, and the smallest and largest value."""
    finite = np.isfinite(values)
    low = float(values[finite].min(initial=np.inf)) if finite.any() else 0.0
    high = float(values[finite].max(initial=-np.inf)) if finite.any() else 0.0
    span = (high - low) or 1.0
    shares = np.where(finite, (values - low) / span, 0.0)
    codes = np.where(finite, np.round(shares * LEVELS), MISSING)
    return codes.astype("<u2"), low, high


def pack_history(history: Sequence[Mapping[str, Value]]) -> dict[str, Any]:
    """Figures by column with six significant digits; None where a row lacks a figure."""
    keys = sorted({key for row in history for key in row if key != STEP})
    return {
        "steps": [row[STEP] for row in history],
        "columns": {key: [rounded(row.get(key)) for row in history] for key in keys},
    }


def rounded(value: Value) -> Value:
    """Round to six significant digits; None if the value is not finite."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def page_matrices(run: RunData) -> dict[str, bool]:
    """The matrices that the run's page shows, and whether only their lower triangle matters.

    Of a run without a graph these are all that have two or three axes.
    """
    if run.has_graph:
        return PAGE_MATRICES
    kept = run.frame()[1] if run.steps else {}
    return {name: False for name, values in kept.items() if values.ndim in (2, 3)}


def _chosen(matrices: Mapping[str, np.ndarray], names: Mapping[str, bool]) -> dict[str, np.ndarray]:
    selected = {}
    for name, is_triangle in names.items():
        if name in matrices:
            values = matrices[name].astype(np.float64)
            if is_triangle or (values.ndim == 3 and name != "attention/examples"):
                values = by_head(values)
                heads = head_choices(len(values), name)
                values = np.stack([reduced(values, head) for head in heads])
            selected[name] = values
    return selected


def _flat(values: np.ndarray, triangle: bool) -> np.ndarray:
    if not triangle:
        return values.reshape(-1)
    rows, columns = np.tril_indices(values.shape[-1])
    return np.asarray(values[..., rows, columns]).reshape(-1)


def _text_bytes(values: np.ndarray) -> int:
    square = values.ndim == 3 and values.shape[-1] == values.shape[-2]
    return int(values.size * (1.4 if square else 2.7))
