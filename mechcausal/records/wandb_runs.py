"""W&B runs that never stop a training run: each failure of W&B becomes a warning.

Offline, W&B silently loses rows when the disk is full or the folder not writable, and up to a
second of rows when the process is killed. So we check where W&B writes and count its rows.
"""

import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mechcausal.recipes import WandbMode
from mechcausal.records import wandb_session
from mechcausal.support.messages import first_line

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

    from mechcausal.records.panels import Panel

MODES: tuple[WandbMode, ...] = ("online", "offline", "disabled")
FINISH_SECONDS = 30
"""W&B's own time limit for finishing a run."""
PATIENCE_SECONDS = 10
"""How long to wait beyond that limit before killing W&B's service."""
_SLOW_ARTIFACT_SECONDS = 5.0
_LEAN: Mapping[str, Any] = {
    "disable_git": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


class TrackingError(ValueError):
    """An invalid W&B setting; the message is one line for the user."""


def resolve_mode(requested: WandbMode | None) -> WandbMode:
    """W&B mode: the requested one, else WANDB_MODE, else W&B's settings, else online with a key.

    W&B's settings come from its settings files and `wandb.setup`; they name the server whose key
    is looked up, and possibly a mode (as set by `wandb offline`). Without a key the mode is
    offline.

    Raises:
        TrackingError: WANDB_MODE is not a W&B mode.
    """
    if requested is not None:
        return requested
    variable = os.environ.get("WANDB_MODE", "").strip()
    if variable:
        for mode in MODES:
            if variable.lower() == mode:
                return mode
        raise TrackingError(f"WANDB_MODE is {variable!r}: allowed are {', '.join(MODES)}")
    try:
        settings = wandb_session.settings()
        if settings is not None and settings.mode in ("offline", "disabled"):  # not the default
            return settings.mode
        return "online" if wandb_session.has_key(settings) else "offline"
    except Exception:  # invalid settings: W&B reports them when the run starts
        return "offline"


def load_wandb() -> None:
    """Import W&B and everything its first run needs; call this before importing TransformerLens.

    Before Python 3.13, importing W&B searches every loaded module for docstrings, which is slow
    once thousands of modules are loaded.
    """
    import wandb.apis.public  # noqa: F401


def start_wandb(
    mode: WandbMode, folder: Path, warnings: list[str], *, lean: bool = False, **options: Any
) -> "tuple[Run | None, WandbMode]":
    """Start a W&B run in a folder; fall back from online to offline to none.

    W&B prints nothing, flushes rows to disk every second, and gives up on the network after 20 s.

    Args:
        mode: online or offline.
        folder: W&B's files go below it.
        warnings: problems are appended here.
        lean: collect nothing about the machine, the packages and the repository.
        **options: further arguments of `wandb.init`.

    Returns:
        The run and its mode; `None` and "disabled" if no run could start.
    """
    import wandb

    settings = wandb.Settings(
        reinit="create_new",
        console="off",
        silent=True,
        init_timeout=20,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
        x_transaction_log_flush_interval=1,
        **(_LEAN if lean else {}),
    )
    # W&B's service may run in another working directory: pass an absolute path.
    folder = folder.resolve()
    # Offline twice: after a kill the id may still count as in use for a moment.
    attempts: list[WandbMode] = ["offline", "offline"]
    if mode == "online":
        attempts.insert(0, "online")
    problems: list[str] = []
    options.setdefault("id", secrets.token_hex(4))
    for attempt in attempts:
        try:
            run = wandb_session.open_run(
                patience=PATIENCE_SECONDS,
                mode=attempt,
                dir=str(folder),
                settings=settings,
                **options,
            )
        except Exception as error:  # W&B may raise anything; the training continues
            problems.append(f"W&B could not start {attempt}: {first_line(error)}")
            continue
        offline_failed = "W&B could not start offline"
        warnings += [line for line in problems if not line.startswith(offline_failed)]
        actual = Path(run.settings.sync_dir).resolve()
        if not actual.is_relative_to(folder):
            warnings.append(f"W&B writes to {actual}, not into the run folder")
        return run, attempt
    warnings += dict.fromkeys(problems)
    return None, "disabled"


class WandbRun:
    """A W&B run whose failures become warnings.

    Attributes:
        mode: online or offline; disabled if it could not start or has failed.
        first_step: when online, the server already has all steps below this one.
        folder: folder that W&B writes to; None if it could not start.
        url: the run's page, when online.
    """

    def __init__(
        self,
        mode: WandbMode,
        folder: Path,
        warn: Callable[[str], None],
        *,
        kept: str = "every row is in metrics.jsonl",
        **options: Any,
    ) -> None:
        """Start a W&B run, or resume one with the same id.

        Args:
            mode: with "disabled" the run does nothing.
            folder: the run folder; W&B's files go below it.
            warn: called with each warning.
            kept: for the warning: where the data can be found if W&B fails.
            **options: further arguments of `wandb.init`, including `id`.
        """
        self._warn = warn
        self._kept = kept
        self._data = folder.resolve()
        warnings: list[str] = []
        self._artifacts = True
        self._run, self.mode = None, mode
        if mode != "disabled":
            self._run, self.mode = start_wandb(mode, folder, warnings, resume="allow", **options)
        for warning in warnings:
            warn(warning)
        self.folder = Path(self._run.settings.sync_dir).resolve() if self._run else None
        is_online = self._run is not None and self.mode == "online"
        self.url = self._run.url if self._run and is_online else None
        self.first_step = int(self._run.starting_step) if self._run and is_online else 0

    @property
    def location(self) -> str | None:
        """The page of an online run, else its folder; None without a run."""
        return None if self.folder is None else self.url or str(self.folder)

    def log(
        self,
        step: int,
        row: Mapping[str, Any],
        images: Mapping[str, np.ndarray | Path] | None = None,
        panels: "Mapping[str, Panel] | None" = None,
    ) -> None:
        """Commit a row, without None values and without panels that W&B refuses."""
        content: dict[str, Any] = {key: value for key, value in row.items() if value is not None}

        def send(run: "Run") -> None:
            import wandb

            pictures = {
                name: wandb.Image(str(image) if isinstance(image, Path) else image)
                for name, image in (images or {}).items()
            }
            run.log(content | pictures, step=step, commit=not panels)

        self._guarded(f"at step {step}", send)
        if panels and self._run is not None:
            from mechcausal.records.panels import log_panels

            # W&B stages tables as artifacts: keep those files in the run folder.
            with wandb_session.environment("WANDB_DATA_DIR", str(self._data)):
                log_panels(self._run, step, panels, self._warn, tables=self._artifacts)
            self._guarded(f"at step {step}", lambda run: run.log({}, step=step, commit=True))

    def define_metric(self, name: str, **options: Any) -> None:
        """See `wandb.Run.define_metric`."""

        def send(run: "Run") -> None:
            run.define_metric(name, **options)

        self._guarded("at its start", send)

    def log_folder(self, folder: Path, *, name: str, kind: str, aliases: list[str]) -> None:
        """Log a folder as an artifact, staged inside the run folder.

        After a failure or a slow upload (no network), later artifacts are skipped.
        """
        if self._run is None or not self._artifacts:
            return
        import wandb

        start, problem = time.monotonic(), ""
        try:
            with wandb_session.environment("WANDB_DATA_DIR", str(self._data)):
                artifact = wandb.Artifact(name, type=kind)
                for path in sorted(folder.iterdir()):
                    artifact.add_file(str(path))
                self._run.log_artifact(artifact, aliases=aliases)
        except Exception as error:  # W&B may raise anything; the training continues
            problem = first_line(error)
        if not problem and time.monotonic() - start > _SLOW_ARTIFACT_SECONDS:
            problem = f"it took {time.monotonic() - start:.0f} s"
        if problem:
            self._artifacts = False
            self._warn(f"W&B did not take {folder}: {problem}; checkpoints stay in the run folder")

    def finish(self, summary: Mapping[str, Any], *, exit_code: int) -> None:
        """Close the run; if that takes too long, abandon it with a warning."""

        def close(run: "Run") -> None:
            run.summary.update(dict(summary))
            seconds = FINISH_SECONDS + PATIENCE_SECONDS
            wandb_session.finish_run(run, exit_code, seconds=seconds)

        self._guarded("at its end", close)

    def _guarded(self, when: str, action: "Callable[[Run], None]") -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # W&B may raise anything; the training continues
            self._fail(
                f"W&B failed {when}: {first_line(error)}; the run goes on without it, {self._kept}"
            )

    def _fail(self, message: str) -> None:
        run, self._run, self.mode = self._run, None, "disabled"
        if run is not None:
            wandb_session.abandon_run(run, patience=PATIENCE_SECONDS)
        self._warn(message)
