"""The files of a run folder, read with one-line errors."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mechcausal.records.run_folder import (
    MATRICES_FILE,
    MATRICES_FOLDER,
    SUMMARY_FILE,
    Value,
    read_metrics,
    read_object,
    read_summary,
)

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
        try:
            return _read(path, prefix)
        except RunDataError:
            # A run that finishes gathers the matrices of single steps, and deletes their files.
            whole = path.parent.parent / MATRICES_FILE
            if prefix or path.exists() or not whole.is_file():
                raise
            return _read(whole, f"{step:08d}/")

    def __iter__(self) -> Iterator[int]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def read_history(path: Path) -> tuple[list[dict[str, Value]], list[str]]:
    """Rows of metrics.jsonl, and what was left out: a last line that was torn by a kill."""
    try:
        is_torn = path.read_bytes()[-1:] not in (b"", b"\n")
        rows = read_metrics(path.parent)
    except OSError as error:
        raise RunDataError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise RunDataError(str(error)) from None
    return rows, [f"{path.name}: the last line is torn, and left out"] if is_torn else []


def read_json(path: Path) -> dict[str, Any]:
    """The object in summary.json or run.json; empty where there is no such file."""
    try:
        return read_summary(path.parent) if path.name == SUMMARY_FILE else read_object(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunDataError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise RunDataError(str(error)) from None


def find_matrices(folder: Path) -> tuple[dict[int, tuple[Path, str]], Matrices, list[str]]:
    """Where each step's matrices lie, the references, and what could not be read."""
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
            if path.exists():  # else the run has finished: it gathered them before
                notes.append(f"{path.parent.name}/{path.name} cannot be read, and is left out")
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
