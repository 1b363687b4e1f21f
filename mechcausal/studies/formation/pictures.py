"""The picture, the page and the W&B run of a formation study."""

import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from mechcausal.measures.figures import HEAD_SCORES, STEP
from mechcausal.pictures.pages.shell import figure_json, page, pairs_table, panel, text, top, write
from mechcausal.pictures.static.style import OTHER_COLOUR, REFERENCE_GREY, colours, new_figure
from mechcausal.recipes import WandbMode
from mechcausal.studies.formation.result import FormationResult, HeadFormation
from mechcausal.studies.study_runs import start_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_CURVES = 12
"""Heads with a colour and a name of their own; the others are grey."""
_FEWEST_TICKS = 3
_LOSSES = {
    "loss_first_copy": "first copy",
    "loss_second_copy": "second copy",
    "in_context_gain": "gain from the context",
    "loss": "evaluation loss",
}


def draw_formation(result: FormationResult, path: Path) -> None:
    """Draw the scores of every head and the losses over steps, as a PNG file.

    Raises:
        OSError: the file cannot be written.
    """
    figure, axes = new_figure(1, len(HEAD_SCORES) + 1)
    rows = result.revision_rows()
    for axis, score in zip(axes, HEAD_SCORES, strict=False):
        formation = result.formations[score]
        formed = _formed(result, score)
        named = {(head.layer, head.head) for head in formed}
        for row, layer in enumerate(formation.layers):
            for head in range(formation.scores.shape[2]):
                if (layer, head) not in named:
                    curve = formation.scores[:, row, head].numpy()
                    axis.plot(result.steps, curve, color=OTHER_COLOUR, lw=0.6, alpha=0.5)
        for entry, colour in zip(formed, colours(len(formed)), strict=True):
            label = f"{entry.layer}.{entry.head}"
            axis.plot(result.steps, _curve(result, entry), color=colour, lw=1.6, label=label)
            axis.axvline(entry.first_crossing, color=colour, lw=0.7, ls=":")
        axis.axhline(result.threshold, color=REFERENCE_GREY, lw=0.8, ls="--")
        axis.set(title=score.replace("_", " "), ylim=(0, 1), ylabel="attention")
        if formed:
            axis.legend(frameon=False, fontsize=8, title="formed", title_fontsize=8)
    for (key, label), colour in zip(_LOSSES.items(), colours(len(_LOSSES)), strict=True):
        values = [np.nan if row[key] is None else row[key] for row in rows]
        if np.isfinite(values).any():
            axes[-1].plot(result.steps, values, color=colour, lw=1.6, label=label)
    axes[-1].set(title="losses (nats)")
    if axes[-1].lines:
        axes[-1].legend(frameon=False, fontsize=8)
    for axis in axes:
        _scale(axis, result)
    figure.suptitle(f"{result.model}: heads over {len(rows)} checkpoints", fontsize=12)
    figure.savefig(path, dpi=110)


def _scale(axis: "Axes", result: FormationResult) -> None:
    axis.set_xlabel(_step_title(result))
    axis.grid(alpha=0.25)
    if result.axis == "log":
        first, last = result.steps[0], result.steps[-1]
        ticks, ends = log_ticks(first, last), np.log1p([first, last])
        margin = 0.05 * (ends[1] - ends[0]) or 0.1  # no step below -1 has a logarithm
        axis.set_xlim(*np.expm1([ends[0] - margin, ends[1] + margin]))
        axis.set_xscale("function", functions=(np.log1p, np.expm1))
        axis.set_xticks(ticks, [f"{step:,}" for step in ticks])


def _step_title(result: FormationResult) -> str:
    return "training step, log(1 + step)" if result.axis == "log" else "training step"


def log_ticks(first: int, last: int) -> list[int]:
    """Steps to name on an axis over log(1 + step): 0 and powers of ten, or 1, 2, 5 times these.

    >>> log_ticks(0, 143000)
    [0, 1, 10, 100, 1000, 10000, 100000]
    >>> log_ticks(200, 1500)
    [200, 500, 1000]
    """
    powers = [10**digits for digits in range(len(str(last)))]
    ticks = [step for step in (0, *powers) if first <= step <= last]
    if len(ticks) >= _FEWEST_TICKS:
        return ticks
    finer = [factor * power for power in powers for factor in (1, 2, 5)]
    ticks = [step for step in (0, *finer) if first <= step <= last]
    return ticks if len(ticks) >= 2 else sorted({first, last})


