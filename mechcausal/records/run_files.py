"""Read the files of a run folder; errors are one line."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mechcausal.measures.figures import Value
from mechcausal.records.run_folder import (
    MATRICES_FILE,
    MATRICES_FOLDER,
    SUMMARY_FILE,
    read_metrics,
    read_object,
    read_summary,
)

Matrices = Mapping[str, np.ndarray]


class RunDataError(ValueError):
    """The folder is no run, or one of its files cannot be read; the message is one line."""


class Frames(Mapping[int, Matrices]):
    """The matrices of a run by step, read from disk on access.

    Attributes:
        sources: for each step its file and the prefix of its keys in that file.
    """

    def __init__(self, sources: Mapping[int, tuple[Path, str]]) -> None:
        self.sources = dict(sorted(sources.items()))

    def __getitem__(self, step: int) -> Matrices:
        path, prefix = self.sources[step]
        try:
            return _read(path, prefix)
        except RunDataError:
            # A run that finishes merges the files of single steps into one and deletes them.
            merged = path.parent.parent / MATRICES_FILE
            if prefix or path.exists() or not merged.is_file():
                raise
            return _read(merged, f"{step:08d}/")

    def __iter__(self) -> Iterator[int]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def read_history(path: Path) -> tuple[list[dict[str, Value]], list[str]]:
    """Rows of metrics.jsonl, and a note if a kill cut the last line short."""
    try:
        is_torn = path.read_bytes()[-1:] not in (b"", b"\n")
        rows = read_metrics(path.parent)
    except OSError as error:
        raise RunDataError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise RunDataError(str(error)) from None
    return rows, [f"{path.name}: the last line is torn, and left out"] if is_torn else []


def read_json(path: Path) -> dict[str, Any]:
    """The object in summary.json or run.json; empty without the file."""
    try:
        return read_summary(path.parent) if path.name == SUMMARY_FILE else read_object(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunDataError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise RunDataError(str(error)) from None


def find_matrices(folder: Path) -> tuple[dict[int, tuple[Path, str]], Matrices, list[str]]:
    """File and key prefix of each step's matrices, the references, and notes on failures."""
    sources: dict[int, tuple[Path, str]] = {}
    references: dict[str, np.ndarray] = {}
    notes: list[str] = []
    for path in sorted((folder / MATRICES_FOLDER).glob("*.safetensors")):
        try:
            if path.stem.isdigit():
                _names(path)
                sources[int(path.stem)] = (path, "")
            else:
                references |= _read(path, "")
        except RunDataError:
            if path.exists():  # else the run has just finished and merged its files
                notes.append(f"{path.parent.name}/{path.name} cannot be read, and is left out")
    merged = folder / MATRICES_FILE
    if merged.is_file():
        prefixes = {match[0] for name in _names(merged) if (match := re.match(r"\d+/", name))}
        sources |= {int(prefix[:-1]): (merged, prefix) for prefix in prefixes}
        references |= {
            name: matrix
            for name, matrix in _read(merged, "", steps=False).items()
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
