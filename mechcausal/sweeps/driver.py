"""Run a sweep: plan its members, train the unfinished ones, write the table and the pictures."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from mechcausal.recipes import RecipeError, WandbMode, recipe_to_dict
from mechcausal.records.run_folder import RECIPE_FILE, RunFolderError, has_finished
from mechcausal.records.wandb_runs import TrackingError, resolve_mode
from mechcausal.support.signals import stop_on_signals
from mechcausal.sweeps.archive import pack, unpack
from mechcausal.sweeps.engine_names import EngineName, check_engine_options
from mechcausal.sweeps.engines import Engine, EngineLostError, LocalEngine
from mechcausal.sweeps.folder import locked_sweep_folder, write_copy
from mechcausal.sweeps.member import Done, Job
from mechcausal.sweeps.outcome import Outcome, one_line
from mechcausal.sweeps.plan import Member, plan
from mechcausal.sweeps.sweep import Sweep, SweepError


@dataclass(frozen=True)
class SweepProgress:
    """How far a sweep is: numbers of members.

    Attributes:
        total: all members.
        skipped: members that had finished before this call.
        done: members that finished during this call.
        failed: members that failed during this call.
        running: members that a worker is training.
        problem: why the sweep makes no progress; empty if it does.
    """

    total: int
    skipped: int
    done: int = 0
    failed: int = 0
    running: int = 0
    problem: str = ""


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        folder: the sweep's folder, with members, table and pictures.
        members: all members, in order.
        outcomes: by member name; a member that has not started has none.
        signal: the signal that stopped the sweep, or None.
        problem: why the engine stopped early; empty if it did not.
        files: the paths of the table and the pictures, by name.
        warnings: one line per picture that failed.
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
        """The error message of every failed member, by name."""
        return {n: o.error for n, o in self.outcomes.items() if o.state == "failed"}

    @property
    def finished(self) -> int:
        """The number of members that have finished, in this call or before."""
        return sum(outcome.state == "finished" for outcome in self.outcomes.values())


def run_sweep(
    sweep: Sweep,
    folder: str | Path | None = None,
    *,
    engine: EngineName = "local",
    batch: bool = False,
    workers: int | None = None,
    address: str | None = None,
    collect: bool = False,
    wandb_mode: WandbMode | None = None,
    on_progress: Callable[[SweepProgress], None] = lambda progress: None,
) -> SweepResult:
    """Train every unfinished member of a sweep, then write the table and the pictures.

    Args:
        sweep: the sweep.
        folder: default `runs/<name>`; a sweep in it is resumed.
        engine: "local": processes. "dask": a cluster.
        batch: train simplified models of equal shape as one batch; other members run one by one.
        workers: number of local processes (not with Dask); default: as many as the cores allow.
        address: address of the Dask scheduler; required with "dask".
        collect: make Dask's workers send the run folders back, for clusters without a shared disk.
        wandb_mode: overrides every member's W&B mode.
        on_progress: called several times a second.

    Returns:
        The outcome of every member. A failing member does not stop the others.

    Raises:
        SweepError: bad input or no scheduler, before any member starts.
        OSError: the folder cannot be written.
    """
    check_engine_options(engine, workers=workers, address=address, collect=collect)
    folder = Path(folder) if folder is not None else Path("runs") / sweep.name
    members = plan(sweep, folder)
    _check(members, on_this_machine=engine != "dask", wandb_mode=wandb_mode)
    with locked_sweep_folder(folder, sweep):
        outcomes = {m.name: Outcome("finished") for m in members if has_finished(m.folder)}
        missing = [member for member in members if member.name not in outcomes]
        signal, problem = None, ""
        if missing:
            running = _engine(engine, missing, workers, address)
            with running:
                write_copy(folder, sweep)
                lots = _lots(missing, running.n_workers, batch=batch)
                progress = SweepProgress(total=len(members), skipped=len(outcomes))
                signal, problem = _run(
                    running,
                    lots,
                    lambda lot: _job(lot, wandb_mode, collect),
                    outcomes,
                    progress,
                    on_progress=on_progress,
                )
        else:
            write_copy(folder, sweep)
        from mechcausal.sweeps.results import write_results

        warnings: list[str] = []
        files = write_results(sweep, members, outcomes, folder, warn=warnings.append)
    return SweepResult(folder, members, outcomes, signal, problem, files, warnings)


def train_members(
    members: Sequence[Member],
    *,
    workers: int | None = None,
    on_end: Callable[[Member, Outcome], None] = lambda member, outcome: None,
) -> int | None:
    """Train or resume members in processes of this machine, without a sweep around them.

    Args:
        members: the members; none of them has finished.
        workers: number of processes; default: as many as the cores allow.
        on_end: called with each member that ends and its outcome.

    Returns:
        The signal that stopped the training, or None.
    """
    if not members:
        return None
    engine = _engine("local", members, workers, None)
    with engine:
        lots = _lots(members, engine.n_workers, batch=False)
        progress = SweepProgress(total=len(members), skipped=0)
        signal, _ = _run(engine, lots, lambda lot: _job(lot, None, False), {}, progress, on_end)
    return signal


def _run(
    engine: Engine,
    lots: Sequence[list[Member]],
    make_job: Callable[[list[Member]], Job],
    outcomes: dict[str, Outcome],
    progress: SweepProgress,
    on_end: Callable[[Member, Outcome], None] = lambda member, outcome: None,
    on_progress: Callable[[SweepProgress], None] = lambda progress: None,
) -> tuple[int | None, str]:
    """Run the lots, up to two per worker at a time; return the stop signal and the problem."""
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
            # Jobs are made late: a member needs less memory than the job made from it.
            while not ended_early and len(pending) < 2 * n_workers:
                lot = next(waiting, None)
                if lot is None:
                    break
                try:
                    pending[engine.submit(make_job(lot))] = lot
                except EngineLostError as error:
                    problem, ended_early = str(error), True
            if not pending:
                break
            ended, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in ended:
                lot = pending.pop(future)
                try:
                    results = _unpacked(future.result(), lot)
                except (EngineLostError, CancelledError):
                    problem = problem or engine.problem() or "the engine can run no more jobs"
                    ended_early = True
                    continue
                except Exception as error:  # Dask gives a job up after several tries
                    results = [Outcome("failed", one_line(error))] * len(lot)
                for member, outcome in zip(lot, results, strict=True):
                    outcomes[member.name] = outcome
                    on_end(member, outcome)
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


def _unpacked(done: Done, members: Sequence[Member]) -> Sequence[Outcome]:
    """Unpack the run folders that a worker sent back; return the outcomes."""
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


def _lots(members: Sequence[Member], n_workers: int, *, batch: bool) -> list[list[Member]]:
    """Group the members into jobs, the longest first, so that all workers end about together."""
    lots: list[list[Member]] = []
    singles = [*members]
    if batch:
        from mechcausal.sweeps.batch import batchable, batches

        # A member that has started is resumed on its own.
        fresh = [m for m in members if not (m.folder / RECIPE_FILE).is_file()]
        fresh = [m for m in fresh if batchable(m.recipe)]
        batched = {member.name for member in fresh}
        singles = [member for member in members if member.name not in batched]
        for numbers in batches([member.recipe for member in fresh], n_workers):
            lots.append([fresh[number] for number in numbers])
    lots += [[member] for member in singles]
    return sorted(lots, key=lambda lot: -sum(member.recipe.n_training_sequences for member in lot))


def _job(lot: Sequence[Member], wandb_mode: WandbMode | None, collect: bool) -> Job:
    archives = None
    if collect:
        archives = [
            pack(member.folder) if (member.folder / RECIPE_FILE).is_file() else b""
            for member in lot
        ]
    return Job(
        recipes=[recipe_to_dict(member.recipe) for member in lot],
        folders=[str(member.folder.resolve()) for member in lot],
        wandb_mode=wandb_mode,
        archives=archives,
    )


def _check(
    members: Sequence[Member], *, on_this_machine: bool, wandb_mode: WandbMode | None
) -> None:
    """Check that every member can be trained.

    Args:
        members: the members.
        on_this_machine: whether to check this machine's memory and devices too.
        wandb_mode: the W&B mode asked for.

    Raises:
        SweepError: the first member that cannot be trained.
    """
    from mechcausal.graphs import GraphError
    from mechcausal.tasks.priors import PriorError
    from mechcausal.training.run import check

    try:
        resolve_mode(wandb_mode)
    except TrackingError as error:
        raise SweepError(str(error)) from None
    seen = set()
    for member in members:
        # A seed changes a random graph's edges, but not whether the recipe is valid.
        values = recipe_to_dict(member.recipe) | {"seed": 0, "wandb": None}
        key = json.dumps(values, default=str)
        if key in seen:
            continue
        seen.add(key)
        try:
            check(member.recipe, on_this_machine=on_this_machine)
        except (RecipeError, GraphError, PriorError) as error:
            raise SweepError(f"member {member.name}: {error}") from None


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
