"""The folder of a run: its lock, its files and its state.

recipe.toml        the full recipe
metrics.jsonl      a row of figures for every probe step
run.json           W&B's id, versions, and the process that writes the run
summary.json       how the run ended; absent while it runs and after a kill
checkpoints/       states to resume from
matrices/          kept matrices, a file a step; merged into matrices.safetensors at the end
model/, figures/   final weights and pictures
wandb/             the W&B run, one fragment for the start and for every resume
"""

import json
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from filelock import FileLock, Timeout

from mechcausal.measures.figures import STEP, Value
from mechcausal.recipes import Recipe, load_recipe, recipe_to_toml
from mechcausal.support.files import read_json_lines, write_atomically
from mechcausal.support.messages import excerpt, shell_command

RECIPE_FILE = "recipe.toml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
PROCESS_FILE = "run.json"
MATRICES_FILE = "matrices.safetensors"
MATRICES_FOLDER = "matrices"  # of an unfinished run, a file for every step
MODEL_FOLDER = "model"
LOCK_FILE = ".lock"
State = Literal["finished", "interrupted", "failed"]
T = TypeVar("T")


class RunFolderError(ValueError):
    """A run folder cannot be made, read or written; the message is one line for the user."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Lock a run folder, so that no other process writes it; the lock ends with the process.

    Raises:
        RunFolderError: another process holds the lock, or the folder cannot be written.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        # `is_held` takes the lock for a moment: wait until it lets go.
        lock.acquire(timeout=0.5)
    except Timeout:
        process = read_process(folder)
        owner = f"process {excerpt(process.get('pid'))} on {excerpt(process.get('host'))}"
        raise RunFolderError(f"{folder}: {owner} is writing this run") from None
    except OSError as error:
        raise RunFolderError(f"{folder}: not writable: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a live process holds the run's lock."""
    if not (folder / LOCK_FILE).is_file():
        return False
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # no permission to write here
        return False
    lock.release()
    return False


@contextmanager
def new_run_folder(recipe: Recipe, out: str | Path | None) -> Iterator[Path]:
    """Make and lock the folder of a new run, and write its recipe.

    Args:
        recipe: determines the default folder, `runs/<name>/<time>-seed<seed>-<random>`.
        out: the folder; it may exist, but must not hold a run.

    Raises:
        RunFolderError: it is not writable, not a folder, or already holds a run.
    """
    if out is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        out = Path("runs") / recipe.name / f"{stamp}-seed{recipe.seed}-{secrets.token_hex(2)}"
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{folder}: not writable: {error.strerror or error}") from None
    _check_free(folder)
    with hold(folder):
        _check_free(folder)  # again: another process may have started a run before the lock
        try:
            write_atomically(folder / RECIPE_FILE, recipe_to_toml(recipe))
        except OSError as error:
            raise RunFolderError(f"{folder}: not writable: {error.strerror or error}") from None
        yield folder


def _check_free(folder: Path) -> None:
    for name in (METRICS_FILE, SUMMARY_FILE):
        if (folder / name).exists():
            raise RunFolderError(
                f"{folder}: already holds a run ({name}); choose another folder with --out, "
                f"or resume it: {shell_command('mechcausal', 'resume', folder)}"
            )


def finite(value: Value) -> Value:
    """The value as metrics.jsonl stores it: None if it is not a finite number."""
    return value if value is not None and abs(value) <= sys.float_info.max else None


def read_metrics(folder: str | Path) -> list[dict[str, Value]]:
    """Rows of a run folder's metrics.jsonl, in order; an incomplete last line is skipped.

    Raises:
        OSError, ValueError: the file is not readable, or a line is no row of figures.
    """
    path, rows = Path(folder) / METRICS_FILE, []
    for number, values in enumerate(read_json_lines(path), start=1):
        if not _is_count(values.get(STEP)):
            raise ValueError(f"{path}, line {number}: not a row of figures")
        figures = {name: value for name, value in values.items() if _is_figure(value)}
        rows.append({current_name(name): finite(value) for name, value in figures.items()})
    return rows


def current_name(name: str) -> str:
    """Today's name of a figure or matrix: older runs called a head's prefix matching `induction`.

    >>> current_name("heads/L0H1/induction")
    'heads/L0H1/prefix_matching'
    """
    return re.sub(r"^(heads/(?:\w+/)?)induction$", r"\1prefix_matching", name)


