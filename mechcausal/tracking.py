"""The record of a run: a W&B run, and beside it plain files that cannot be lost silently.

W&B offline loses rows without a word when the disk is full or the folder not writable, and up to
15 s of them on a kill. So every row also goes to metrics.jsonl, flushed; W&B's folder is checked
to be where it was asked to be; and after the run the rows on both sides are counted.
"""

import json
import math
import netrc
import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlparse

import numpy as np

from mechcausal.recipes import Recipe, WandbMode, recipe_to_dict, recipe_to_toml

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.toml"
SUMMARY_FILE = "summary.json"
STEP = "train/step"
MODES: tuple[WandbMode, ...] = ("online", "offline", "disabled")

Value = float | int | None
History = Sequence[Mapping[str, Value]]
"""A row of figures for every probe step, with its `train/step`."""
State = Literal["finished", "interrupted", "failed"]


class RunFolderError(ValueError):
    """A run folder that cannot be made or written; the message is one line for the user."""


class TrackingError(ValueError):
    """A W&B setting that cannot be used; the message is one line for the user."""


def resolve_mode(requested: WandbMode | None) -> WandbMode:
    """W&B mode: as requested, else WANDB_MODE, else online if a key is configured, else offline.

    Raises:
        TrackingError: WANDB_MODE is none of the modes.
    """
    if requested is not None:
        return requested
    variable = os.environ.get("WANDB_MODE", "").strip()
    if variable:
        for mode in MODES:
            if variable.lower() == mode:
                return mode
        raise TrackingError(f"WANDB_MODE is {variable!r}: allowed are {', '.join(MODES)}")
    return "online" if _key_configured() else "offline"