def _formed(result: FormationResult, score: str) -> list[HeadFormation]:
    """The heads with a curve of their own: the highest at the end, in the order of formation."""
    heads = [head for head in result.heads() if head.score == score]
    best = sorted(heads, key=lambda head: -head.last)[:_MOST_CURVES]
    return [head for head in heads if head in best]


def _curve(result: FormationResult, head: HeadFormation) -> list[float]:
    formation = result.formations[head.score]
    row = formation.layers.index(head.layer)
    values: list[float] = formation.scores[:, row, head.head].tolist()
    return values


def write_formation_page(result: FormationResult, path: Path) -> None:
    """Write the study as one HTML file that fetches nothing.

    Raises:
        OSError: the file cannot be written.
    """
    figures = [_score_figure(result, score) for score in HEAD_SCORES]
    captions = [
        _caption([head for head in result.heads() if head.score == score], result.threshold)
        for score in HEAD_SCORES
    ]
    titles = [score.replace("_", " ").capitalize() for score in HEAD_SCORES]
    losses = _loss_figure(result)
    if losses.data:
        figures.append(losses)
        titles.append("Loss on random tokens repeated twice")
        captions.append("Nats a token; the gain is the first copy's loss minus the second's.")
    panels = "".join(
        panel(f"formation-{at}", title, [at], caption, shape="curve", cells=1.25)
        for at, (title, caption) in enumerate(zip(titles, captions, strict=True))
    )
    lead = f"{len(result.records)} checkpoints, steps {result.steps[0]:,} to {result.steps[-1]:,}"
    settings = {"model": result.model, **result.settings, "axis of the fit": result.axis}
    body = [
        top(f"{result.model}: when its heads formed", lead),
        f'<section class="panels" aria-label="Curves">{panels}</section>',
        '<h2 class="part">Formed heads</h2>',
        _table([_head_row(head) for head in result.heads()]),
        '<h2 class="part">Checkpoints</h2>',
        _table(result.revision_rows()),
        '<h2 class="part">Left out</h2>',
        _table([_left_out_row(result, at) for at in range(len(result.left_out))]),
        '<h2 class="part">Settings</h2>',
        f'<section class="card">{pairs_table(settings)}</section>',
        "<footer><p>A head forms between the last step at which its score is below the threshold "
        "and its first crossing. The interval is that of the midpoint of a fitted sigmoid. Scores "
        "describe attention on random tokens; they do not show that a model needs the head."
        "</p></footer>",
    ]
    data = {"figures": [figure_json(figure) for figure in figures], "captions": {}}
    write(path, page(f"{result.model}: formation: mechcausal", "\n".join(body), data))


def _caption(formed: Sequence[HeadFormation], threshold: float) -> str:
    if not formed:
        return f"No head reaches {threshold:g}."
    heads = "1 head reaches" if len(formed) == 1 else f"{len(formed)} heads reach"
    return f"{heads} {threshold:g}. Dotted: the first crossing of each."


def _score_figure(result: FormationResult, score: str) -> go.Figure:
    figure = go.Figure()
    for head in _formed(result, score):
        name = f"{head.layer}.{head.head}"
        _add_curve(figure, result, _curve(result, head), name)
        (crossing,) = _positions(result, [head.first_crossing])
        figure.add_vline(x=crossing, line_width=1, line_dash="dot")
    figure.add_hline(y=result.threshold, line_width=1, line_dash="dash")
    figure.update_yaxes(title="attention", range=[0, 1])
    return _laid_out(figure, result)


def _loss_figure(result: FormationResult) -> go.Figure:
    figure = go.Figure()
    rows = result.revision_rows()
    for key, label in _LOSSES.items():
        if any(row[key] is not None for row in rows):
            values = [row[key] for row in rows]
            _add_curve(figure, result, values, label)
    figure.update_yaxes(title="nats")
    return _laid_out(figure, result)


