"""The result of a comparison: its table, its folder and its W&B run."""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from mechcausal.records.run_folder import RunFolderError
from mechcausal.support.statistics import mean_and_stderr


@dataclass(frozen=True)
class TableRow:
    """The figures of one thing that is compared.

    Attributes:
        labels: what is compared, such as `{"method": "causal"}`.
        mean: means by name; None if undefined.
        stderr: their standard errors; None for a single value.
    """

    labels: Mapping[str, str]
    mean: Mapping[str, float | None]
    stderr: Mapping[str, float | None]

    @classmethod
    def over(cls, samples: Sequence[Mapping[str, float | None]], **labels: str) -> "TableRow":
        """Means over samples with the same names; None and NaN are left out."""
        mean: dict[str, float | None] = {}
        stderr: dict[str, float | None] = {}
        for name in samples[0]:
            column = [sample[name] for sample in samples]
            values = [value for value in column if value is not None and value == value]
            mean[name], stderr[name] = mean_and_stderr(values) if values else (None, None)
        return cls(labels, mean, stderr)

    def as_json(self) -> dict[str, Any]:
        """`{label: …, figure: …, figure_stderr: …, …}`."""
        content: dict[str, Any] = dict(self.labels)
        for name, value in self.mean.items():
            content |= {name: value, f"{name}_stderr": self.stderr[name]}
        return content


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        settings: what was compared, and how.
        rows: the table.
        folder: folder of the models, the table and the picture.
        picture: the picture.
        wandb: page or folder of the W&B run; None without one.
        warnings: problems with recording.
    """

    settings: Mapping[str, Any]
    rows: Sequence[TableRow]
    folder: Path
    picture: Path
    wandb: str | None = None
    warnings: Sequence[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        rows = [row.as_json() for row in self.rows]
        return {**self.settings, "rows": rows, "folder": str(self.folder)}


def new_folder(name: str) -> Path:
    """Default folder of a result: `runs/explain_<name>/<time>-<random>`."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"explain_{name}" / f"{stamp}-{secrets.token_hex(2)}"


def make_folder(folder: Path, name: str) -> None:
    """Make the folder of a result and check that it holds none.

    Args:
        folder: the folder.
        name: name of the result's file, without `.json`.

    Raises:
        RunFolderError: the folder is not writable, or already holds a result.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = (folder / f"{name}.json").exists()
    except OSError as error:
        raise RunFolderError(f"{folder}: not writable: {error.strerror or error}") from None
    if taken:
        raise RunFolderError(
            f"{folder}: already holds {name}.json; choose another folder with --out"
        )


def write_result(
    folder: Path,
    name: str,
    rows: Sequence[TableRow],
    settings: Mapping[str, Any],
    draw: Callable[[Path], None],
    warnings: Sequence[str],
) -> Comparison:
    """Write `<name>.json` and draw `<name>.png`.

    Args:
        folder: folder of the result.
        name: name of the files.
        rows: the table.
        settings: what was compared, and how.
        draw: draws the picture to a file.
        warnings: problems with recording; the caller may append more.
    """
    picture = folder / f"{name}.png"
    result = Comparison(settings, rows, folder, picture, warnings=warnings)
    text = json.dumps(result.as_json(), indent=2) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    draw(picture)
    return result
