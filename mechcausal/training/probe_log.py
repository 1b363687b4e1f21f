"""Observe the model at every probe step, write a row of figures, keep matrices for the pictures."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from mechcausal.measures.figures import STEP, Value
from mechcausal.records.matrices import find_matrices
from mechcausal.records.run_folder import MATRICES_FILE, MATRICES_FOLDER
from mechcausal.records.tracking import RecordError, RunRecord, table_row, writing
from mechcausal.support.files import write_atomically
from mechcausal.support.messages import first_line
from mechcausal.training.experiments import Experiment

FORMATION_THRESHOLD = 0.5


class ProbeLog:
    """Observes a model at its probe steps, writes a row for each, and keeps matrices.

    Attributes:
        history: a row of figures for every probe step so far.
        latest: figures of the last row.
        latest_matrices: matrices of the last probe step; after a resume, the last ones on disk.
        steps: the probe steps.
        last_step: the last probe step.
    """

    def __init__(
        self,
        record: RunRecord,
        experiment: Experiment,
        *,
        steps: list[int],
        stage_starts: list[int],
        start: int = 0,
        rows: Sequence[dict[str, Value]] = (),
        lean: bool = False,
    ) -> None:
        """Prepare the log; `open` is the first call that writes.

        Args:
            record: receives the rows.
            experiment: the model, its data and its probes.
            steps: the probe steps, in order.
            stage_starts: first step of every stage.
            start: first step to train; above 0 when the run is resumed.
            rows: rows already in metrics.jsonl. Those from `start` on are computed again and
                compared with the old ones, but not written twice.
            lean: draw no pictures, and do not wait until matrices are on the disk.
        """
        self._record = record
        self._lean = lean
        self._experiment = experiment
        self._probing = experiment.recipe.probing
        self._stage_starts = stage_starts
        self.steps = frozenset(steps)
        self.last_step = steps[-1]
        self._image_steps = _spread(steps, max(self._probing.images, 2))
        # The graph forms in the first steps: keep those whatever the number of frames.
        self._kept_steps = (
            _spread(steps, max(self._probing.frames, 2))
            | self._image_steps
            | set(steps[: self._probing.dense])
        )
        self._folder = record.folder / MATRICES_FOLDER
        self.history: list[dict[str, Value]] = [row for row in rows if int(row[STEP] or 0) < start]
        self._on_disk = {row[STEP]: row for row in rows if int(row[STEP] or 0) >= start}
        self.latest: dict[str, Value] = self.history[-1] if self.history else {}
        formed = (row.get("induction/formation_step") for row in self.history)
        self._formation_step = next((step for step in formed if step is not None), None)
        self._matrices: dict[int, dict[str, Tensor]] = {}
        if start:
            frames = _kept_frames(record.folder, record.warn)
            self._matrices = {step: frames[step] for step in frames if step < start}
        self.latest_matrices: dict[str, Tensor] = self._matrices.get(
            max(self._matrices, default=0), {}
        )

    def open(self) -> None:
        """Write the reference matrices, so that an unfinished run can be drawn.

        Raises:
            RecordError: they cannot be written.
        """
        if self._probing.enabled:
            self._write("references", self._experiment.reference_matrices())

    def add(self, step: int, train_loss: float) -> None:
        """Observe the model at a probe step and write its row.

        Raises:
            RecordError: the row or the matrices cannot be written.
        """
        figures: dict[str, Value] = {"loss/train": train_loss}
        images: dict[str, np.ndarray | Path] = {}
        if self._probing.enabled:
            observation = self._experiment.observe()
            self.latest_matrices = observation.matrices
            figures |= observation.figures
            score = observation.figures.get("induction/score")
            if score is not None:
                if self._formation_step is None and score >= FORMATION_THRESHOLD:
                    self._formation_step = step
                figures["induction/formation_step"] = self._formation_step
            if step in self._kept_steps:
                self._keep(step, observation.matrices)
            if step in self._image_steps and not self._lean:
                images |= self._experiment.heatmaps(observation.matrices)
        else:
            figures |= self._experiment.losses()
        self.latest = figures
        self.history.append({STEP: step} | figures)
        if step == self.last_step:
            images |= self._draw()
        if step not in self._on_disk:
            self._record.log(step, figures, images)
        elif not self._is_on_disk(table_row(step, figures)):
            self._record.warn(
                f"the row of step {step} came out differently when it was computed again; "
                "the first one is kept"
            )

    def lowest_loss(self, steps: set[int]) -> int | None:
        """The step with the lowest evaluation loss; None if no row has one of these steps."""
        losses = {
            int(row[STEP] or 0): loss
            for row in self.history
            if row[STEP] in steps and (loss := row.get("loss/eval")) is not None
        }
        return min(losses, key=lambda step: losses[step], default=None)

    def close(self) -> None:
        """Merge all matrices of a finished run into one file, with the reference matrices.

        Keys are `<step>/<name>`. The files of single steps are deleted.

        Raises:
            RecordError: it cannot be written.
        """
        tensors = self._experiment.reference_matrices() | {
            f"{step:08d}/{name}": matrix
            for step, matrices in self._matrices.items()
            for name, matrix in matrices.items()
        }
        path = self._record.folder / MATRICES_FILE
        with writing(path):
            write_atomically(path, save(_contiguous(tensors)))
        shutil.rmtree(self._folder, ignore_errors=True)

    def summary(self) -> dict[str, Any]:
        """Figures of the last row, the experiment's conclusions, and the first row as "first"."""
        if not self.history:
            return {}
        conclusions = self._experiment.conclusions(self.history)
        return {**self.history[-1], **conclusions, "first": dict(self.history[0])}

    def _keep(self, step: int, matrices: dict[str, Tensor]) -> None:
        self._write(f"{step:08d}", matrices)
        self._matrices[step] = matrices

    def _write(self, name: str, matrices: Mapping[str, Tensor]) -> None:
        path = self._folder / f"{name}.safetensors"
        with writing(path):
            self._folder.mkdir(exist_ok=True)
            write_atomically(path, save(_contiguous(matrices)), durable=not self._lean)

    def _is_on_disk(self, row: Mapping[str, Value]) -> bool:
        """Whether the row on disk equals this one; up to rounding if a batch wrote it."""
        old_row = self._on_disk[row[STEP]]
        if not self._record.lean:
            return old_row == row
        return old_row.keys() == row.keys() and all(
            (value is None) == (row[name] is None)
            and math.isclose(value or 0.0, row[name] or 0.0, rel_tol=1e-5, abs_tol=1e-5)
            for name, value in old_row.items()
        )

    def _draw(self) -> dict[str, Path]:
        if self._lean or not self._matrices:
            return {}
        try:
            with writing(self._record.folder / "figures"):
                return self._experiment.draw_figures(
                    self._record.folder / "figures",
                    history=self.history,
                    matrices=self._matrices,
                    stage_starts=self._stage_starts,
                )
        except RecordError:
            raise
        except Exception as error:  # a failed picture must not fail a finished run
            self._record.warn(f"figures: not drawn: {type(error).__name__}: {first_line(error)}")
            return {}


def _kept_frames(run: Path, warn: Callable[[str], None]) -> dict[int, dict[str, Tensor]]:
    """The kept matrices of a run, finished or not; files that cannot be read become warnings."""
    frames, _, notes = find_matrices(run, lenient=True)
    for note in notes:
        warn(note)
    return {
        step: {name: torch.from_numpy(matrix) for name, matrix in matrices.items()}
        for step, matrices in frames.items()
    }


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _spread(steps: list[int], count: int) -> set[int]:
    """`count` evenly spread steps, always with the first and the last."""
    picked = np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int)
    return {steps[i] for i in picked}