def _positions(result: FormationResult, steps: Sequence[int]) -> list[float]:
    """Where steps lie on the page's axis: Plotly's logarithmic axis has no step 0."""
    return [math.log1p(step) if result.axis == "log" else float(step) for step in steps]


def _add_curve(
    figure: go.Figure, result: FormationResult, values: Sequence[float | None], name: str
) -> None:
    figure.add_scatter(
        x=_positions(result, result.steps),
        y=values,
        name=name,
        mode="lines+markers",
        customdata=result.steps,
        hovertemplate="step %{customdata:,}: %{y:.3f}",
    )


def _laid_out(figure: go.Figure, result: FormationResult) -> go.Figure:
    figure.update_xaxes(title=_step_title(result))
    if result.axis == "log":
        ticks = log_ticks(result.steps[0], result.steps[-1])
        labels = [f"{step:,}" for step in ticks]
        figure.update_xaxes(tickvals=_positions(result, ticks), ticktext=labels)
    figure.update_layout(margin={"t": 16}, showlegend=True)
    return figure


def _head_row(head: HeadFormation) -> dict[str, Any]:
    interval = "–"
    if head.midpoint is not None:
        interval = f"{head.midpoint_low:,.0f} to {head.midpoint_high:,.0f}"
    return {
        "head": f"{head.layer}.{head.head}",
        "score": head.score.replace("_", " "),
        "first at": head.first_crossing,
        "not yet at": head.not_before,
        "midpoint": head.midpoint,
        "interval": interval,
        "at the end": head.last,
    }


def _left_out_row(result: FormationResult, at: int) -> dict[str, Any]:
    revision = result.left_out[at]
    return {"revision": revision.name, "step": revision.step, "reason": revision.problem}


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return '<section class="card"><p>None.</p></section>'
    head = "".join(f'<th scope="col">{text(key.replace("_", " "))}</th>' for key in rows[0])
    cells = "".join(
        f"<tr>{''.join(f'<td>{text(_cell(value))}</td>' for value in row.values())}</tr>"
        for row in rows
    )
    return (
        f'<section class="card"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{cells}</tbody></table></div></section>"
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def log_formation(
    result: FormationResult, folder: Path, mode: WandbMode, warnings: list[str]
) -> str | None:
    """Log a row for every checkpoint, the formed heads and the picture as a W&B run.

    Returns:
        The run's page or folder; None if W&B could not start, and `warnings` then say why.
    """
    import wandb

    run = start_run(
        mode,
        folder,
        warnings,
        kept=f"the result is in {folder}",
        kind="formation",
        name=f"formation-{Path(result.model).name}-{secrets.token_hex(2)}",
        config={"model": result.model, "kind": result.kind, **result.settings},
    )
    if run.folder is None:
        return None
    rows = result.revision_rows()
    for at, row in enumerate(rows):
        figures: dict[str, Any] = {
            STEP: row["step"],
            "loss/eval": row["loss"],
            "loss/first_copy": row["loss_first_copy"],
            "loss/second_copy": row["loss_second_copy"],
            "loss/in_context_gain": row["in_context_gain"],
        }
        for score, formation in result.formations.items():
            for layer_at, layer in enumerate(formation.layers):
                for head, value in enumerate(formation.scores[at, layer_at].tolist()):
                    figures[f"heads/L{layer}H{head}/{score}"] = value
        pictures: dict[str, np.ndarray | Path] = {}
        if at == len(rows) - 1:
            figures["formation"] = wandb.Table(dataframe=result.heads_frame())
            figures["checkpoints"] = wandb.Table(dataframe=_frame(rows))
            picture = run.folder / "formation.png"
            try:
                draw_formation(result, picture)
                pictures = {"formation/curves": picture}
            except OSError as error:
                warnings.append(f"{picture}: cannot be written: {error.strerror or error}")
        run.log(row["step"], figures, pictures)
    run.finish({"formed": len(result.heads()), "checkpoints": len(rows)}, exit_code=0)
    return run.location


def _frame(rows: list[dict[str, Any]]) -> Any:
    import pandas as pd  # type: ignore[import-untyped, unused-ignore]

    return pd.DataFrame(rows)
