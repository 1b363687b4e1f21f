"""W&B runs that never stand in the way: opened, fed, finished.

W&B offline loses rows without a word when the disk is full or the folder not writable, and up to a
second of them when the process is killed. So its folder is checked to be where it was asked to be,
its rows are counted, and whatever it raises becomes a warning while the run goes on.
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

    from mechcausal.pictures.wandb_panels import Panel

MODES: tuple[WandbMode, ...] = ("online", "offline", "disabled")
FINISH_SECONDS = 30
"""How long finishing may take before a run ends without it."""
PATIENCE_SECONDS = 10
"""How long W&B may take beyond its own limit, before its service is ended."""
_SLOW_ARTIFACT_SECONDS = 5.0
_LEAN: Mapping[str, Any] = {
    "disable_git": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


class TrackingError(ValueError):
    """A W&B setting that cannot be used; the message is one line for the user."""


def resolve_mode(requested: WandbMode | None) -> WandbMode:
    """W&B mode: as requested, else WANDB_MODE, else as W&B is set up, else online with a key.

    W&B is set up by its settings files and by `wandb.setup`: for a server, whose key counts, and
    possibly for a mode, as `wandb offline` does. Without a key the mode is offline.

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
    try:
        settings = wandb_session.settings()
        if settings is not None and settings.mode in ("offline", "disabled"):  # not the default
            return settings.mode
        return "online" if wandb_session.has_key(settings) else "offline"
    except Exception:  # settings that W&B refuses, as it will say when the run starts
        return "offline"


def load_wandb() -> None:
    """Import W&B with all that its first run imports; before TransformerLens where that can be.

    In Pythons before 3.13 W&B's classes search every loaded module for their docstrings: more than
    a second where there are thousands of modules, a fifth of that otherwise.
    """
    import wandb.apis.public  # noqa: F401


def start_wandb(
    mode: WandbMode, folder: Path, warnings: list[str], *, lean: bool = False, **options: Any
) -> "tuple[Run | None, WandbMode]":
    """Start a W&B run in a folder: offline where online cannot be had, none where neither can.

    Nothing on the terminal, rows on disk within a second, no long wait for a silent network.

    Args:
        mode: online or offline.
        folder: W&B's files go below it.
        warnings: what went wrong is added here.
        lean: say nothing of the machine, the packages and the repository.
        **options: further arguments of `wandb.init`.

    Returns:
        The run and its mode, `None` and "disabled" without one.
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
    # Absolute: W&B's service may have been started in another folder.
    folder = folder.resolve()
    # Offline twice: an id may still count as in use by a process that was killed a moment ago.
    attempts: list[WandbMode] = ["offline", "offline"]
    if mode == "online":
        attempts.insert(0, "online")
    said: list[str] = []
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
        except Exception as error:  # whatever W&B raises, the training goes on
            said.append(f"W&B could not start {attempt}: {first_line(error)}")
            continue
        warnings += [line for line in said if not line.startswith("W&B could not start offline")]
        actual = Path(run.settings.sync_dir).resolve()
        if not actual.is_relative_to(folder):
            warnings.append(f"W&B writes to {actual}, not into the run folder")
        return run, attempt
    warnings += dict.fromkeys(said)
    return None, "disabled"


class WandbRun:
    """A W&B run that turns into a warning when it fails.

    Attributes:
        mode: online or offline; disabled once it has failed or could not start.
        first_step: when online, steps below this one are with the server already.
        folder: where W&B writes; None when it could not start.
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
        """Start, or resume a run of the same id.

        Args:
            mode: online or offline.
            folder: the run folder; W&B's files go below it.
            warn: told what goes wrong.
            kept: where the same can be read when it has failed.
            **options: further arguments of `wandb.init`, its id among them.
        """
        self._warn = warn
        self._kept = kept
        self._data = folder.resolve()
        warnings: list[str] = []
        self._artifacts = True
        self._run, self.mode = start_wandb(mode, folder, warnings, resume="allow", **options)
        for warning in warnings:
            warn(warning)
        self.folder = Path(self._run.settings.sync_dir).resolve() if self._run else None
        is_online = self._run is not None and self.mode == "online"
        self.url = self._run.url if self._run and is_online else None
        self.first_step = int(self._run.starting_step) if self._run and is_online else 0

    def log(
        self,
        step: int,
        row: Mapping[str, Any],
        images: Mapping[str, np.ndarray | Path] | None = None,
        panels: "Mapping[str, Panel] | None" = None,
    ) -> None:
        """Commit a row; None values, and panels that W&B does not take, are left out."""
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
            from mechcausal.pictures.wandb_panels import log_panels

            # Tables become artifacts.
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

        Where that fails, or takes long because the network is gone, no other one is tried.
        """
        if self._run is None or not self._artifacts:
            return
        import wandb

        began, problem = time.monotonic(), ""
        try:
            with wandb_session.environment("WANDB_DATA_DIR", str(self._data)):
                artifact = wandb.Artifact(name, type=kind)
                for path in sorted(folder.iterdir()):
                    artifact.add_file(str(path))
                self._run.log_artifact(artifact, aliases=aliases)
        except Exception as error:  # whatever W&B raises, the training goes on
            problem = first_line(error)
        if not problem and time.monotonic() - began > _SLOW_ARTIFACT_SECONDS:
            problem = f"it took {time.monotonic() - began:.0f} s"
        if problem:
            self._artifacts = False
            self._warn(f"W&B did not take {folder}: {problem}; checkpoints stay in the run folder")

    def finish(self, summary: Mapping[str, Any], *, exit_code: int) -> None:
        """Close the run; give up on it, with a warning, when that takes too long."""

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
        except Exception as error:  # whatever W&B raises, the training goes on
            self._fail(
                f"W&B failed {when}: {first_line(error)}; the run goes on without it, {self._kept}"
            )

    def _fail(self, message: str) -> None:
        run, self._run, self.mode = self._run, None, "disabled"
        if run is not None:
            wandb_session.abandon_run(run, patience=PATIENCE_SECONDS)
        self._warn(message)
