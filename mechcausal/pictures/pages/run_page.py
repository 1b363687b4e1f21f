"""report.html: the page of one run, with a slider over its steps."""

import platform
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from mechcausal import __version__
from mechcausal.measures.figures import STEP, TASK_CURVES, figure_of, keys_in, own_curves
from mechcausal.pictures import interactive
from mechcausal.pictures.interactive.film import thinned
from mechcausal.pictures.interactive.graph import graph_panels
from mechcausal.pictures.interactive.lags import law_panels
from mechcausal.pictures.interactive.matrices import (
    attention_panels,
    example_panels,
    gradient_panels,
    head_panels,
    own_panels,
)
from mechcausal.pictures.interactive.scatter import scatter_panels
from mechcausal.pictures.interactive.style import Panels
from mechcausal.pictures.pages.captions import (
    curve_caption,
    frame_captions,
    matrix_panel,
    number,
    text_lead,
)
from mechcausal.pictures.pages.packing import DIGITS, LEVELS, pack_frames, pack_history
from mechcausal.pictures.pages.reproduce import reproduce_command
from mechcausal.pictures.pages.shell import (
    capital,
    figure_json,
    page,
    pairs_table,
    panel,
    player,
    text,
    tiles,
    top,
    write,
)
from mechcausal.pictures.static.style import HEAD_SCORES
from mechcausal.recipes import recipe_to_toml
from mechcausal.records.run_data import RunData
from mechcausal.support.nested import flat

REPORT_FILE = "report.html"
_MOST_STEPS = 200  # slider steps of a run without matrices
# Facts that the page shows elsewhere or that only concern the machine.
_HIDDEN_FACTS = ("recipe", "wandb_id", "pid", "host")
# The figures of the last row, and of the first row, on the page's tiles.
_LAST = (
    *("loss/eval", "loss/gap", "loss/construction_gap", "loss/second_copy", "loss/bigram"),
    *("graph/recovered", "graph/parent_attention"),
    *("induction/score", "induction/formation_step"),
)
_FIRST = ("gradient/edge_hits",)
_CONCLUSIONS = ("law/residual_correlation", "law/raw_correlation")

