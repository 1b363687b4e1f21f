"""A page that compares runs: curves with a band over seeds, summaries, recipe differences."""

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import plotly.graph_objects as go

from mechcausal.measures.figures import STEP, Value, figure_of, keys_in
from mechcausal.pictures import interactive
from mechcausal.pictures.interactive.comparison import escaped, groups
from mechcausal.pictures.pages.captions import number
from mechcausal.pictures.pages.packing import pack_history
from mechcausal.pictures.pages.run_page import REPORT_FILE
from mechcausal.pictures.pages.shell import capital, figure_json, page, panel, text, top, write
from mechcausal.records.run_data import RunData

_CURVES: dict[str, tuple[str, ...]] = {
    "loss/eval": ("loss/bayes", "loss/construction", "loss/unigram", "loss/bigram"),
    "loss/gap": (),
    "loss/construction_gap": (),
    "loss/second_copy": ("loss/chance",),
    "graph/recovered": (),
    "graph/parent_attention": (),
    "gradient/pattern_theory_correlation": (),
    "gradient/pattern_chi2_correlation": (),
    "gradient/residual_correlation": (),
    "gradient/raw_correlation": (),
    "induction/score": (),
    "strategy/kl_bigram": (),
}
"""The figures drawn over training, each with constants to compare with."""
_COLUMNS = (
    *("loss/eval", "loss/gap", "loss/construction_gap", "loss/second_copy"),
    *("graph/recovered", "graph/parent_attention", "graph/f1"),
    *("induction/score", "induction/formation_step"),
)


def write_comparison(
    runs: Sequence[RunData],
    out: Path,
    *,
    notes: Sequence[str] = (),
    pictures: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Write the page that compares several runs.

    Args:
        runs: at least one.
        out: the HTML file.
        notes: remarks for the footer, as plain text.
        pictures: contents of PNG files to show first, by caption.

    Raises:
        OSError: the page cannot be written.
    """
    write(out, render(runs, out.parent, notes=notes, pictures=pictures))
    return out


def render(
    runs: Sequence[RunData],
    beside: Path,
    *,
    notes: Sequence[str] = (),
    pictures: Mapping[str, bytes] = MappingProxyType({}),
) -> str:
    """The page as HTML; links to the runs' pages are relative to the folder `beside`."""
    grouped = groups(runs)
    differences = differing_keys(grouped)
    labels = group_labels(grouped, differences)
    figures: list[go.Figure] = []
    html: list[str] = []
    for key, reference in _CURVES.items():
        title = capital(figure_of(key).title)
        escaped_labels = [escaped(label) for label in labels]
        figure = interactive.overlay(
            runs, key, title=title, reference=reference, labels=escaped_labels
        )
        if not figure.data:
            continue
        figure.update_layout(title=None, margin={"t": 16})
        caption = _caption(grouped, labels, key)
        html.append(panel(key, title, [len(figures)], caption, shape="curve", cells=1.25))
        figures.append(figure)
    data = {
        "figures": [figure_json(figure) for figure in figures],
        "captions": {},
        "runs": [{"name": run.name, "history": pack_history(run.history)} for run in runs],
    }
    seeds = f"{len(grouped)} recipe{'s' if len(grouped) > 1 else ''}"
    title = f"{len(runs)} runs compared"
    listed = "".join(f"<li>{text(note)}</li>" for note in notes)
    body = [
        top(title, f"{seeds}; runs that differ only in their seed are one curve with a band"),
        _pictures(pictures),
        f'<section class="panels" aria-label="Curves">{"".join(html)}</section>',
        '<h2 class="part">Summaries</h2>',
        _summaries(grouped, labels, beside),
        '<h2 class="part">What differs between the recipes</h2>',
        _differences(grouped, labels, differences),
        "<footer><p>Bands are one standard deviation over runs to each side of their mean, at the "
        "steps that all of them have; single runs are thin. Grey dashed lines are the Bayes loss, "
        "grey dash-dotted lines the hand-built model of the same kind."
        f"</p>{f'<ul>{listed}</ul>' if notes else ''}</footer>",
    ]
    return page(f"{title}: mechcausal", "\n".join(body), data, scripts=("table.js",))


def _pictures(pictures: Mapping[str, bytes]) -> str:
    cards = "".join(
        f'<figure class="card"><img alt="{text(name)}" style="max-width: 100%" '
        f'src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        f"<figcaption>{text(name)}</figcaption></figure>"
        for name, content in pictures.items()
    )
    return f'<section aria-label="Pictures of the sweep">{cards}</section>' if cards else ""


def differing_keys(grouped: Sequence[Sequence[RunData]]) -> dict[str, list[Any]]:
    """Keys in which the groups' recipes differ, with each group's value (None if absent)."""
    recipes = [members[0].comparable() for members in grouped]
    for values in recipes:
        values.pop("seed", None)
    keys = sorted({key for values in recipes for key in values})
    by_key = {key: [values.get(key) for values in recipes] for key in keys}
    return {key: values for key, values in by_key.items() if any(v != values[0] for v in values)}


def group_labels(
    grouped: Sequence[Sequence[RunData]], differences: dict[str, list[Any]]
) -> list[str]:
    """A name for each group: the recipe's, plus the keys that differ if names are equal."""
    names = [members[0].recipe.name for members in grouped]
    labels = []
    for i, name in enumerate(names):
        twins = [j for j, other in enumerate(names) if other == name]
        parts = [
            f"{key.rpartition('.')[2]} {_value_text(values[i])}"
            for key, values in differences.items()
            if any(values[j] != values[i] for j in twins)
        ]
        more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
        labels.append(f"{name}: {', '.join(parts[:3])}{more}" if parts else name)
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[:i].count(label) + 1})"
        for i, label in enumerate(labels)
    ]


