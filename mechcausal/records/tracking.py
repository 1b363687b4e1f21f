"""The record of a run: a W&B run, and plain files as a safeguard when W&B loses rows."""

import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mechcausal.measures.figures import STEP, Value
from mechcausal.recipes import Recipe, WandbMode, recipe_to_dict
from mechcausal.records.run_folder import (
    METRICS_FILE,
    PROCESS_FILE,
    SUMMARY_FILE,
    State,
    finite,
    read_metrics,
    read_process,
    write_process,
    write_summary,
)
from mechcausal.records.wandb_fragments import (
    fragments,
    settle,
    steps_when_written,
    sync_command,
    wandb_steps,
)
from mechcausal.records.wandb_runs import WandbRun
from mechcausal.support.files import JsonLines
from mechcausal.support.messages import shell_command
from mechcausal.support.nested import flat

if TYPE_CHECKING:
    from mechcausal.records.panels import Panel

COUNT_SECONDS = 6
"""At the end of a run: how long to wait for W&B to write its last rows."""


class RecordError(OSError):
    """The run folder can no longer be written; the message is one line for the user."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into a RecordError that names the file."""
    try:
        yield
    except RecordError:
        raise
    except OSError as error:
        raise RecordError(f"{path}: cannot be written: {error.strerror or error}") from None


