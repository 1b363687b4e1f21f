"""The files of a run folder, read with one-line errors."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mechcausal.files import read_json_lines
from mechcausal.run_folder import MATRICES_FILE, MATRICES_FOLDER, STEP, Value, finite

Matrices = Mapping[str, np.ndarray]


class RunDataError(ValueError):
    """A folder that is no run, or a file of it that cannot be read; the message is one line."""


class Frames(Mapping[int, Matrices]):
    """The matrices of a run by step, each read when it is asked for.

    Attributes:
        sources: for each step its file and the prefix of its names there.
    """

    def __init__(self, sources: Mapping[int, tuple[Path, str]]) -> None:
        self.sources = dict(sorted(sources.items()))

    def __getitem__(self, step: int) -> Matrices:
        path, prefix = self.sources[step]
        return _read(path, prefix)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def read_history(path: Path) -> tuple[list[dict[str, Value]], list[str]]:
    """Rows of figures, and what was left out: a last line that was torn when the run was killed."""
    try:
        content = path.read_bytes()
        rows = read_json_lines(path)
    except OSError as error:
        raise RunDataError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise RunDataError(str(error)) from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(STEP), int):
            raise RunDataError(f"{path}, line {number}: not a row of figures")
    is_torn = content[-1:] not in (b"", b"\n")
    notes = [f"{path.name}: the last line is torn, and left out"] if is_torn else []
    return [{k: finite(v) for k, v in row.items() if _is_figure(v)} for row in rows], notes


def _is_figure(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunDataError(f"{path}: {error.strerror or error}") from None
    except ValueError:
        raise RunDataError(f"{path}: not valid JSON") from None
    if not isinstance(content, dict):
        raise RunDataError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def find_matrices(folder: Path) -> tuple[dict[int, tuple[Path, str]], Matrices, list[str]]:
    """Where each step's matrices lie, the references, and what could not be read."""
    sources: dict[int, tuple[Path, str]] = {}
    references: dict[str, np.ndarray] = {}
    notes: list[str] = []
    for path in sorted((folder / MATRICES_FOLDER).glob("*.safetensors")):
        try:
            names = _names(path)
        except RunDataError:  # the run may be writing it at this moment
            notes.append(f"{path.parent.name}/{path.name} cannot be read, and is left out")
            continue
        if path.stem.isdigit():
            sources[int(path.stem)] = (path, "")
        elif names:
            references |= _read(path, "")
    whole = folder / MATRICES_FILE
    if whole.is_file():
        prefixes = {match[0] for name in _names(whole) if (match := re.match(r"\d+/", name))}
        sources |= {int(prefix[:-1]): (whole, prefix) for prefix in prefixes}
        references |= {
            name: matrix
            for name, matrix in _read(whole, "", steps=False).items()
            if not re.match(r"\d+/", name)
        }
    return sources, references, notes


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="numpy") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError):
        raise RunDataError(f"{path}: not a readable safetensors file") from None


def _read(path: Path, prefix: str, *, steps: bool = True) -> Matrices:
    try:
        with safe_open(path, framework="numpy") as tensors:
            return {
                name.removeprefix(prefix): tensors.get_tensor(name)
                for name in tensors.keys()  # noqa: SIM118 (no mapping)
                if name.startswith(prefix) and (steps or not name[:1].isdigit())
            }
    except (OSError, SafetensorError):
        raise RunDataError(f"{path}: not a readable safetensors file") from None
