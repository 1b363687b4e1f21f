"""Write and read the table and the pictures of a sweep."""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from mechcausal.records.run_folder import read_metrics
from mechcausal.support.files import write_atomically
from mechcausal.support.messages import first_line
from mechcausal.sweeps.definition import load_sweep
from mechcausal.sweeps.outcome import Outcome
from mechcausal.sweeps.picture import draw
from mechcausal.sweeps.plan import Member, shortest_ends
from mechcausal.sweeps.sweep import Picture, Sweep, SweepError
from mechcausal.sweeps.table import results_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE_FILE = "results.csv"


def write_results(
    sweep: Sweep,
    members: Sequence[Member],
    outcomes: Mapping[str, Outcome],
    folder: Path,
    *,
    warn: Callable[[str], None] = warnings.warn,
) -> dict[str, Path]:
    """Write results.csv and figures/*.png; return the paths by name.

    Args:
        sweep: the sweep, which names the pictures.
        members: one row each.
        outcomes: by member name.
        folder: the sweep's folder.
        warn: called with one line for each picture that fails; the others are drawn.

    Raises:
        OSError: the table cannot be written.
    """
    table = results_table(members, outcomes)
    files = {"table": folder / TABLE_FILE}
    write_atomically(files["table"], table.to_csv(index=False))

    def save(name: str, figure: "Figure") -> None:
        path = folder / "figures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, _png(figure))
        files[name] = path

    _draw_each(sweep, table, folder, save, warn)
    return files


def read_results(folder: str | Path) -> tuple[pd.DataFrame, dict[str, "Figure"]]:
    """Read a sweep's table and draw its pictures, by name.

    A picture that fails raises a Python warning and is left out.

    Raises:
        SweepError, OSError: the folder holds no sweep, or one without a table yet.
    """
    sweep, table = _read(folder)
    figures: dict[str, Figure] = {}
    _draw_each(sweep, table, Path(folder), figures.__setitem__, warnings.warn)
    return table, figures


def describe_results(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """A sweep's pictures as PNG, by name, and one note per picture or member that failed.

    Raises:
        SweepError, OSError: see `read_results`.
    """
    sweep, table = _read(folder)
    pictures: dict[str, bytes] = {}
    notes: list[str] = []

    def keep(name: str, figure: "Figure") -> None:
        pictures[name] = _png(figure)

    _draw_each(sweep, table, folder, keep, notes.append)
    unfinished = table[table["state"] != "finished"]
    notes += [
        f"{row.member}: {row.state}{f': {row.error}' if isinstance(row.error, str) else ''}"
        for row in unfinished.itertuples()
    ]
    return pictures, notes


def _read(folder: str | Path) -> tuple[Sweep, pd.DataFrame]:
    path = Path(folder) / TABLE_FILE
    sweep = load_sweep(folder)
    try:
        table = pd.read_csv(path, dtype={"member": str, "state": str, "error": str})
    except ValueError as error:
        raise SweepError(f"{path}: not a table: {first_line(error)}") from None
    if missing := {"member", "state", "error"} - {*table.columns}:
        raise SweepError(f"{path}: not a sweep's table: no column {min(missing)}")
    return sweep, table


def _draw_each(
    sweep: Sweep,
    table: pd.DataFrame,
    folder: Path,
    keep: Callable[[str, "Figure"], None],
    warn: Callable[[str], None],
) -> None:
    """Draw every picture that the table has data for; a failing one does not stop the others."""
    pictures = sweep.pictures or default_pictures(table)
    for name, picture in zip(picture_names(pictures), pictures, strict=True):
        try:
            figure = draw(picture, table, curves(picture, table, folder), title=sweep.name)
            if figure is not None:
                keep(name, figure)
        except Exception as error:  # whatever matplotlib and pandas raise
            warn(f"picture {name}: not drawn: {type(error).__name__}: {first_line(error)}")


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def picture_names(pictures: Sequence[Picture]) -> list[str]:
    """Distinct file names of the pictures, without suffix.

    Example:
        >>> first = Picture(figure="loss/eval", x="training.stage1.lr")
        >>> second = Picture(figure="loss/eval", x="training.stage2.lr")
        >>> picture_names([first]), picture_names([first, second])
        (['loss-eval_lr'], ['loss-eval_stage1-lr', 'loss-eval_stage2-lr'])
    """
    axes = [[axis for axis in (p.x, p.y, p.by) if axis] for p in pictures]
    labels = shortest_ends([*dict.fromkeys(axis for picture_axes in axes for axis in picture_axes)])
    names: list[str] = []
    for picture, picture_axes in zip(pictures, axes, strict=True):
        figure = f"one-minus-{picture.figure}" if picture.complement else picture.figure
        text = "_".join([figure, *(labels[axis] for axis in picture_axes)])
        first = name = text.replace("/", "-").replace(".", "-")[:100]
        number = 1
        while name in names:
            number += 1
            name = f"{first}-{number}"
        names.append(name)
    return names


def default_pictures(table: pd.DataFrame) -> list[Picture]:
    """A picture over the first one or two axes and curves over training, of one main figure."""
    start = list(table.columns).index("error") + 1
    fields = [name for name in table.columns[start:] if "." in name]
    fields = [name for name in fields if not name.startswith("wandb.")]
    candidates = ("graph/recovered", "loss/second_copy", "loss/eval")
    figure = next((f for f in candidates if f in table and table[f].notna().any()), None)
    if figure is None:
        return []
    pictures = [Picture(figure=figure, x="train/step", by=fields[0] if fields else None)]
    if len(fields) > 1:
        pictures.insert(0, Picture(figure=figure, x=fields[0], y=fields[1]))
    elif fields:
        pictures.insert(0, Picture(figure=figure, x=fields[0]))
    return pictures


def curves(picture: Picture, table: pd.DataFrame, folder: Path) -> dict[str, pd.DataFrame]:
    """The figure against `train/step` of every finished member, if the picture needs them."""
    if picture.x != "train/step":
        return {}
    by_member = {}
    for name in table.loc[table["state"] == "finished", "member"]:
        try:
            rows = read_metrics(folder / name)
        except (OSError, ValueError):
            continue
        points = [(row["train/step"], row.get(picture.figure)) for row in rows]
        by_member[name] = pd.DataFrame(points, columns=["train/step", "value"]).dropna()
    return by_member