class RunRecord:
    """Writes the files and the W&B run of one training run: open, log rows, finish.

    Attributes:
        folder: the run folder.
        mode: resolved W&B mode; falls back to offline if online cannot start.
        warnings: problems with recording, for the user.
        rows: number of rows in metrics.jsonl.
        lean: whether the run started as a lean one, in a batch.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        mode: WandbMode,
        *,
        rows: Sequence[Mapping[str, Value]] = (),
        environment: Mapping[str, Any] | None = None,
        on_warning: Callable[[str], None] | None = None,
        lean: bool = False,
    ) -> None:
        """Open metrics.jsonl and the W&B run.

        Args:
            folder: the run folder.
            recipe: becomes the config of the W&B run.
            mode: W&B mode.
            rows: rows already in metrics.jsonl when a run is resumed. Rows that W&B lost when the
                process was killed are logged again.
            environment: versions and device, kept in run.json.
            on_warning: called with each warning.
            lean: for one of very many runs: W&B is opened only at the end and receives only the
                rows, without information about the machine, which is about ten times faster.

        Raises:
            RecordError: not writable.
        """
        self.folder = folder
        self.warnings: list[str] = []
        self._on_warning = on_warning
        process = read_process(folder)
        stored_id = str(process.get("wandb_id") or "")
        self._id = stored_id if re.fullmatch(r"[\w-]{1,120}", stored_id) else _run_id(folder)
        self._values: dict[str, Any] = {
            **process,
            "wandb_id": self._id,
            "recipe": recipe_to_dict(recipe),
            "environment": dict(environment or {}),
        }
        self.lean = lean or process.get("lean") is True
        if self.lean:
            self._values["lean"] = True
        self._wandb: WandbRun | None = None
        self._in_wandb: set[int] = set()
        # W&B accepts nothing for a step after its row is committed. The last row therefore waits
        # for the panels, which are drawn from the complete record.
        self._last_step = recipe.n_steps
        self._send_last_row: Callable[[Mapping[str, Panel]], None] | None = None
        with writing(folder / METRICS_FILE):
            self._metrics = JsonLines(folder / METRICS_FILE)
        self.rows = len(rows)
        self._open_at_end = None
        try:
            with writing(folder / PROCESS_FILE):
                write_process(folder, self._values)
            if mode != "disabled" and not lean:
                self._open_wandb(recipe, mode, rows)
        except BaseException:
            self.finish({}, "failed")
            raise
        self._open_at_end = (recipe, mode) if lean and mode != "disabled" else None

    @property
    def mode(self) -> WandbMode:
        """W&B mode; disabled once W&B has failed."""
        return self._wandb.mode if self._wandb else "disabled"

    @property
    def wandb_folder(self) -> Path | None:
        """Folder of this fragment of the W&B run; None when disabled."""
        return self._wandb.folder if self._wandb else None

    @property
    def url(self) -> str | None:
        """Page of the W&B run; None unless online."""
        return self._wandb.url if self._wandb else None

    def warn(self, message: str) -> None:
        """Store a warning and pass it to `on_warning`."""
        self.warnings.append(message)
        if self._on_warning is not None:
            self._on_warning(message)

    def log(
        self,
        step: int,
        metrics: Mapping[str, Value],
        images: Mapping[str, np.ndarray | Path] | None = None,
    ) -> None:
        """Write one row to metrics.jsonl, then commit it to W&B.

        Args:
            step: training step; must increase from row to row.
            metrics: numbers by name; None and non-finite values are null in the file and left out
                of the W&B row.
            images: pictures for the W&B row, as uint8 arrays [height, width, 3] or PNG files.

        Raises:
            RecordError: the file cannot be written; it does not contain the row.
        """
        row = table_row(step, metrics)
        with writing(self.folder / METRICS_FILE):
            self._metrics.append(row)
        self.rows += 1
        self._to_wandb(step, row, images)

    def log_checkpoint(self, folder: Path, aliases: list[str]) -> None:
        """Log a checkpoint as a W&B artifact."""
        if self._wandb is not None:
            name = f"checkpoint-{self._id}"
            self._wandb.log_folder(folder, name=name, kind="model", aliases=aliases)

    def sync(self) -> None:
        """Wait until all rows are on the disk.

        Raises:
            RecordError: they cannot be written.
        """
        with writing(self.folder / METRICS_FILE):
            self._metrics.sync()

    def closing(self, summary: Mapping[str, Any], state: State) -> dict[str, Any]:
        """The content of summary.json if the run ended now."""
        return {**summary, "state": state, "rows": self.rows, "warnings": list(self.warnings)}

    def finish(
        self,
        summary: Mapping[str, Any],
        state: State,
        panels: "Mapping[str, Panel] | None" = None,
    ) -> None:
        """Close the W&B run, check that no row was lost, and write summary.json.

        Never raises for a file that cannot be written, but warns: it also runs after a failure.

        Args:
            summary: results of the run.
            state: how the run ended.
            panels: panels for the last W&B row.
        """
        try:
            self.sync()
        except RecordError as error:
            self.warn(str(error))
        self._metrics.close()
        if self._open_at_end is not None:
            try:
                self._open_wandb(*self._open_at_end, read_metrics(self.folder), lean=True)
            except (OSError, ValueError) as error:
                self.warn(f"the run is recorded in metrics.jsonl alone: {error}")
        if self._send_last_row is not None:
            self._send_last_row(panels or {})
        if self._wandb is not None:
            self._wandb.finish(
                flat({**summary, "state": state}, "/"), exit_code=0 if state == "finished" else 1
            )
            self._compare_rows()
        try:
            with writing(self.folder / SUMMARY_FILE):
                write_summary(self.folder, self.closing(summary, state))
        except RecordError as error:
            self.warn(str(error))

    def _open_wandb(
        self,
        recipe: Recipe,
        mode: WandbMode,
        rows: Sequence[Mapping[str, Value]],
        *,
        lean: bool = False,
    ) -> None:
        """Start W&B and log the rows that it does not have yet."""
        old_fragments = fragments(self.folder, self._id)
        self._start_wandb(recipe, mode, lean=lean)
        assert self._wandb is not None
        if self._wandb.mode == "online":  # the server knows which rows it has
            first = self._wandb.first_step
            self._in_wandb = {step for row in rows if (step := int(row[STEP] or 0)) < first}
        else:
            for fragment in old_fragments:
                settle(fragment)
                self._in_wandb.update(wandb_steps(fragment) or ())
        for row in rows:
            self._to_wandb(int(row[STEP] or 0), row)

    def _start_wandb(self, recipe: Recipe, mode: WandbMode, *, lean: bool) -> None:
        kind = recipe.task.kind
        data = recipe.graph.preset if kind == "causal_graph" else kind
        run = self._wandb = WandbRun(
            mode,
            self.folder,
            self.warn,
            id=self._id,
            name=self.folder.resolve().name,
            project=recipe.wandb.project,
            entity=recipe.wandb.entity,
            group=recipe.wandb.group or recipe.name,
            tags=[*recipe.wandb.tags, data, recipe.model.kind],
            config=recipe_to_dict(recipe),
            allow_val_change=True,
            lean=lean,
        )
        if run.folder is None:
            self.warn("the run is recorded in metrics.jsonl alone")
            return
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        paths = [path.relative_to(self.folder) for path in fragments(self.folder, self._id)]
        self._values["fragments"] = [str(path) for path in paths]
        self._values["sync"] = [shell_command(*sync_command(path)) for path in paths]
        with writing(self.folder / PROCESS_FILE):
            write_process(self.folder, self._values)

    def _to_wandb(
        self,
        step: int,
        row: Mapping[str, Value],
        images: Mapping[str, np.ndarray | Path] | None = None,
    ) -> None:
        if self._wandb is None or step in self._in_wandb:
            return
        self._in_wandb.add(step)
        send = partial(self._wandb.log, step, row, images)
        if step == self._last_step:
            self._send_last_row = send
        else:
            send({})

    def _compare_rows(self) -> None:
        assert self._wandb is not None
        if self._wandb.folder is None:
            return
        newest, first_step = self._wandb.folder, self._wandb.first_step
        is_online = not newest.name.startswith("offline-")
        folders = {newest} | (set() if is_online else {*fragments(self.folder.resolve(), self._id)})
        # Once W&B has failed, no more rows arrive: do not wait.
        seconds = COUNT_SECONDS if self.mode != "disabled" else 0
        # Steps before the first one of an online fragment are on the server.
        logged = Counter(step for step in self._in_wandb if step < first_step)
        steps_by_folder = steps_when_written(folders, self.rows - len(logged), seconds=seconds)
        if steps_by_folder[newest] is None:
            self.warn(f"the rows of the W&B run in {newest} could not be counted")
            return
        for steps in steps_by_folder.values():
            logged.update(steps or ())
        if len(logged) < self.rows:
            self.warn(
                f"W&B kept {len(logged)} of {self.rows} rows in {newest}; "
                f"all of them are in {self.folder / METRICS_FILE}"
            )
        repeated = sorted(step for step, count in logged.items() if count > 1)
        if repeated:
            listed = ", ".join(map(str, repeated[:10])) + (", ..." if len(repeated) > 10 else "")
            self.warn(f"W&B has these steps in more than one fragment: {listed}")


def table_row(step: int, metrics: Mapping[str, Value]) -> dict[str, Value]:
    """A row of metrics.jsonl; None replaces values that are not finite."""
    return {STEP: step} | {key: finite(value) for key, value in metrics.items()}


def _run_id(folder: Path) -> str:
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in folder.resolve().name)[:100]
    return f"{name}-{secrets.token_hex(2)}"
