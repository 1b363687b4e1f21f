"""What a worker does with a member: train it, resume it, or skip it if it has finished."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechcausal.recipes import Recipe, WandbMode, parse_recipe
from mechcausal.records.run_folder import RECIPE_FILE, has_finished, is_held
from mechcausal.support.signals import StopSignal
from mechcausal.sweeps.archive import pack, unpack
from mechcausal.sweeps.outcome import Outcome, one_line

POLL_SECONDS = 0.2
"""How often a member checks whether it must stop."""
LEAN = {
    "WANDB_X_DISABLE_STATS": "true",
    "WANDB_X_DISABLE_MACHINE_INFO": "true",
    "WANDB_X_SAVE_REQUIREMENTS": "false",
    "WANDB_DISABLE_GIT": "true",
}
"""Environment variables that make a member's W&B run start fast; the user's own values win."""


@dataclass(frozen=True)
class Job:
    """The members that one worker trains, several as one batch, as plain data.

    Attributes:
        recipes: one per member.
        folders: one run folder per member.
        wandb_mode: overrides the recipes' W&B mode.
        archives: the packed folder of each member, empty if it has not started; the worker then
            sends the folders back. None if the worker writes to `folders` itself.
    """

    recipes: Sequence[Mapping[str, Any]]
    folders: Sequence[str]
    wandb_mode: WandbMode | None = None
    archives: Sequence[bytes] | None = None


@dataclass(frozen=True)
class Done:
    """The result of a job.

    Attributes:
        outcomes: one per member.
        archives: one packed folder per member, if the job asks for them.
    """

    outcomes: Sequence[Outcome]
    archives: Sequence[bytes] | None = None


class PolledStop(StopSignal):
    """A request to stop that comes from a function, called a few times a second."""

    _received: signal.Signals | None = None

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        """Call the function when `received` is read."""
        self._should_stop = should_stop
        self._last_call = -POLL_SECONDS
        super().__init__()

    @property
    def received(self) -> signal.Signals | None:
        """SIGINT once the function has returned True, or the signal that arrived before."""
        if self._received is None and time.monotonic() - self._last_call >= POLL_SECONDS:
            self._last_call = time.monotonic()
            if self._should_stop():
                self._received = signal.SIGINT
        return self._received

    @received.setter
    def received(self, value: signal.Signals | None) -> None:
        self._received = value


def run_job(job: Job, should_stop: Callable[[], bool]) -> Done:
    """Run the members of a job; a member's error becomes its outcome."""
    for name, value in LEAN.items():
        os.environ.setdefault(name, value)
    if job.archives is None:
        return Done(_run(job, job.folders, should_stop))
    with tempfile.TemporaryDirectory(prefix="mechcausal-") as scratch:
        folders = [str(Path(scratch) / Path(folder).name) for folder in job.folders]
        for folder, archive in zip(folders, job.archives, strict=True):
            if archive:
                unpack(archive, Path(folder))
        outcomes = _run(job, folders, should_stop)
        return Done(outcomes, [pack(Path(folder)) for folder in folders])


def _run(job: Job, folders: Sequence[str], should_stop: Callable[[], bool]) -> list[Outcome]:
    recipes = [parse_recipe(dict(values), source="sweep") for values in job.recipes]
    if job.wandb_mode is not None:
        recipes = [recipe.with_overrides(wandb__mode=job.wandb_mode) for recipe in recipes]
    paths = [Path(folder) for folder in folders]
    outcomes: dict[int, Outcome] = {}
    # A member that has started, perhaps on a worker that died, is resumed on its own.
    fresh = [n for n, path in enumerate(paths) if not (path / RECIPE_FILE).is_file()]
    if len(fresh) > 1:
        outcomes = _run_batch(recipes, paths, fresh, should_stop)
    for number, (recipe, path) in enumerate(zip(recipes, paths, strict=True)):
        if number not in outcomes:
            outcomes[number] = run_member(
                recipe, path, wandb_mode=job.wandb_mode, should_stop=should_stop
            )
    return [outcomes[number] for number in range(len(recipes))]


def _run_batch(
    recipes: Sequence[Recipe],
    folders: Sequence[Path],
    numbers: Sequence[int],
    should_stop: Callable[[], bool],
) -> dict[int, Outcome]:
    from mechcausal.sweeps.batch import train_batch

    try:
        outcomes = train_batch(
            [recipes[number] for number in numbers],
            [folders[number] for number in numbers],
            stop=PolledStop(should_stop),
        )
    except Exception as error:  # a batch that breaks must not end the sweep
        outcomes = [Outcome("failed", one_line(error))] * len(numbers)
    return dict(zip(numbers, outcomes, strict=True))


def run_member(
    recipe: Recipe,
    folder: Path,
    *,
    wandb_mode: WandbMode | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train a member, or resume it from its last checkpoint.

    Args:
        recipe: used if the folder holds no run yet.
        folder: the member's run folder.
        wandb_mode: overrides the W&B mode of a resumed run.
        should_stop: polled a few times a second; a member that stops can be resumed.
    """
    from mechcausal.training.resuming import resume
    from mechcausal.training.run import train

    stop = PolledStop(should_stop)
    try:
        # A worker that lost its scheduler or its sweep may still be writing this member's last row.
        while is_held(folder):
            if should_stop():
                return Outcome("interrupted")
            time.sleep(POLL_SECONDS)
        if has_finished(folder):
            return Outcome("finished")
        if should_stop():
            return Outcome("interrupted")
        if (folder / RECIPE_FILE).is_file():
            result = resume(folder, wandb_mode=wandb_mode, stop=stop)
        else:
            result = train(recipe, out=folder, stop=stop)
    except KeyboardInterrupt:
        return Outcome("interrupted")
    except Exception as error:  # one member's failure must not end the sweep
        return Outcome("failed", one_line(error))
    return Outcome(result.state)
