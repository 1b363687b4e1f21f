"""Read the matrices of a run's probe steps.

While a run trains, each step has a file; a finished run has one file with keys `<step>/<name>`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from mechcausal.records.run_folder import MATRICES_FILE, MATRICES_FOLDER, current_name

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


def find_matrices(run: Path, *, lenient: bool = False) -> tuple[Frames, Matrices, list[str]]:
    """The matrices of every step, the references, and notes on files that cannot be read.

    Args:
        run: the run folder.
        lenient: also only note it if the one file of a finished run cannot be read.

    Raises:
        RunDataError: that file cannot be read.
    """
    sources: dict[int, tuple[Path, str]] = {}
    references: dict[str, np.ndarray] = {}
    notes: list[str] = []
    for path in sorted((run / MATRICES_FOLDER).glob("*.safetensors")):
        try:
            if path.stem.isdecimal():
                _names(path)
                sources[int(path.stem)] = (path, "")
            else:
                references |= _read(path)
        except RunDataError:
            if path.exists():  # else the run has just finished and merged its files
                notes.append(f"{path.parent.name}/{path.name} cannot be read, and is left out")
    merged = run / MATRICES_FILE
    if not merged.is_file():
        return Frames(sources), references, notes
    try:
        steps = {step for step in map(_step_of, _names(merged)) if step}
        sources |= {int(step): (merged, f"{step}/") for step in steps}
        references |= _read(merged, of_steps=False)
    except RunDataError as error:
        if not lenient:
            raise
        notes.append(str(error))
    return Frames(sources), references, notes


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="numpy") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError):
        raise RunDataError(f"{path}: not a readable safetensors file") from None


def _read(path: Path, prefix: str = "", *, of_steps: bool = True) -> dict[str, np.ndarray]:
    """The matrices whose names start with a prefix, which is cut off."""
    try:
        with safe_open(path, framework="numpy") as tensors:
            return {
                current_name(name.removeprefix(prefix)): tensors.get_tensor(name)
                for name in tensors.keys()  # noqa: SIM118 (no mapping)
                if name.startswith(prefix) and (of_steps or not _step_of(name))
            }
    except (OSError, SafetensorError):
        raise RunDataError(f"{path}: not a readable safetensors file") from None


def _step_of(name: str) -> str:
    """The step that a name begins with, or ""."""
    step, separator, _ = name.partition("/")
    return step if separator and step.isdecimal() else ""
