"""The series of checkpoints that a name or a folder stands for."""

from pathlib import Path

from mechcausal.records.run_folder import RECIPE_FILE
from mechcausal.studies.formation.hub_series import HubSeries
from mechcausal.studies.formation.local_series import FolderSeries, RunSeries
from mechcausal.studies.formation.series import Series
from mechcausal.studies.hugging_face import TargetError
from mechcausal.support.messages import excerpt


def open_series(target: str, *, scratch: Path, keep: bool = False) -> Series:
    """The series of checkpoints that a target names.

    Args:
        target: a run folder, a folder of checkpoints, or the name of a model on the Hub.
        scratch: downloads go here, one at a time, and are deleted after use.
        keep: download into the Hugging Face cache instead, and delete nothing.

    Raises:
        TargetError: there is no such folder.
    """
    path = Path(target)
    try:
        if path.is_file():
            raise TargetError(f"{target}: a file; give a run, a folder of checkpoints, or a name")
        is_run, is_folder = (path / RECIPE_FILE).is_file(), path.is_dir()
    except (OSError, ValueError) as error:
        raise TargetError(f"{excerpt(target)}: not a name of a model or folder: {error}") from None
    if is_run:
        return RunSeries(path)
    if is_folder:
        return FolderSeries(path)
    if target.count("/") > 1 or target.startswith((".", "/", "~")):
        raise TargetError(f"{target}: no such folder")
    return HubSeries(target, scratch=scratch, keep=keep)