def _is_figure(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object, nested at most 50 levels deep.

    Raises:
        OSError: the file is not readable.
        ValueError: the content is no such object; the message is one line that names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_deep = _is_deeper(content, 50)
    except RecursionError:
        content, is_deep = {}, True
    except ValueError:
        raise ValueError(f"{path}: not valid JSON") from None
    if is_deep:
        raise ValueError(f"{path}: nested too deep")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _is_deeper(value: object, levels: int) -> bool:
    nested = [value]
    for _ in range(levels):
        nested = [
            inner
            for outer in nested
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(nested)


def read_summary(folder: str | Path) -> dict[str, Any]:
    """Read a run folder's summary.json.

    Raises:
        OSError, ValueError: it is missing, not readable, or a value has the wrong type.
    """
    path = Path(folder) / SUMMARY_FILE
    content = read_object(path)
    for key, (is_valid, needed) in _SUMMARY.items():
        if key in content and not is_valid(content[key]):
            raise ValueError(f"{path}: {key} is {excerpt(content[key])}: {needed} is needed")
    return content


_SUMMARY: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "state": (lambda value: value in get_args(State), "finished, interrupted or failed"),
    "recipe": (lambda value: isinstance(value, str), "a name"),
    "first": (lambda value: isinstance(value, dict), "an object"),
    "warnings": (lambda value: isinstance(value, list), "a list"),
    "rows": (_is_count, "a whole number"),
    "train/steps": (_is_count, "a whole number"),
}
"""For each key that readers rely on: a check of its value, and the text for an error."""


def read_process(folder: str | Path) -> dict[str, Any]:
    """Read a run folder's run.json; empty if it is missing or unreadable."""
    try:
        return read_object(Path(folder) / PROCESS_FILE)
    except (OSError, ValueError):
        return {}


def has_finished(folder: str | Path) -> bool:
    """Whether a run folder holds a finished run."""
    try:
        return bool(read_object(Path(folder) / SUMMARY_FILE).get("state") == "finished")
    except (OSError, ValueError):
        return False


def write_process(folder: Path, values: Mapping[str, Any]) -> None:
    """Write run.json: these values, with this process's pid and host.

    Raises:
        OSError: the file cannot be written.
    """
    owner = {"pid": os.getpid(), "host": socket.gethostname()}
    write_atomically(folder / PROCESS_FILE, json.dumps({**values, **owner}, indent=2) + "\n")


def write_summary(folder: Path, values: Mapping[str, Any]) -> None:
    """Write summary.json, with null for numbers that are not finite.

    Raises:
        OSError: the file cannot be written.
    """
    write_atomically(folder / SUMMARY_FILE, json.dumps(_json_ready(values), indent=2) + "\n")


def _json_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    return finite(value) if isinstance(value, float) else value


@dataclass(frozen=True)
class RunInfo:
    """State and last figures of a run.

    Attributes:
        folder: the run folder.
        recipe: its recipe; None if it cannot be read.
        state: finished, interrupted, failed or running; a killed run counts as interrupted.
        step: step of the last row on disk.
        n_steps: steps of the whole run.
        figures: the last row.
        updated: when the last row was written, seconds since the epoch.
        problem: message about the first file that cannot be read; empty if all can.
    """

    folder: Path
    recipe: Recipe | None
    state: State | Literal["running"]
    step: int
    n_steps: int
    figures: Mapping[str, Any]
    updated: float
    problem: str = ""


def run_info(folder: Path) -> RunInfo:
    """Read state and last figures of a run; damaged files become its `problem`."""
    problems: list[str] = []

    def attempt(read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except FileNotFoundError:
            return otherwise
        except (OSError, ValueError) as error:
            problems.append(str(error))
            return otherwise

    recipe: Recipe | None = attempt(lambda: load_recipe(folder / RECIPE_FILE), None)
    rows: list[dict[str, Value]] = attempt(lambda: read_metrics(folder), [])
    summary: dict[str, Any] = {"state": "running"}
    if not is_held(folder):
        summary = attempt(lambda: read_summary(folder), {})
    metrics = folder / METRICS_FILE
    last = rows[-1] if rows else {}
    return RunInfo(
        folder=folder,
        recipe=recipe,
        state=summary.get("state", "interrupted"),
        step=int(last.get(STEP) or 0),
        n_steps=recipe.n_steps if recipe else 0,
        figures=last,
        updated=attempt(lambda: (metrics if metrics.exists() else folder).stat().st_mtime, 0.0),
        problem=problems[0] if problems else "",
    )


def find_runs(folder: Path) -> list[Path]:
    """The run folders at and below a folder, sorted by name; run folders are not searched."""
    if _is_run(folder):
        return [folder]
    runs: list[Path] = []
    try:
        subfolders = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return runs
    for path in subfolders:
        if not path.name.startswith(".") and not path.is_symlink():
            runs += find_runs(path)
    return runs


def _is_run(folder: Path) -> bool:
    return (folder / RECIPE_FILE).is_file() and any(
        (folder / name).exists() for name in (METRICS_FILE, SUMMARY_FILE, PROCESS_FILE)
    )
