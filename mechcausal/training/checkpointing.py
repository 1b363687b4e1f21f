"""When checkpoints are taken, and which of them are kept."""

import torch

from mechcausal.records.run_folder import STEP
from mechcausal.records.tracking import RunRecord, writing
from mechcausal.training.album import Album
from mechcausal.training.checkpoints import (
    checkpoint_folder,
    checkpoint_folders,
    prune,
    write_checkpoint,
)
from mechcausal.training.experiments import Experiment, Generators

FORMATION_MOVE = 0.05
"""How far the induction score moves from one checkpoint of its formation to the next."""


class Checkpointer:
    """Takes the checkpoints of a run by the schedule of its recipe."""

    def __init__(
        self,
        record: RunRecord,
        album: Album,
        experiment: Experiment,
        generators: Generators,
        *,
        start: int,
    ) -> None:
        """Begin, with the checkpoints that a resumed run has already.

        Args:
            record: of the run.
            album: its rows say which checkpoint is the best, and where the head forms.
            experiment: holds the weights.
            generators: all that the run draws from.
            start: first step; its checkpoint is there already.
        """
        self._record = record
        self._album = album
        self._experiment = experiment
        self._generators = generators
        self._start = start
        self._section = experiment.recipe.checkpoints
        self._saved: int | None = None
        self._kept: set[int] = set()
        self._kept_score = 0.0
        score = None
        for row in album.history:
            self._keep_if_added(int(row[STEP] or 0), score)
            score = row.get("induction/score")
        if start:
            self._keep_if_added(start, score)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be taken before this step."""
        section = self._section
        if section.schedule == "none" or (step == self._start and step > 0):
            return False
        if step == self._album.last_step or (step > 0 and step % section.every == 0):
            return True
        return self._is_added(step, self._album.latest.get("induction/score"))

    def save(self, step: int, stage: str, optimizer: torch.optim.Optimizer) -> None:
        """Take a checkpoint, after the rows before it are safe on the disk.

        Raises:
            RecordError: it cannot be written; the one before is left.
        """
        if self._section.schedule == "none":
            return
        self._record.sync()
        folder = checkpoint_folder(self._record.folder, step)
        with writing(folder):
            write_checkpoint(
                folder,
                step=step,
                stage=stage,
                experiment=self._experiment,
                optimizer=optimizer,
                generators=self._generators,
            )
        self._keep_if_added(step, self._album.latest.get("induction/score"))
        self._saved = step

    def publish(self, step: int) -> None:
        """After the row of a checkpoint's step: log it to W&B, and delete what is not kept."""
        if self._saved != step:
            return
        self._saved = None
        run = self._record.folder
        best = self._album.lowest_loss(set(checkpoint_folders(run)))
        if self._section.artifacts:
            aliases = ["latest", f"step-{step}"] + (["best"] if best == step else [])
            self._record.log_checkpoint(checkpoint_folder(run, step), aliases)
        kept = self._kept if best is None else self._kept | {best}
        prune(run, keep=self._section.keep, kept=kept)

    def _is_added(self, step: int, score: float | None) -> bool:
        """Whether the schedule wants a checkpoint at this probe step beside the regular ones.

        Args:
            step: of the checkpoint.
            score: induction score of the last look before it.
        """
        if self._section.schedule not in ("formation", "probes") or step not in self._album.steps:
            return False
        if self._section.schedule == "probes":
            return True
        # A score may rest between the bounds for most of a run: nothing forms then.
        return (
            score is not None
            and 0.1 < score < 0.9
            and abs(score - self._kept_score) >= FORMATION_MOVE
        )

    def _keep_if_added(self, step: int, score: float | None) -> None:
        if self._is_added(step, score):
            self._kept.add(step)
            self._kept_score = score or 0.0
