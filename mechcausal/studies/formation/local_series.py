"""Checkpoints on the disk: a folder of them, or those of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mechcausal.measures.figures import STEP
from mechcausal.models import CONFIG_FILE
from mechcausal.records.run_folder import MODEL_FOLDER, has_finished, read_metrics
from mechcausal.studies.formation.series import Opened, Revision, Series, in_order, step_of
from mechcausal.studies.hugging_face import TargetError
from mechcausal.studies.targets import Target, load_folder, load_target
from mechcausal.training.checkpoints import CheckpointError, checkpoint_folders, read_checkpoint


class FolderSeries(Series):
    """A folder whose subfolders are checkpoints, named by their step."""

    kind = "folder"

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder

    def revisions(self) -> list[Revision]:
        """See `Series`."""
        try:
            subfolders = sorted(path for path in self._folder.iterdir() if path.is_dir())
        except OSError as error:
            raise TargetError(f"{self._folder}: {error.strerror or error}") from None
        named = [
            Revision(path.name, step)
            for path in subfolders
            if (path / CONFIG_FILE).is_file() and (step := step_of(path.name)) is not None
        ]
        if not named:
            raise TargetError(
                f"{self._folder}: neither a run nor a folder of checkpoints: no subfolder with a "
                f"{CONFIG_FILE} is named by its step (step1000, checkpoint-500, 200)"
            )
        return in_order(named, self.model)

    @contextmanager
    def open(self, revision: Revision) -> Iterator[Opened]:
        """See `Series`."""
        yield Opened.of(self._folder / revision.name)

    def load(self, revision: Revision, opened: Opened, device: str) -> Target:
        """See `Series`."""
        return load_folder(opened.folder, name=str(opened.folder), device=device)


class RunSeries(Series):
    """The checkpoints of a run of ours, and its final weights if no checkpoint has them."""

    kind = "run"

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder

    def revisions(self) -> list[Revision]:
        """See `Series`."""
        losses: dict[int, float | None] = {}
        try:
            rows = read_metrics(self._folder)
            losses = {int(row[STEP] or 0): row.get("loss/eval") for row in rows}
        except (OSError, ValueError):
            rows = []  # the losses are beside the point
        steps = list(checkpoint_folders(self._folder))
        revisions = [Revision(f"step-{step}", step, loss=losses.get(step)) for step in steps]
        if rows and has_finished(self._folder) and max(losses) not in steps:
            last = max(losses)
            revisions.append(Revision(MODEL_FOLDER, last, loss=losses[last]))
        if not revisions:
            raise TargetError(
                f'{self._folder}: holds no checkpoints: train with checkpoints.schedule = "probes"'
            )
        return revisions

    @contextmanager
    def open(self, revision: Revision) -> Iterator[Opened]:
        """See `Series`."""
        folder = self.folder_of(revision)
        if revision.name != MODEL_FOLDER:
            try:
                checkpoint = read_checkpoint(folder)  # verifies every checksum
            except CheckpointError as error:
                raise TargetError(str(error)) from None
            if checkpoint.step != revision.step:
                raise TargetError(f"{folder}: holds the checkpoint of step {checkpoint.step}")
        yield Opened.of(folder)

    def folder_of(self, revision: Revision) -> Path:
        """The folder of a checkpoint, or of the final weights.

        Raises:
            TargetError: the checkpoint is gone.
        """
        if revision.name == MODEL_FOLDER:
            return self._folder / MODEL_FOLDER
        folder = checkpoint_folders(self._folder).get(revision.step)
        if folder is None:
            raise TargetError(f"{self._folder}: the checkpoint at step {revision.step} is gone")
        return folder

    def load(self, revision: Revision, opened: Opened, device: str) -> Target:
        """See `Series`."""
        step = None if revision.name == MODEL_FOLDER else revision.step
        return load_target(str(self._folder), step=step, device=device)
