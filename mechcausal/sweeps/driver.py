"""`sweep`: plan, run what is missing, tabulate, draw."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mechcausal.recipes import RecipeError, WandbMode, recipe_to_dict
from mechcausal.records.run_folder import LOCK_FILE, RECIPE_FILE, RunFolderError, has_finished
from mechcausal.records.wandb_runs import TrackingError, resolve_mode
from mechcausal.support.files import write_atomically
from mechcausal.support.signals import stop_on_signals
from mechcausal.sweeps.archive import pack, unpack
from mechcausal.sweeps.definition import sweep_to_dict
from mechcausal.sweeps.engine_names import EngineName, check_engine_options
from mechcausal.sweeps.engines import Engine, EngineLostError, LocalEngine
from mechcausal.sweeps.member import Done, Job, one_line
from mechcausal.sweeps.outcome import Outcome
from mechcausal.sweeps.plan import Member, plan
from mechcausal.sweeps.sweep import COPY_FILE, Sweep, SweepError

# Parts of a sweep that may change without its members changing.
_FREE = ("pictures", "search")
MAX_BATCH = 64
"""Members in one batch: more would be no faster, and an interrupted batch is lost as a whole."""


@dataclass(frozen=True)
class SweepProgress:
    """How a sweep stands.

    Attributes:
        total: members.
        skipped: had finished before.
        done: finished now.
        failed: failed now.
        running: with a worker.
        problem: why nothing goes on, empty where all is well.
    """

    total: int
    skipped: int
    done: int = 0
    failed: int = 0
    running: int = 0
    problem: str = ""


@dataclass(frozen=True)
class SweepResult:
    """A sweep that ended.

    Attributes:
        folder: where members, table and pictures lie.
        members: all of them, in order.
        outcomes: by member's name; a member that was not begun has none.
        signal: which stopped it, None where none did.
        problem: why the engine could not go on, empty where it could.
        files: the table and the pictures, by name.
        warnings: which pictures failed, one line each.
    """

    folder: Path
    members: Sequence[Member]
    outcomes: Mapping[str, Outcome]
    signal: int | None = None
    problem: str = ""
    files: Mapping[str, Path] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    @property
    def failed(self) -> dict[str, str]:
        """The error of every member that failed."""
        return {n: o.error for n, o in self.outcomes.items() if o.state == "failed"}

    @property
    def finished(self) -> int:
        """Members that have finished, now or before."""
        return sum(outcome.state == "finished" for outcome in self.outcomes.values())


def run_sweep(
    sweep: Sweep,
    folder: str | Path | None = None,
    *,
    engine: EngineName = "local",
    workers: int | None = None,
    address: str | None = None,
    collect: bool = False,
    wandb_mode: WandbMode | None = None,
    on_progress: Callable[[SweepProgress], None] = lambda progress: None,
) -> SweepResult:
    """Run every member of a sweep that has not finished, then tabulate and draw.

    Args:
        sweep: what to run.
        folder: `runs/<name>` when absent; a sweep that is there is gone on with.
        engine: local: processes. batched: members of equal shape as one batch. dask: a cluster.
        workers: processes of this machine, without Dask; as many as its cores allow when absent.
        address: of the Dask scheduler; needed with dask.
        collect: have Dask's workers send folders back; for a cluster that shares no disk.
        wandb_mode: of every member.
        on_progress: told as members end.

    Returns:
        What became of every member. A failing one does not stop the others.

    Raises:
        SweepError: bad input, or no scheduler, before anything was started.
        OSError: the folder cannot be written.
    """
    check_engine_options(engine, workers=workers, address=address, collect=collect)
    folder = Path(folder) if folder is not None else Path("runs") / sweep.name
    members = plan(sweep, folder)
    _check(members, everywhere=engine != "dask", wandb_mode=wandb_mode)
    with _hold(folder, sweep):
        outcomes = {m.name: Outcome("finished") for m in members if has_finished(m.folder)}
        missing = [member for member in members if member.name not in outcomes]
        signal, problem = None, ""
        if missing:
            running = _engine(engine, missing, workers, address)
            with running:
                write_atomically(folder / COPY_FILE, json.dumps(sweep_to_dict(sweep), indent=2))
                lots = _lots(missing, engine, running.n_workers)
                progress = SweepProgress(total=len(members), skipped=len(outcomes))
                signal, problem = _run(
                    running,
                    lots,
                    lambda lot: _job(lot, wandb_mode, collect),
                    outcomes,
                    progress,
                    on_progress,
                )
        else:
            write_atomically(folder / COPY_FILE, json.dumps(sweep_to_dict(sweep), indent=2))
        from mechcausal.sweeps.results import write_results

        warnings: list[str] = []
        files = write_results(sweep, members, outcomes, folder, warn=warnings.append)
    return SweepResult(folder, members, outcomes, signal, problem, files, warnings)


def _run(
    engine: Engine,
    lots: Sequence[list[Member]],
    make: Callable[[list[Member]], Job],
    outcomes: dict[str, Outcome],
    progress: SweepProgress,
    on_progress: Callable[[SweepProgress], None],
) -> tuple[int | None, str]:
    """Run lots, a few more at a time than there are workers; the signal that stopped it, if any."""
    pending: dict[Future[Done], list[Member]] = {}
    waiting = iter(lots)
    problem, ended_early = "", False
    with stop_on_signals() as stop:
        stop.waits = True
        while True:
            if stop.received is not None and not ended_early:
                ended_early = True
                engine.stop()
            n_workers = engine.n_workers
            # A lot becomes a job when it is needed: thousands wait as members.
            while not ended_early and len(pending) < 2 * n_workers:
                lot = next(waiting, None)
                if lot is None:
                    break
                try:
                    pending[engine.submit(make(lot))] = lot
                except EngineLostError as error:
                    problem, ended_early = str(error), True
            if not pending:
                break
            ended, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in ended:
                lot = pending.pop(future)
                try:
                    results = _collected(future.result(), lot)
                except (EngineLostError, CancelledError):
                    problem = problem or engine.problem() or "the engine can run no more jobs"
                    ended_early = True
                    continue
                except (
                    Exception
                ) as error:  # the engine gave a job up, as Dask does after some tries
                    results = [Outcome("failed", one_line(error))] * len(lot)
                outcomes |= {m.name: o for m, o in zip(lot, results, strict=True)}
            if engine.is_lost and not any(future.done() for future in pending):
                problem = problem or engine.problem()
                break
            states = Counter(outcome.state for outcome in outcomes.values())
            running = sorted(map(len, pending.values()), reverse=True)[:n_workers]
            on_progress(
                replace(
                    progress,
                    done=states["finished"] - progress.skipped,
                    failed=states["failed"],
                    running=sum(running),
                    problem=engine.problem(),
                )
            )
    return (int(stop.received) if stop.received is not None else None), problem


def _collected(done: Done, members: Sequence[Member]) -> Sequence[Outcome]:
    """Put folders that were sent back into their places."""
    if done.archives is None:
        return done.outcomes
    results = []
    for member, outcome, archive in zip(members, done.outcomes, done.archives, strict=True):
        try:
            unpack(archive, member.folder)
        except RunFolderError as error:
            outcome = Outcome("failed", str(error))
        results.append(outcome)
    return results


def _lots(members: Sequence[Member], engine: EngineName, n_workers: int) -> list[list[Member]]:
    """Members that are run by one job, long ones first, so that none is left over at the end."""
    lots: list[list[Member]] = []
    singles = [*members]
    if engine == "batched":
        from mechcausal.sweeps.batched import batchable, groups

        # What was begun is gone on with by itself.
        fresh = [m for m in members if not (m.folder / RECIPE_FILE).is_file()]
        fresh = [m for m in fresh if batchable(m.recipe)]
        batched = {member.name for member in fresh}
        singles = [member for member in members if member.name not in batched]
        for group in groups([member.recipe for member in fresh]):
            size = min(MAX_BATCH, -(-len(group) // n_workers))
            for start in range(0, len(group), size):
                lots.append([fresh[index] for index in group[start : start + size]])
    lots += [[member] for member in singles]
    return sorted(lots, key=lambda lot: -sum(member.recipe.n_training_sequences for member in lot))


def _job(lot: Sequence[Member], wandb_mode: WandbMode | None, collect: bool) -> Job:
    archives = None
    if collect:
        begun = [(member.folder / RECIPE_FILE).is_file() for member in lot]
        archives = [pack(m.folder) if b else b"" for m, b in zip(lot, begun, strict=True)]
    return Job(
        recipes=[recipe_to_dict(member.recipe) for member in lot],
        folders=[str(member.folder.resolve()) for member in lot],
        wandb_mode=wandb_mode,
        batched=len(lot) > 1,
        archives=archives,
    )


def _check(members: Sequence[Member], *, everywhere: bool, wandb_mode: WandbMode | None) -> None:
    """Whether every member can be trained.

    Args:
        members: of the sweep.
        everywhere: False leaves out what only holds of this machine: its memory and its devices.
        wandb_mode: as asked for.

    Raises:
        SweepError: one cannot.
    """
    from mechcausal.graphs import GraphError
    from mechcausal.recipes.stages import stages
    from mechcausal.tasks import build_task
    from mechcausal.tasks.priors import PriorError
    from mechcausal.training.experiments import check_model
    from mechcausal.training.run import check

    try:
        resolve_mode(wandb_mode)
    except TrackingError as error:
        raise SweepError(str(error)) from None
    seen = set()
    for member in members:
        # Seeds change a graph's edges, not whether it is one.
        values = recipe_to_dict(member.recipe) | {"seed": 0, "wandb": None}
        key = json.dumps(values, default=str)
        if key in seen:
            continue
        seen.add(key)
        try:
            if everywhere:
                check(member.recipe)
                continue
            if not stages(member.recipe):
                raise RecipeError("training: no steps in any stage: nothing to train")
            if member.recipe.task.kind == "causal_graph":
                recipe = member.recipe
                check_model(recipe, build_task(recipe.build_graph(), recipe.build_prior()))
        except (RecipeError, GraphError, PriorError) as error:
            raise SweepError(f"member {member.name}: {error}") from None


@contextmanager
def _hold(folder: Path, sweep: Sweep) -> Iterator[None]:
    """Make the sweep's folder, or find the same sweep in it, and be the only one that runs it.

    Raises:
        SweepError: another sweep, a run or something else is in it, or another process runs it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_copy(folder, sweep)
        lock = FileLock(folder / LOCK_FILE)
        lock.acquire(timeout=0.5)
    except Timeout:
        raise SweepError(f"{folder}: another process is running this sweep") from None
    except OSError as error:
        raise SweepError(f"{folder}: not writable: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def _check_copy(folder: Path, sweep: Sweep) -> None:
    copy = folder / COPY_FILE
    if not copy.is_file():
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if others:
            raise SweepError(
                f"{folder}: is not empty and holds no sweep (found {sorted(others)[0]}); "
                "choose another folder with --out"
            )
        return
    try:
        before = json.loads(copy.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise SweepError(f"{copy}: cannot be read; choose another folder with --out")
    now: dict[str, Any] = json.loads(json.dumps(sweep_to_dict(sweep)))
    different = [
        key for key in sorted({*before, *now} - {*_FREE}) if before.get(key) != now.get(key)
    ]
    if different:
        raise SweepError(
            f"{folder}: holds another sweep ({', '.join(different)} differ); "
            "choose another folder with --out"
        )


def _engine(
    name: EngineName, members: Sequence[Member], workers: int | None, address: str | None
) -> Engine:
    if name == "dask":
        from mechcausal.sweeps.cluster import DaskEngine

        return DaskEngine(address or "")
    threads = max(member.recipe.threads for member in members)
    n_workers = workers or max(1, (os.cpu_count() or 1) // threads)
    uses_cuda = any(member.recipe.device.startswith("cuda") for member in members)
    return LocalEngine(min(n_workers, len(members)), uses_cuda=uses_cuda)
