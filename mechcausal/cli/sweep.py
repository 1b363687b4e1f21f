"""`mechcausal sweep`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mechcausal.cli.display import bar_on_terminal
from mechcausal.cli.parsing import RefusedError, parse
from mechcausal.cli.tables import print_locations
from mechcausal.recipes import WandbMode
from mechcausal.support.messages import shell_command
from mechcausal.sweeps.definition import load_sweep, packaged_sweeps
from mechcausal.sweeps.engine_names import BATCHED, EngineName, check_engine_options
from mechcausal.sweeps.plan import plan, size
from mechcausal.sweeps.sweep import Sweep, SweepError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from mechcausal.sweeps.driver import SweepProgress, SweepResult

SHOWN_MEMBERS = 10


@dataclass
class SweepOptions:
    """Run many members of one recipe: axes over its fields, seeds, on cores or on a cluster.

    Members draw no page. `mechcausal report MEMBER_FOLDER` draws one; `probing.report = true` under
    the sweep's [changes] draws one for each member.
    """

    sweep: tyro.conf.Positional[str] = ""
    """Path of a sweep (TOML), the name of a bundled sweep, or a sweep's folder."""
    engine: EngineName = "local"
    """local: processes on this machine. dask: your Dask cluster."""
    batch: bool = False
    """Train simplified models of equal shape as one batch, which is several times faster for small
    ones."""
    workers: int | None = None
    """Local: processes on this machine; as many as its cores allow when absent."""
    address: str | None = None
    """Dask: address of the scheduler: tls://host:8786 with the certificates of Dask's own settings,
    or tcp://host:8786 if nobody else can reach it."""
    collect: bool = False
    """Dask: workers share no disk with this machine; they send their members' folders back."""
    out: Path | None = None
    """Folder of the sweep; runs/<sweep> when absent."""
    dry_run: bool = False
    """Check the sweep and list its members; start nothing."""
    as_wandb: Path | None = None
    """Write W&B's own sweep configuration (YAML) to this file; start nothing."""
    wandb_mode: WandbMode | None = None
    """W&B mode of every member; see `mechcausal train --help`."""
    quiet: bool = False
    """No progress."""


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0, 1 when a member failed, or 128 + signal."""
    if "--engine batched" in " ".join(arguments).replace("=", " "):
        raise RefusedError(BATCHED)
    options = parse(SweepOptions, arguments, command="sweep")
    if not options.sweep:
        raise RefusedError(f"sweep needs a sweep: a file, or {', '.join(packaged_sweeps())}")
    if options.workers is not None and not 1 <= options.workers <= 1024:
        raise RefusedError(f"--workers is {options.workers}: from 1 to 1024 are possible")
    target = Path(options.sweep)
    out = options.out or (target if target.is_dir() else None)
    try:
        check_engine_options(
            options.engine,
            workers=options.workers,
            address=options.address,
            collect=options.collect,
        )
        sweep = load_sweep(options.sweep)
        folder = out or Path("runs") / sweep.name
        if options.as_wandb is not None:
            return _write_wandb(sweep, options.as_wandb)
        if options.dry_run:
            return _show_plan(sweep, folder)
        return _run(sweep, folder, options)
    except SweepError as error:
        raise RefusedError(str(error)) from None


def _run(sweep: Sweep, folder: Path, options: SweepOptions) -> int:
    print(f"mechcausal sweep {sweep.name}: {size(sweep):,} members in {folder}", flush=True)
    from mechcausal.sweeps.driver import run_sweep

    display = _Display(quiet=options.quiet)
    try:
        with display.bar:
            result = run_sweep(
                sweep,
                folder,
                engine=options.engine,
                batch=options.batch,
                workers=options.workers,
                address=options.address,
                collect=options.collect,
                wandb_mode=options.wandb_mode,
                on_progress=display.show,
            )
    except OSError as error:
        raise RefusedError(f"{folder}: {error.strerror or error}") from None
    return _report(result)


def _report(result: "SweepResult") -> int:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    left = len(result.members) - result.finished - len(result.failed)
    counts = f"{result.finished:,} of {len(result.members):,} finished"
    counts += f", {len(result.failed):,} failed" if result.failed else ""
    console.print(counts + (f", {left:,} left" if left else ""))
    print_locations(result.files)
    for warning in result.warnings:
        print(f"mechcausal: warning: {warning}", file=sys.stderr)
    for name, error in result.failed.items():
        print(f"mechcausal: {name}: {error}", file=sys.stderr)
    if result.problem:
        print(f"mechcausal: {result.problem}", file=sys.stderr)
    if left or result.failed:
        again = shell_command("mechcausal", "sweep", result.folder)
        print(f"mechcausal: start it again to go on: {again}", file=sys.stderr)
    if result.signal is not None:
        return 128 + result.signal
    return 1 if left or result.failed else 0


def _show_plan(sweep: Sweep, folder: Path) -> int:
    members = plan(sweep, folder)
    axes = {path: len({str(m.point[path]) for m in members}) for path in members[0].point}
    print(f"{sweep.name}: {len(members):,} members in {folder}")
    for path, count in axes.items():
        print(f"  {path}: {count:,} value{'s' * (count != 1)}")
    for member in members[:SHOWN_MEMBERS]:
        print(f"  {member.name}")
    if len(members) > SHOWN_MEMBERS:
        print(f"  ... and {len(members) - SHOWN_MEMBERS:,} more")
    return 0


def _write_wandb(sweep: Sweep, file: Path) -> int:
    from mechcausal.sweeps.wandb_sweep import write_wandb_sweep

    plan(sweep, file.parent)  # refuses invalid members
    try:
        written = write_wandb_sweep(sweep, file)
    except OSError as error:
        raise RefusedError(f"{file}: {error.strerror or error}") from None
    for path in written:
        print(f"written: {path}")
    command = shell_command("wandb", "sweep", file)
    print(f"with a W&B account: {command}, then the wandb agent line that it prints")
    return 0


class _Display:
    """Members done, failed and running, and the time left; nothing if stderr is no terminal.

    Attributes:
        bar: shown within its `with` block.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.bar = bar_on_terminal(quiet=quiet, keep=True)
        self.bar.speed_estimate_period = 600  # seconds: members may end rarely
        self._quiet = quiet
        self._task: TaskID | None = None
        self._problem = ""

    def show(self, progress: "SweepProgress") -> None:
        """Update the bar; called whenever members end."""
        if self._task is None:
            total = progress.total - progress.skipped
            self._task = self.bar.add_task("members", total=total, figures="starting")
        states = f"{progress.running} running"
        states += f", {progress.failed} failed" if progress.failed else ""
        states += f", {progress.skipped} before" if progress.skipped else ""
        self.bar.update(self._task, completed=progress.done + progress.failed, figures=states)
        if progress.problem != self._problem:
            self._problem = progress.problem
            if self._problem and not self._quiet:
                print(f"mechcausal: {self._problem}", file=sys.stderr, flush=True)
