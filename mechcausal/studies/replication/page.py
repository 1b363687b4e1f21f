"""Write the replication as a JSON table and a Markdown page with pictures."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from mechcausal.studies.replication.figures import FIGURES
from mechcausal.studies.replication.result import Replication, Row
from mechcausal.support.messages import shell_command

VERDICTS = {True: "holds", False: "does not hold", None: ""}


def write_table(replication: Replication, path: Path) -> None:
    """Write the rows as JSON."""
    rows = [row.as_json() for row in replication.rows]
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def number(value: float | None) -> str:
    """A number for a table, with four decimals; empty for None and NaN.

    Example:
        >>> number(0.83664), number(3500.0), number(None), number(1.0)
        ('0.8366', '3,500', '', '1')
    """
    if value is None or value != value:
        return ""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) >= 1e-3 else f"{value:.2g}"


def measured(row: Row) -> str:
    """Our value with its standard error."""
    if row.ours is None:
        return "not found"
    error = "" if row.stderr is None else f" ± {number(row.stderr)}"
    return number(row.ours) + error


def publish(replication: Replication, page: Path) -> None:
    """Write the page to any file, with copies of the pictures in a folder of the same name."""
    picture_folder = page.parent / page.stem
    picture_folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        name: Path(shutil.copyfile(path, picture_folder / path.name))
        for name, path in replication.pictures.items()
    }
    write_page(replace(replication, pictures=pictures), page)


def _command(replication: Replication) -> str:
    figures = replication.figures or ("all",)
    return shell_command("mechcausal", "replicate", *figures, *replication.options)


def write_page(replication: Replication, page: Path) -> None:
    """Write the page in Markdown; links to pictures are relative to it."""
    figures = list(dict.fromkeys(row.figure for row in replication.rows))
    beyond = bool(figures) and all(FIGURES[figure].group == "tasks" for figure in figures)
    title, source = (
        ("Tasks beyond the paper", "tasks with exact predictors")
        if beyond
        else (
            "The paper, figure by figure",
            "*How Transformers Learn Causal Structure with Gradient Descent* (Nichani, Damian, "
            "Lee, ICML 2024)",
        )
    )
    lines = [
        f"# {title}",
        "",
        f"Made by `{_command(replication)}`: {source}, the paper's values, ours (± standard error "
        "over seeds, graphs or sequences), and the theory's. An empty cell: the paper, or theory, "
        "gives no number.",
    ]
    for figure in figures:
        lines += ["", f"## {figure}", "", "| quantity | paper | ours | theory | verdict |"]
        lines += ["|---|---:|---:|---:|---|"]
        for row in replication.rows:
            if row.figure == figure:
                cells = (row.quantity, number(row.paper), measured(row), number(row.theory))
                lines.append(f"| {' | '.join(cells)} | {VERDICTS[row.holds]} |")
        for name, path in replication.pictures.items():
            if name == figure or name.startswith(f"{figure}_"):
                link = Path(os.path.relpath(path, page.parent)).as_posix()
                lines += ["", f"![{name.replace('_', ' ')}]({link})"]
    for name, reason in replication.failed.items():
        lines += ["", f"`{name}`: {reason}"]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
