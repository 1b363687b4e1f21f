"""What a worker does: train a member, go on with it, or find that it has finished."""

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
from mechcausal.sweeps.archive import pack, unpack
from mechcausal.sweeps.outcome import Outcome

POLL_SECONDS = 0.2
"""How often a member looks whether it is to stop."""
LEAN = {
    "WANDB_X_DISABLE_STATS": "true",
    "WANDB_X_DISABLE_MACHINE_INFO": "true",
    "WANDB_X_SAVE_REQUIREMENTS": "false",
    "WANDB_DISABLE_GIT": "true",
}
"""What W&B leaves out of a member's run, so that it starts in milliseconds; a variable that the
user has set stays."""


@dataclass(frozen=True)
class Job:
    """What is sent to a worker: plain data.

    Attributes:
        recipes: one for every member.
        folders: where each lies.
        wandb_mode: instead of the recipes'.
        batched: train them as one batch.
        archives: of members that were begun, where the worker is to send their folders back; None
            where it writes them itself.
    """

    recipes: Sequence[Mapping[str, Any]]
    folders: Sequence[str]
    wandb_mode: WandbMode | None = None
    batched: bool = False
    archives: Sequence[bytes] | None = None


@dataclass(frozen=True)
class Done:
    """What comes back of a job.

    Attributes:
        outcomes: of every member.
        archives: their folders, where they are sent back.
    """

    outcomes: Sequence[Outcome]
    archives: Sequence[bytes] | None = None


def run_job(job: Job, should_stop: Callable[[], bool]) -> Done:
    """Run the members of a job; whatever goes wrong becomes their outcome."""
    for name, value in LEAN.items():
        os.environ.setdefault(name, value)
    if job.archives is None:
        return Done(_run(job, job.folders, should_stop))
    with tempfile.TemporaryDirectory(prefix="mechcausal-") as place:
        folders = [str(Path(place) / Path(folder).name) for folder in job.folders]
        for folder, archive in zip(folders, job.archives, strict=True):
            if archive:
                unpack(archive, Path(folder))
        outcomes = _run(job, folders, should_stop)
        return Done(outcomes, [pack(Path(folder)) for folder in folders])


def _run(job: Job, folders: Sequence[str], should_stop: Callable[[], bool]) -> list[Outcome]:
    recipes = [parse_recipe(dict(values), source="sweep") for values in job.recipes]
    if job.wandb_mode is not None:
        recipes = [recipe.with_overrides(wandb__mode=job.wandb_mode) for recipe in recipes]
    places = [Path(folder) for folder in folders]
    outcomes: dict[int, Outcome] = {}
    if job.batched:
        # What was begun, also by a worker that died, is gone on with by itself.
        fresh = [n for n, place in enumerate(places) if not (place / RECIPE_FILE).is_file()]
        outcomes = _run_batch(recipes, places, fresh, should_stop)
    for number, (recipe, place) in enumerate(zip(recipes, places, strict=True)):
        if number not in outcomes:
            outcomes[number] = run_member(
                recipe, place, wandb_mode=job.wandb_mode, should_stop=should_stop
            )
    return [outcomes[number] for number in range(len(recipes))]


def _run_batch(
    recipes: Sequence[Recipe],
    folders: Sequence[Path],
    numbers: Sequence[int],
    should_stop: Callable[[], bool],
) -> dict[int, Outcome]:
    from mechcausal.sweeps.batched import train_batched

    own = [recipes[number] for number in numbers]
    places = [folders[number] for number in numbers]
    try:
        outcomes = train_batched(own, places, stop=should_stop)
    except KeyboardInterrupt:
        outcomes = [Outcome("interrupted")] * len(own)
    except Exception as error:  # a batch that breaks must not end the sweep
        outcomes = [Outcome("failed", one_line(error))] * len(own)
    return dict(zip(numbers, outcomes, strict=True))


def run_member(
    recipe: Recipe,
    folder: Path,
    *,
    wandb_mode: WandbMode | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train a member, or go on where it was left.

    Args:
        recipe: what is trained, if nothing of it is there.
        folder: its own.
        wandb_mode: instead of that of a run that is there.
        should_stop: asked a few times a second; a member that stops can be resumed.
    """
    from mechcausal.support.signals import StopSignal
    from mechcausal.training.resuming import resume
    from mechcausal.training.run import Progress, train

    stop, asked = StopSignal(), time.monotonic()

    def look(progress: Progress) -> None:
        nonlocal asked
        if time.monotonic() - asked > POLL_SECONDS:
            asked = time.monotonic()
            if stop.received is None and should_stop():
                stop.received = signal.SIGINT

    try:
        # A worker that lost its scheduler, or its sweep, may still be writing its last row.
        while is_held(folder):
            if should_stop():
                return Outcome("interrupted")
            time.sleep(POLL_SECONDS)
        if has_finished(folder):
            return Outcome("finished")
        if should_stop():
            return Outcome("interrupted")
        if (folder / RECIPE_FILE).is_file():
            result = resume(folder, wandb_mode=wandb_mode, on_progress=look, stop=stop)
        else:
            result = train(recipe, out=folder, on_progress=look, stop=stop)
    except KeyboardInterrupt:
        return Outcome("interrupted")
    except Exception as error:  # one member's failure must not end the sweep
        return Outcome("failed", one_line(error))
    return Outcome(result.state)


def one_line(error: BaseException) -> str:
    """An error as one line: its message where that is written for users, else its kind too."""
    text = " ".join(str(error).split())
    own = type(error).__module__.startswith("mechcausal.")
    return text if own and text else f"{type(error).__name__}: {text}"
