"""Captions that describe each picture in words and numbers, also for screen readers."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from mechcausal.measures.figures import Value, figure_of, keys_in
from mechcausal.pictures.interactive.graph import WRONG, rows_of
from mechcausal.pictures.interactive.style import by_head
from mechcausal.pictures.static.style import HEAD_SCORES
from mechcausal.recipes import TaskSection
from mechcausal.records.run_data import Matrices, RunData

_LAWS = ("residual", "raw", "direct_path")
_THEORIES = ("theory", "chi2", "shannon")


def frame_captions(run: RunData, step: int) -> dict[str, str]:
    """One or two sentences about every picture of a step, by the picture's name."""
    matrices = run.frames[step]
    row = run.row(step)
    captions: dict[str, str] = {}
    if not run.has_graph:
        captions |= {
            matrix_panel(
                name
            ): f"From {number(float(values.min()))} to {number(float(values.max()))}."
            for name, values in matrices.items()
            if values.ndim in (2, 3) and not name.startswith("heads/")
        }
    elif "attention/layer0" in matrices:
        captions["attention"] = _attention(run, matrices)
        captions["graph"] = _graph(run, matrices)
    if run.has_graph and "gradient/pattern" in matrices:
        captions["gradient"] = _gradient(run, matrices)
        captions["scatter"] = _scatter(row)
    if run.has_graph and "attention/examples" in matrices and run.examples is not None:
        captions["examples"] = _examples(run, matrices)
    if "residual/by_lag" in matrices:
        captions["lags"] = _lags(row, matrices)
    if "heads/prefix_matching" in matrices:
        captions["heads"] = _heads(matrices)
    return captions


def matrix_panel(name: str) -> str:
    """The page's name of the panel of a matrix that only an experiment of the user's own has."""
    return f"own-{name.replace('/', '-')}"


def text_lead(task: TaskSection) -> str:
    """What a run on text reads; of a file the name without its folders."""
    name = task.text or "topics"
    titles = {"topics": "Python's help topics", "stdlib": "the standard library's source"}
    halves = "two halves of " if task.interleaved else ""
    title = titles.get(name, Path(name).name)
    return f"{halves}{title}, {task.vocab_size} characters, windows of {task.context}"


def curve_caption(run: RunData, labels: dict[str, str], step: int) -> str:
    """The values of curves at a step."""
    row = run.row(step)
    parts = [f"{label} {number(row[key])}" for key, label in labels.items() if key in row]
    return f"At step {step:,}: {', '.join(parts)}." if parts else f"No figures of step {step:,}."


def number(value: Value) -> str:
    """Format a number for a caption.

    Example:
        >>> number(0.123456), number(None), number(1.5e-7), number(1), number(0.0)
        ('0.123', 'not defined', '1.5e-07', '1', '0')
    """
    if value is None or value != value:
        return "not defined"
    if isinstance(value, int) or value == int(value):
        return f"{int(value):,}"
    return f"{value:.3f}" if abs(value) >= 1e-3 else f"{value:.2g}"


def _hits(
    run: RunData, matrix: Float[np.ndarray, "query key"], n_rows: int | None = None
) -> tuple[int, int]:
    """Among the first `n_rows` rows: those whose largest entry is a parent, those with parents."""
    rows = np.flatnonzero(run.truth[:n_rows].any(1)).tolist()
    hits = sum(bool(run.truth[i, int(np.argmax(matrix[i, : i + 1]))]) for i in rows)
    return hits, len(rows)


def _attention(run: RunData, matrices: Matrices) -> str:
    values = by_head(matrices["attention/layer0"])
    largest = values.max(0)
    truth = run.truth.astype(bool)
    if not truth.any():
        return "The graph has no edges for layer 1 to find."
    heads = f" of {len(values)} heads" if len(values) > 1 else ""
    hits, rows = _hits(run, largest)
    return (
        f"The largest attention{heads} lies on a parent in {hits} of {rows} rows; "
        f"true edges get {number(float(largest[truth].mean()))} on average, "
        f"the weakest {number(float(largest[truth].min()))}."
    )


def _graph(run: RunData, matrices: Matrices) -> str:
    largest = by_head(matrices["attention/layer0"]).max(0)
    n_edges = int(run.truth.sum())
    strong = int((largest[run.truth.astype(bool)] >= 0.5).sum())
    wrong = sum(
        int((largest[row, :n_keys][run.truth[row, :n_keys] == 0] >= WRONG).sum())
        for row, _, n_keys in rows_of(run)
    )
    return (
        f"{strong} of {n_edges} true edges carry at least half of their row's attention; "
        f"{wrong} other pairs carry {WRONG:g} or more. Edges run from lower to higher numbers; "
        "circles attend most to a parent, diamonds elsewhere, squares have none."
    )


def _gradient(run: RunData, matrices: Matrices) -> str:
    total = by_head(matrices["gradient/pattern"]).sum(0)
    hits, rows = _hits(run, total, run.n_graph_rows)
    return (
        f"The gradient's largest entry is a parent in {hits} of {rows} rows; "
        f"the largest of all is {number(float(np.abs(total).max()))}. "
        "Each picture has its own scale; squares are the true edges."
    )


def _scatter(row: Mapping[str, Value]) -> str:
    keys = keys_in([row], [f"gradient/pattern_{name}_correlation" for name in _THEORIES])
    parts = [f"{figure_of(key).label} {number(row[key])}" for key in keys]
    return f"Correlation: {', '.join(parts) or 'not recorded'}. Diamonds are true edges."


def _range(values: np.ndarray) -> str:
    return f"From {number(float(values.min()))} to {number(float(values.max()))}."


def _examples(run: RunData, matrices: Matrices) -> str:
    values = matrices["attention/examples"]
    targets = run.example_targets
    if targets is None:
        return ""
    shares = [
        f"{number(float(values[i, :, mask].sum(0).max()))} ({n} position{'' if n == 1 else 's'})"
        for i, (mask, n) in enumerate(zip(targets, targets.sum(1).tolist(), strict=True))
    ]
    return (
        "Attention on positions whose parent holds the query's token (squares), "
        f"by example: {', '.join(shares)}."
    )


def _lags(row: Mapping[str, Value], matrices: Matrices) -> str:
    values = matrices["residual/by_lag"][0]
    lag = int(np.nanargmax(values)) + 1
    keys = keys_in([row], [f"gradient/{name}_correlation" for name in _LAWS])
    parts = [f"{figure_of(key).label} {number(row[key])}" for key in keys]
    return (
        f"The model has used least of lag {lag}: {number(float(values[lag - 1]))} is left. "
        f"Correlation over lags: {', '.join(parts) or 'not recorded'}."
    )


def _heads(matrices: Matrices) -> str:
    parts = []
    for kind in HEAD_SCORES:
        values = matrices[f"heads/{kind}"]
        layer, head = np.unravel_index(int(values.argmax()), values.shape)
        best = number(float(values.max()))
        parts.append(f"{kind.replace('_', ' ')} {best} in L{layer}H{head}")
    return f"Best heads: {', '.join(parts)}."