# The panels that follow the slider: title, the matrix they need, how to draw them.
_FILM: dict[str, tuple[str, str, Panels]] = {
    "attention": ("Layer-1 attention beside the true graph", "attention/layer0", attention_panels),
    "graph": ("Attention on the causal graph", "attention/layer0", graph_panels),
    "gradient": ("The gradient beside information theory", "gradient/pattern", gradient_panels),
    "scatter": ("Gradient against theory, pair by pair", "gradient/pattern", scatter_panels),
    "examples": ("The query's attention in examples", "attention/examples", example_panels),
    "lags": ("Gradient and information, lag by lag", "residual/by_lag", law_panels),
    "heads": ("Scores of every head", "heads/prefix_matching", head_panels),
}
_SHAPES = {"graph": ("graph", 1.1), "examples": ("wide", 2.0)}


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run folder.

    Args:
        folder: folder of a run, finished or not.
        out: the HTML file; report.html in the run's folder when absent.

    Returns:
        The path of the file.

    Raises:
        RunDataError: the folder is not a readable run.
        OSError: the page cannot be written.
    """
    path = Path(folder) / REPORT_FILE if out is None else Path(out)
    write_page(RunData.load(folder), path)
    return path


def write_page(run: RunData, path: Path) -> None:
    """Write the page of a loaded run.

    Raises:
        RunDataError: the run's graph or matrices cannot be read.
        OSError: the page cannot be written.
    """
    write(path, render(run))


def render(run: RunData) -> str:
    """The page as HTML.

    Raises:
        RunDataError: the run's graph or matrices cannot be read.
    """
    frames = pack_frames(run)
    steps = frames["steps"] or list(
        thinned(tuple(int(row[STEP] or 0) for row in run.history), _MOST_STEPS)
    )
    figures: list[go.Figure] = []
    captions: dict[str, list[str]] = {}
    film = _film_panels(run, frames, figures, captions)
    curves = _curve_panels(run, steps, figures, captions)
    data = {
        "run": run.name,
        "steps": steps,
        "n_steps": run.n_steps,
        "stages": run.stage_starts,
        "frames": frames,
        "history": pack_history(run.history),
        "figures": [figure_json(figure) for figure in figures],
        "captions": captions,
    }
    body = [
        top(f"{run.recipe.name}, seed {run.recipe.seed}", _lead(run)),
        tiles(_tiles(run)),
        player(len(steps)) if steps else "",
        f'<section class="panels" aria-label="The run, step by step">{film}</section>'
        if film
        else "",
        '<h2 class="part">Over training</h2>',
        f'<section class="panels" aria-label="Figures over training">{curves}</section>',
        '<h2 class="part">The run</h2>',
        _details(run),
        _footer(run, frames),
    ]
    return page(f"{run.recipe.name}, seed {run.recipe.seed}: mechcausal", "\n".join(body), data)


def _film_panels(
    run: RunData,
    frames: Mapping[str, Any],
    figures: list[go.Figure],
    captions: dict[str, list[str]],
) -> str:
    """The panels that follow the slider; panels whose matrices the run lacks are skipped."""
    available = set(frames["matrices"])
    if run.examples is None:
        available -= {"attention/examples"}
    per_step = [frame_captions(run, step) for step in frames["steps"]]
    html = []
    for name, (title, needs, draw) in _film(run, available).items():
        drawn = draw(run, None) if needs in available else []
        if not drawn:
            continue
        captions[name] = [step_captions.get(name, "") for step_captions in per_step]
        numbers = range(len(figures), len(figures) + len(drawn))
        for figure in drawn:
            if len(drawn) == 1:  # the card's heading is the title
                figure.update_layout(title=None, margin={"t": 10})
        figures += drawn
        shape, cells = _SHAPES.get(name, ("square", float(len(drawn))))
        html.append(panel(name, title, list(numbers), captions[name][-1], shape=shape, cells=cells))
    return "".join(html)


def _film(run: RunData, available: Collection[str]) -> dict[str, tuple[str, str, Panels]]:
    """The panels of a run; without a graph, one for every matrix that no other panel shows."""
    if run.has_graph:
        return _FILM
    of_lags = {"gradient/direct_path", "gradient/by_lag", "residual/by_lag"}
    rest = set(available) - (of_lags if of_lags <= set(available) else set())
    own = sorted(name for name in rest if not name.startswith("heads/"))
    panels: dict[str, tuple[str, str, Panels]] = {
        matrix_panel(name): (name, name, partial(own_panels, name=name)) for name in own
    }
    return {"lags": _FILM["lags"], "heads": _FILM["heads"], **panels}


def _curve_panels(
    run: RunData, steps: list[int], figures: list[go.Figure], captions: dict[str, list[str]]
) -> str:
    names = ["loss", "gap", "recovery", "correlations", "law", "residual_map", "formation"]
    names += ["strategies", "weights", "composition"]
    drawings: dict[str, Callable[[RunData], go.Figure]] = {
        name: getattr(interactive, name) for name in names
    }
    if run.kind == "repeated_tokens":
        drawings |= {kind: partial(interactive.head_scores, kind=kind) for kind in HEAD_SCORES}
    drawings |= {group: partial(interactive.of_task, group=group) for group in TASK_CURVES}
    drawings |= {
        f"own {section}": partial(interactive.own, section=section)
        for section in own_curves(run.history)
    }
    html = []
    for name, draw in drawings.items():
        figure = draw(run)
        if not figure.data:
            continue
        labels: dict[str, str] = {}
        for trace in figure.data:
            labels |= trace.meta.get("keys") or {trace.meta["key"]: trace.name}
        captions[name] = [curve_caption(run, labels, step) for step in steps]
        title = figure.layout.title.text
        figure.update_layout(title=None, margin={"t": 26})
        if steps:
            figure.add_shape(
                name="cursor",
                type="line",
                x0=steps[-1],
                x1=steps[-1],
                y0=0,
                y1=1,
                yref="paper",
                line={"width": 2, "color": "#d55e00"},
                opacity=0.75,
            )
        caption = captions[name][-1] if steps else ""
        html.append(
            panel(
                name,
                capital(title),
                [len(figures)],
                caption,
                shape="curve",
                cells=1.25,
                step=steps[-1] if steps else None,
            )
        )
        figures.append(figure)
    return "".join(html)


def _lead(run: RunData) -> str:
    recipe = run.recipe
    if run.kind == "repeated_tokens":
        about = f"repeated random tokens, {recipe.task.vocab_size} of them"
    elif run.kind == "text":
        about = text_lead(recipe.task)
    elif not run.has_graph:
        about = recipe.experiment or run.kind.replace("_", " ")
    else:
        length = run.graph.sequence_length
        about = f"{recipe.graph.preset.replace('_', ' ')} graph, {length} positions, "
        about += f"{recipe.task.vocab_size} tokens"
    done = run.summary.get("train/steps", run.history[-1][STEP] if run.history else 0)
    return (
        f"{about} · {recipe.model.kind} transformer · "
        f"{run.state}: {number(done)} of {number(run.n_steps)} steps"
    )


def _tiles(run: RunData) -> dict[str, str]:
    values_by_label = {}
    for name, rows in (("", run.history[-1:]), ("first step: ", run.history[:1])):
        for key in keys_in(rows, _FIRST if name else _LAST):
            item, value = figure_of(key), rows[0][key]
            if value is not None:
                shown = f"{value:.1%}" if item.unit == "share" else number(value)
                values_by_label[name + item.title] = shown
    for key in _CONCLUSIONS:
        if key in run.summary:
            values_by_label[figure_of(key).label] = number(run.summary[key])
    return values_by_label


def _details(run: RunData) -> str:
    recipe = run.recipe
    about: dict[str, object] = {"run": run.name, "state": run.state, "rows": len(run.history)}
    about |= {"W&B project": recipe.wandb.project}
    if recipe.wandb.group:
        about["W&B group"] = recipe.wandb.group
    if recipe.wandb.tags:
        about["W&B tags"] = ", ".join(recipe.wandb.tags)
    ids = _wandb_ids(run.folder)
    if ids:
        about["W&B run"] = ", ".join(ids)
    about |= _facts({key: value for key, value in run.facts.items() if key not in _HIDDEN_FACTS})
    versions = {"Python": platform.python_version()}
    versions |= {
        name: _version(name) for name in ("mechcausal", "torch", "transformer-lens", "plotly")
    }
    command = reproduce_command(recipe)
    note = "" if "recipe.toml" not in command else " (the recipe below, saved under that name)"
    return (
        '<section class="details" aria-label="The run">'
        f'<div class="card"><h2>About</h2>{pairs_table(about)}</div>'
        f'<div class="card"><h2>Drawn with</h2>{pairs_table(versions)}</div>'
        f'<div class="card full"><h2>Run it again{text(note)}</h2><pre><code>{text(command)}'
        "</code></pre></div>"
        '<div class="card full"><h2>Recipe</h2><pre tabindex="0"><code>'
        f"{text(recipe_to_toml(recipe))}</code></pre></div></section>"
    )


def _wandb_ids(folder: Path | None) -> list[str]:
    """The ids of the W&B runs in the run's folder."""
    paths = [] if folder is None else sorted((folder / "wandb").glob("*run-*-*"))
    matches = [re.fullmatch(r"(?:offline-)?run-\d{8}_\d{6}-(.+)", path.name) for path in paths]
    return list(dict.fromkeys(match[1] for match in matches if match))


def _facts(facts: Mapping[str, Any]) -> dict[str, object]:
    return {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in flat(facts, ": ").items()
        if value is not None
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return __version__ if name == "mechcausal" else "not installed"


def _footer(run: RunData, frames: Mapping[str, Any]) -> str:
    notes = [*run.notes, *map(str, run.summary.get("warnings", ()))]
    if frames["kept"] > len(frames["steps"]):
        notes.insert(
            0,
            f"the run has matrices of {frames['kept']} steps; to stay small, this page shows "
            f"{len(frames['steps'])} of them, spread evenly",
        )
    elif run.has_graph and not frames["steps"]:
        notes.insert(0, "the run has no matrices, so only curves are shown")
    listed = "".join(f"<li>{text(note)}</li>" for note in notes)
    return (
        f"<footer><p>Matrices are rounded to 1/{LEVELS:,} of each one's range, figures to "
        f"{DIGITS} digits; metrics.jsonl and matrices.safetensors beside this page hold them in "
        "full. Keys: arrows move the step, space plays.</p>"
        f"{f'<ul>{listed}</ul>' if notes else ''}</footer>"
    )