def _key_configured() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return bool(host) and netrc.netrc(path).authenticators(str(host)) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def new_run_folder(recipe: Recipe, out: str | Path | None) -> Path:
    """Make the folder of a new run, and check that it can be written.

    Args:
        recipe: gives the default, `runs/<name>/<time>-seed<seed>-<random>`.
        out: the folder itself; it may exist, but not hold a run.

    Raises:
        RunFolderError: not writable, not a folder, or another run is in it.
    """
    if out is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        out = Path("runs") / recipe.name / f"{stamp}-seed{recipe.seed}-{secrets.token_hex(2)}"
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [name for name in (METRICS_FILE, SUMMARY_FILE) if (folder / name).exists()]
        if taken:
            raise RunFolderError(
                f"{folder}: already holds a run ({taken[0]}); choose another folder with --out"
            )
        (folder / RECIPE_FILE).write_text(recipe_to_toml(recipe), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{folder}: not writable: {error.strerror or error}") from None
    return folder


class RunRecord:
    """One run's W&B run and files: opened, fed row by row, finished.

    Attributes:
        folder: the run folder.
        mode: resolved W&B mode; falls back to offline when online cannot be had.
        warnings: what went wrong with recording, for the user to read.
        rows: rows written so far.
    """

    def __init__(self, folder: Path, recipe: Recipe, mode: WandbMode) -> None:
        """Open metrics.jsonl and the W&B run."""
        self.folder = folder
        self.mode = mode
        self.warnings: list[str] = []
        self.rows = 0
        self._metrics = (folder / METRICS_FILE).open("w", encoding="utf-8")
        self._run: Run | None = None
        if mode != "disabled":
            self._run = self._open_wandb(recipe)

    @property
    def wandb_folder(self) -> Path | None:
        """Where W&B writes this run, None when disabled."""
        return Path(self._run.settings.sync_dir) if self._run else None

    @property
    def url(self) -> str | None:
        """The run's page, when online."""
        return self._run.url if self._run and self.mode == "online" else None

    def log(
        self,
        step: int,
        metrics: Mapping[str, Value],
        images: Mapping[str, np.ndarray | Path] | None = None,
    ) -> None:
        """Write one row: to metrics.jsonl (flushed), then to W&B (committed).

        Args:
            step: training step; rows come in increasing order.
            metrics: numbers by name; None and values that are not finite are written as null in
                the file and left out of the W&B row.
            images: pictures for the W&B row, as uint8 arrays [height, width, 3] or PNG files.

        Raises:
            OSError: the file cannot be written.
        """
        row = {STEP: step} | {key: _finite(value) for key, value in metrics.items()}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        self.rows += 1
        if self._run is None:
            return
        content: dict[str, Any] = {key: value for key, value in row.items() if value is not None}
        if images:
            import wandb

            content |= {
                name: wandb.Image(str(image) if isinstance(image, Path) else image)
                for name, image in images.items()
            }
        self._run.log(content, step=step, commit=True)

    def finish(self, summary: Mapping[str, Any], state: State) -> None:
        """Write summary.json, close the W&B run, and check that no row was lost."""
        os.fsync(self._metrics.fileno())
        self._metrics.close()
        if self._run is not None:
            self._run.summary.update(_flat({**summary, "state": state}))
            folder = self.wandb_folder
            self._run.finish(exit_code=0 if state == "finished" else 1)
            if folder is not None:
                self._compare_rows(folder)
        content = {**summary, "state": state, "rows": self.rows, "warnings": self.warnings}
        text = json.dumps(_json_ready(content), indent=2) + "\n"
        temporary = self.folder / f".{SUMMARY_FILE}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.folder / SUMMARY_FILE)

    def _open_wandb(self, recipe: Recipe) -> "Run | None":
        run, self.mode = start_wandb(
            self.mode,
            self.folder,
            self.warnings,
            id=_run_id(self.folder),
            name=self.folder.name,
            project=recipe.wandb.project,
            entity=recipe.wandb.entity,
            group=recipe.wandb.group or recipe.name,
            tags=[*recipe.wandb.tags, recipe.graph.preset, recipe.model.kind],
            config=recipe_to_dict(recipe),
        )
        if run is None:
            self.warnings.append("the run is recorded in metrics.jsonl alone")
            return None
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        return run

    def _compare_rows(self, folder: Path) -> None:
        found = count_wandb_rows(folder)
        if found is None:
            self.warnings.append(f"the rows of the W&B run in {folder} could not be counted")
        elif found != self.rows:
            self.warnings.append(
                f"W&B kept {found} of {self.rows} rows in {folder}; "
                f"all of them are in {self.folder / METRICS_FILE}"
            )


def start_wandb(
    mode: WandbMode, folder: Path, warnings: list[str], **options: Any
) -> "tuple[Run | None, WandbMode]":
    """Start a W&B run in a folder: offline where online cannot be had, none where neither can.

    Nothing on the terminal, rows on disk within a second, no long wait for a silent network.

    Args:
        mode: online or offline.
        folder: W&B's files go below it.
        warnings: what went wrong is added here.
        **options: further arguments of `wandb.init`.

    Returns:
        The run and its mode, `None` and "disabled" without one.
    """
    import wandb

    settings = wandb.Settings(
        console="off", silent=True, init_timeout=30, x_transaction_log_flush_interval=1
    )
    # Absolute: W&B's service may have been started in another folder.
    folder = folder.resolve()
    attempts: tuple[WandbMode, ...] = ("online", "offline") if mode == "online" else ("offline",)
    for attempt in attempts:
        try:
            run = wandb.init(mode=attempt, dir=str(folder), settings=settings, **options)
        except (wandb.errors.Error, OSError, ValueError) as error:  # ValueError: its settings
            reason = str(error).strip().splitlines()
            warnings.append(f"W&B could not start {attempt}: {reason[0] if reason else ''}")
            continue
        actual = Path(run.settings.sync_dir).resolve()
        if not actual.is_relative_to(folder):
            warnings.append(f"W&B writes to {actual}, not into the run folder")
        return run, attempt
    return None, "disabled"


def count_wandb_rows(folder: Path) -> int | None:
    """History rows in the transaction log of a W&B run folder; None if it cannot be read.

    Uses the log reader that ships with wandb (what `wandb leet inspect --json` runs).
    """
    from wandb.util import get_core_path

    logs = list(folder.glob("*.wandb"))
    if len(logs) != 1:
        return None
    command = [get_core_path(), "leet", "inspect", "--json", "--run-file", str(logs[0].resolve())]
    try:
        result = subprocess.run(
            [*command, str(folder.resolve().parent)], capture_output=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return sum(b'"type":"history"' in line for line in result.stdout.splitlines())


class StopSignal:
    """Set when the process was asked to stop; the loop ends cleanly at its next step.

    Attributes:
        received: the signal, None so far.
    """

    def __init__(self) -> None:
        """No signal yet."""
        self.received: signal.Signals | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopSignal]:
    """Turn the first SIGTERM or SIGINT into a request to stop; a second SIGINT interrupts at once.

    Outside the main thread, where Python takes no signals, nothing is changed.
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.received = signal.Signals(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def read_metrics(folder: str | Path) -> list[dict[str, Value]]:
    """Rows of a run folder's metrics.jsonl, in order."""
    text = (Path(folder) / METRICS_FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_summary(folder: str | Path) -> dict[str, Any]:
    """A run folder's summary.json."""
    text = (Path(folder) / SUMMARY_FILE).read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def _run_id(folder: Path) -> str:
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in folder.name)[:100]
    return f"{name}-{secrets.token_hex(2)}"


def _finite(value: Value) -> Value:
    return None if value is None or not math.isfinite(value) else value


def _json_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    return _finite(value) if isinstance(value, float) else value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
