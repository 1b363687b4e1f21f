"""When a run saves checkpoints, and which of them it keeps."""

import torch

from mechcausal.measures.figures import STEP
from mechcausal.records.tracking import RunRecord, writing
from mechcausal.training.checkpoints import (
    checkpoint_folder,
    checkpoint_folders,
    prune,
    write_checkpoint,
)
from mechcausal.training.experiments import Experiment, Generators, RunClamp
from mechcausal.training.probe_log import ProbeLog

FORMATION_MOVE = 0.05
"""While the induction head forms: change of its score from one checkpoint to the next."""


class Checkpointer:
    """Saves the checkpoints of a run on the recipe's schedule."""

    def __init__(
        self,
        record: RunRecord,
        probe_log: ProbeLog,
        experiment: Experiment,
        generators: Generators,
        clamp: RunClamp,
        *,
        start: int,
    ) -> None:
        """Start from the checkpoints that a resumed run already has.

        Args:
            record: the run's record.
            probe_log: its rows say which checkpoint is best, and when the induction head forms.
            experiment: holds the weights.
            generators: the run's random generators.
            clamp: the run's clamp, whose frozen pattern is saved.
            start: first step to train; above 0, its checkpoint already exists.
        """
        self._record = record
        self._probe_log = probe_log
        self._experiment = experiment
        self._generators = generators
        self._clamp = clamp
        self._start = start
        self._section = experiment.recipe.checkpoints
        self._saved: int | None = None
        self._kept: set[int] = set()
        self._kept_score = 0.0
        score = None
        for row in probe_log.history:
            self._keep_if_added(int(row[STEP] or 0), score)
            score = row.get("induction/score")
        if start:
            self._keep_if_added(start, score)

    def is_due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint before this step."""
        section = self._section
        if section.schedule == "none" or (step == self._start and step > 0):
            return False
        if step == self._probe_log.last_step or (step > 0 and step % section.every == 0):
            return True
        return self._is_added(step, self._probe_log.latest.get("induction/score"))

    def save(self, step: int, stage: str, optimizer: torch.optim.Optimizer) -> None:
        """Save a checkpoint, once all earlier rows are on the disk.

        Raises:
            RecordError: it cannot be written; earlier checkpoints are untouched.
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
                clamp=self._clamp.state(),
            )
        self._keep_if_added(step, self._probe_log.latest.get("induction/score"))
        self._saved = step

    def publish(self, step: int) -> None:
        """Log the step's checkpoint to W&B and delete old ones; call it after the step's row."""
        if self._saved != step:
            return
        self._saved = None
        run = self._record.folder
        best = self._probe_log.lowest_loss(set(checkpoint_folders(run)))
        if self._section.artifacts:
            aliases = ["latest", f"step-{step}"] + (["best"] if best == step else [])
            self._record.log_checkpoint(checkpoint_folder(run, step), aliases)
        kept = self._kept if best is None else self._kept | {best}
        prune(run, keep=self._section.keep, kept=kept)

    def _is_added(self, step: int, score: float | None) -> bool:
        """Whether the schedule adds a checkpoint at this step to the regular ones.

        Args:
            step: step of the checkpoint.
            score: induction score of the last probe step before it.
        """
        if (
            self._section.schedule not in ("formation", "probes")
            or step not in self._probe_log.steps
        ):
            return False
        if self._section.schedule == "probes":
            return True
        # A score that stays between the bounds without moving is no formation.
        return (
            score is not None
            and 0.1 < score < 0.9
            and abs(score - self._kept_score) >= FORMATION_MOVE
        )

    def _keep_if_added(self, step: int, score: float | None) -> None:
        if self._is_added(step, score):
            self._kept.add(step)
            self._kept_score = score or 0.0
