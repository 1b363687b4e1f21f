"""Build the HTML of a page: one file without network requests.

Every string from a recipe, a folder name or a token must pass through `text` or `script_json`.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from mechcausal.pictures.interactive.style import template
from mechcausal.support.files import write_atomically

# Allow only inline scripts and styles: no string in the page can cause a request.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)


def text(value: object) -> str:
    """Escape a value for HTML text or attributes."""
    return escape(str(value), quote=True)


def capital(title: str) -> str:
    """The title with a capital first letter."""
    return title[:1].upper() + title[1:]


def script_json(value: Any) -> str:
    """JSON that cannot close the script element around it."""
    content = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        content = content.replace(character, f"\\u{ord(character):04x}")
    return content


def figure_json(figure: go.Figure) -> dict[str, Any]:
    """A figure's data and layout, without the template, which the page adds."""
    content: dict[str, Any] = json.loads(figure.to_json())
    content["layout"].pop("template", None)
    return {"data": content["data"], "layout": content["layout"]}


def page(title: str, body: str, data: Mapping[str, Any], *, scripts: Sequence[str] = ()) -> str:
    """The complete HTML file.

    Args:
        title: plain text.
        body: HTML with escaped strings.
        data: data for the page's script; `templates` are added.
        scripts: names of further asset scripts.
    """
    from plotly.offline import get_plotlyjs

    templates = {name: template(dark=name == "dark") for name in ("light", "dark")}
    content = dict(data) | {
        "templates": {name: layout.to_plotly_json() for name, layout in templates.items()}
    }
    own = "\n".join(f"<script>{asset(name)}</script>" for name in ("page.js", *scripts))
    return f"""<!DOCTYPE html>
<html lang="en" data-theme="light">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{asset("page.css")}</style>
</head>
<body>
<div class="wrap">
<noscript><p class="card">The pictures need JavaScript, which is off.</p></noscript>
{body}
</div>
<script type="application/json" id="data">{script_json(content)}</script>
<script>{get_plotlyjs()}</script>
{own}
</body>
</html>
"""


def write(path: Path, content: str) -> None:
    """Write a page atomically, and create its folder.

    Raises:
        OSError: the page cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def asset(name: str) -> str:
    """The text of a file in the assets folder."""
    return (files("mechcausal.pictures.pages") / "assets" / name).read_text(encoding="utf-8")


def panel(
    name: str,
    title: str,
    figures: Sequence[int],
    caption: str,
    *,
    shape: str,
    cells: float,
    step: int | None = None,
) -> str:
    """A card with a heading, pictures and a caption.

    Args:
        name: name of the panel.
        title: plain text.
        figures: indices into the page's figures.
        caption: plain text; also the label for screen readers.
        shape: square, graph, wide or curve.
        cells: relative width of the card.
        step: step of the pictures, named in the label; None to omit it.
    """
    when = "" if step is None else f" at step {step:,}"
    plots = "".join(
        f'<div class="plot {shape}" role="img" data-figure="{number}" '
        f'aria-label="{text(f"{title}{when}. {caption}")}"></div>'
        for number in figures
    )
    return (
        f'<figure class="panel" data-panel="{text(name)}" style="--cells:{cells:g}" '
        f'aria-labelledby="title-{text(name)}"><h2 id="title-{text(name)}">{text(title)}</h2>'
        f'<div class="cells">{plots}</div><figcaption>{text(caption)}</figcaption></figure>'
    )


def tiles(items: Mapping[str, str]) -> str:
    """A row of labelled numbers."""
    content = "".join(
        f'<div class="tile"><dt>{text(label)}</dt><dd>{text(value)}</dd></div>'
        for label, value in items.items()
    )
    return f'<dl class="tiles">{content}</dl>'


def pairs_table(rows: Mapping[str, object]) -> str:
    """A table of keys and values."""
    content = "".join(
        f'<tr><th scope="row">{text(key)}</th><td>{text(value)}</td></tr>'
        for key, value in rows.items()
    )
    return f"<table><tbody>{content}</tbody></table>"


def top(title: str, lead: str) -> str:
    """The page's header, with the button that switches between light and dark."""
    return (
        f'<header class="top"><div><h1>{text(title)}</h1><p class="lead">{text(lead)}</p></div>'
        '<div><button id="theme" type="button" aria-label="Switch between light and dark">Dark'
        "</button></div></header>"
    )


def player(n_steps: int) -> str:
    """The slider over the steps, with its play button."""
    return (
        '<div class="player" role="group" aria-label="Step of training">'
        '<button id="play" type="button" aria-pressed="false">▶ Play</button>'
        '<label class="hidden" for="step">Step of training; arrow keys move, space plays</label>'
        f'<input id="step" type="range" min="0" max="{n_steps - 1}" step="1" value="{n_steps - 1}" '
        'autocomplete="off"><output id="readout" for="step"></output></div>'
        '<p class="print-step"></p>'
    )
