"""What a sweep leaves in its folder beside its members: the table and the pictures."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from mechcausal.files import write_atomically
from mechcausal.run_folder import read_metrics
from mechcausal.sweeps.definition import load_sweep
from mechcausal.sweeps.outcome import Outcome
from mechcausal.sweeps.picture import draw
from mechcausal.sweeps.plan import Member
from mechcausal.sweeps.sweep import Picture, Sweep
from mechcausal.sweeps.table import results_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_results(
    sweep: Sweep, members: Sequence[Member], outcomes: Mapping[str, Outcome], folder: Path
) -> dict[str, Path]:
    """Write results.csv, results.parquet and a PNG for every picture that can be drawn.

    Raises:
        OSError: not writable.
    """
    table = results_table(members, outcomes)
    files = {"table": folder / "results.csv", "parquet": folder / "results.parquet"}
    write_atomically(files["table"], table.to_csv(index=False))
    write_atomically(files["parquet"], table.to_parquet(index=False))
    for name, figure in _figures(sweep, table, folder).items():
        (folder / "figures").mkdir(exist_ok=True)
        files[name] = folder / "figures" / f"{name}.png"
        figure.savefig(files[name], dpi=110)
    return files


def read_results(folder: str | Path) -> tuple[pd.DataFrame, dict[str, "Figure"]]:
    """The table of a sweep's folder and its pictures, drawn anew, by name.

    Raises:
        SweepError, OSError: no sweep, or one that has not come to an end yet.
    """
    table = pd.read_parquet(Path(folder) / "results.parquet")
    return table, _figures(load_sweep(folder), table, Path(folder))


def describe_results(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """For the page of a sweep: its pictures as PNG, and what became of members that failed.

    Raises:
        SweepError, OSError: see `read_results`.
    """
    table, figures = read_results(folder)
    pictures = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        pictures[name] = buffer.getvalue()
    unfinished = table[table["state"] != "finished"]
    notes = [
        f"{row.member}: {row.state}{f': {row.error}' if isinstance(row.error, str) else ''}"
        for row in unfinished.itertuples()
    ]
    return pictures, notes


def _figures(sweep: Sweep, table: pd.DataFrame, folder: Path) -> dict[str, "Figure"]:
    found = {}
    for picture in sweep.pictures or default_pictures(table):
        figure = draw(picture, table, curves(picture, table, folder), title=sweep.name)
        if figure is not None:
            found[picture_name(picture)] = figure
    return found


def picture_name(picture: Picture) -> str:
    """The file name of a picture, without its ending."""
    axes = [picture.x, picture.y or "", picture.by or ""]
    figure = f"one-minus-{picture.figure}" if picture.complement else picture.figure
    parts = [figure, *(axis.rsplit(".", 1)[-1] for axis in axes if axis)]
    return "_".join(parts).replace("/", "-").replace(".", "-")[:100]


def default_pictures(table: pd.DataFrame) -> list[Picture]:
    """A picture over the first axes, of the graph or else of the loss, and curves over training."""
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
    """The rows of every finished member, where a picture is one of curves over training."""
    if picture.x != "train/step":
        return {}
    found = {}
    for name in table.loc[table["state"] == "finished", "member"]:
        try:
            rows = read_metrics(folder / name)
        except (OSError, ValueError):
            continue
        kept = [(row["train/step"], row.get(picture.figure)) for row in rows]
        found[name] = pd.DataFrame(kept, columns=["train/step", "value"]).dropna()
    return found