def _caption(grouped: Sequence[Sequence[RunData]], labels: Sequence[str], key: str) -> str:
    parts = []
    for members, label in zip(grouped, labels, strict=True):
        last = [run.history[-1].get(key) for run in members if run.history]
        known = [value for value in last if value is not None]
        if known:
            mean = sum(known) / len(known)
            spread = f" ({number(min(known))} to {number(max(known))})" if len(known) > 1 else ""
            parts.append(f"{label} {number(mean)}{spread}")
    listed = parts[:8] + ([f"and {len(parts) - 8} more"] if len(parts) > 8 else [])
    return f"At the end: {'; '.join(listed)}."


def _summaries(grouped: Sequence[Sequence[RunData]], labels: Sequence[str], beside: Path) -> str:
    runs = [run for members in grouped for run in members]
    last_rows = [row for run in runs for row in run.history[-1:]]
    columns = keys_in(last_rows, _COLUMNS)
    numeric = ' class="number"'
    headings = [
        "run",
        "recipe",
        "seed",
        "state",
        "step",
        *(figure_of(key).short for key in columns),
    ]
    head = "".join(
        f'<th scope="col"{numeric if i >= 4 or i == 2 else ""}><button type="button">'
        f"{text(name)}</button></th>"
        for i, name in enumerate(headings)
    )
    rows = []
    for members, label in zip(grouped, labels, strict=True):
        for run in members:
            last = run.history[-1] if run.history else {}
            cells = [
                f"<td>{_link(run, beside)}</td><td>{text(label)}</td>",
                _cell(run.recipe.seed),
                f"<td>{text(run.state)}</td>",
                _cell(last.get(STEP)),
                *(_cell(last.get(key)) for key in columns),
            ]
            rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        '<section class="card" aria-label="Summaries"><div class="filter">'
        '<label for="filter">Filter</label><input id="filter" type="search" autocomplete="off" '
        'placeholder="words that a row must hold"><span id="count" role="status"></span></div>'
        f'<div class="scroll"><table id="summaries"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _cell(value: Value) -> str:
    if value is None:
        return '<td class="number"></td>'
    return f'<td class="number" data-value="{value!r}">{text(number(value))}</td>'


def _link(run: RunData, beside: Path) -> str:
    if run.folder is None or not (run.folder / REPORT_FILE).is_file():
        return text(run.name)
    try:
        target = os.path.relpath(run.folder / REPORT_FILE, beside)
    except ValueError:  # on another drive
        return text(run.name)
    return f'<a href="{text(quote(Path(target).as_posix()))}">{text(run.name)}</a>'


def _differences(
    grouped: Sequence[Sequence[RunData]], labels: Sequence[str], differences: dict[str, list[Any]]
) -> str:
    if not differences:
        return '<section class="card"><p>Nothing but the seed.</p></section>'
    head = "".join(f'<th scope="col">{text(label)}</th>' for label in labels)
    rows = []
    for key, values in differences.items():
        texts = [_value_text(value) for value in values]
        commonest = max(texts, key=texts.count)
        usual = commonest if texts.count(commonest) > 1 else None
        cells = "".join(
            f"<td>{text(value)}</td>" if value == usual else f"<td><mark>{text(value)}</mark></td>"
            for value in texts
        )
        rows.append(f'<tr><th scope="row">{text(key)}</th>{cells}</tr>')
    seeds = "".join(
        f"<td>{text(', '.join(str(run.recipe.seed) for run in members[:30]))}</td>"
        for members in grouped
    )
    return (
        '<section class="card" aria-label="Differences"><div class="scroll"><table>'
        f'<thead><tr><th scope="col">key</th>{head}</tr></thead><tbody>{"".join(rows)}'
        f'<tr><th scope="row">seeds</th>{seeds}</tr></tbody></table></div></section>'
    )


def _value_text(value: Any) -> str:
    if value is None:
        return "not given"
    shortened = str(value)
    return shortened if len(shortened) <= 120 else shortened[:117] + "..."
