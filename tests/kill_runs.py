"""Kill training runs at random moments, resume them, and compare with a run that nobody disturbed.

    python tests/kill_runs.py                 # 50 times kill -9, 20 times SIGTERM, 20 times SIGINT

A third of the moments are anywhere in the run, the others while the process looks at the model,
writes a checkpoint or writes to W&B. A run that was killed must end up with the same bytes in
metrics.jsonl, the final weights and the matrices, with every step once in metrics.jsonl and once in
the W&B fragments taken together, but for those that `resume` itself names. A run that was asked to
stop must do so within 5 seconds and lose no row.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("WANDB_MODE", "offline")

import wandb

from mechcausal.measures.figures import STEP
from mechcausal.recipes import Recipe, parse_recipe
from mechcausal.records.run_folder import read_metrics, read_process, read_summary
from mechcausal.records.wandb_fragments import fragments, wandb_steps
from mechcausal.records.wandb_runs import WandbRun
from mechcausal.training.checkpointing import Checkpointer
from mechcausal.training.probe_log import ProbeLog
from mechcausal.training.resuming import resume
from mechcausal.training.run import train

PHASES = ("anywhere", "probe step", "checkpoint", "W&B")
COMPARED = ("metrics.jsonl", "model/model.safetensors", "matrices.safetensors")
# Forked, since that leaves out the seconds of importing everything.
FORK = multiprocessing.get_context("fork")


def recipe_to_kill() -> Recipe:
    """Two stages with two optimizers, a probe step every 10 and a checkpoint every 25 steps."""
    data: dict[str, Any] = {
        "name": "killed",
        "graph": {"preset": "chain", "sequence_length": 8},
        "task": {"vocab_size": 3, "alpha": 0.3},
        "training": {
            "batch_size": 64,
            "stage1": {"steps": 120, "lr": 100.0},
            "stage2": {"steps": 120, "optimizer": "adam", "lr": 0.05, "schedule": "cosine"},
        },
        "evaluation": {"n_sequences": 64, "bayes_draws": 8, "theory_priors": 50},
        "probing": {"every": 10, "dense": 3, "images": 3},
        "checkpoints": {"every": 25},
    }
    return parse_recipe(data, source="kill_runs")


def start(folder: Path, phase: "Synchronized[int]") -> ForkProcess:
    """Train, or resume where there is a run, in a process of its own that tells what it does."""

    def work() -> None:
        os.setsid()
        for number, (kind, method) in enumerate(
            ((ProbeLog, "add"), (Checkpointer, "save"), (WandbRun, "log")), start=1
        ):
            _announce(kind, method, phase, number)
        with Path(os.devnull).open("w") as nowhere:
            sys.stdout = sys.stderr = nowhere
            result = (
                resume(folder)
                if (folder / "recipe.toml").exists()
                else train(recipe_to_kill(), out=folder)
            )
        wandb.teardown()  # which a process does at its exit; os._exit would leave it out
        os._exit(0 if result.state == "finished" else 128 + (result.signal or 0))

    # A service of ours, which the process would share, would keep a killed run's id for in use.
    wandb.teardown()
    process = FORK.Process(target=work)
    process.start()
    return process


def _announce(kind: Any, method: str, phase: "Synchronized[int]", number: int) -> None:
    """Make a method say in the shared number that it is being run."""
    original = getattr(kind, method)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        before, phase.value = phase.value, number
        try:
            return original(*arguments, **options)
        finally:
            phase.value = before

    setattr(kind, method, wrapped)


@dataclass
class Trial:
    """One run that was disturbed.

    Attributes:
        problems: what was not as it should be.
        phase: what the process did when it was disturbed.
        rows: rows on disk at that moment.
        seconds: from the signal to the end of the process.
    """

    problems: list[str]
    phase: str
    rows: int
    seconds: float


def disturb(
    folder: Path, reference: Path, number: signal.Signals, wanted: int, draw: random.Random
) -> Trial:
    """Train, send a signal at a random moment, resume to the end, and compare."""
    phase: Synchronized[int] = FORK.Value("i", 0)
    process = start(folder, phase)
    at_least = draw.randrange(0, len(read_metrics(reference)) - 1)
    metrics = folder / "metrics.jsonl"
    while process.is_alive() and not (
        metrics.exists()
        and metrics.read_bytes().count(b"\n") >= at_least
        and (wanted == 0 or phase.value == wanted)
    ):
        time.sleep(0.0002)
    time.sleep(draw.uniform(0, 0.003))
    at, began = PHASES[phase.value], time.monotonic()
    assert process.pid is not None
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        at = "finished"
    process.join()
    seconds = time.monotonic() - began
    rows = len(read_metrics(folder)) if metrics.exists() else 0
    problems = []
    if number != signal.SIGKILL and process.exitcode not in (0, 128 + number):
        problems.append(f"exit code {process.exitcode}")
    if number != signal.SIGKILL and process.exitcode != 0:
        problems += _lost(folder)
    if not (folder / "summary.json").exists() or read_summary(folder)["state"] != "finished":
        again = start(folder, phase)
        again.join()
        if again.exitcode != 0:
            return Trial([f"resume ended with {again.exitcode}"], at, rows, seconds)
    return Trial(problems + compare(folder, reference), at, rows, seconds)


def _lost(folder: Path) -> list[str]:
    """What a run that was asked to stop has not written."""
    summary, rows = read_summary(folder), read_metrics(folder)
    logged = [step for part in _fragments(folder) for step in wandb_steps(part) or []]
    problems = [str(warning) for warning in summary["warnings"]]
    if summary["rows"] != len(rows) or sorted(logged) != [row[STEP] for row in rows]:
        problems.append(f"{summary['rows']} rows seen, {len(rows)} on disk, {len(logged)} in W&B")
    return problems


def compare(folder: Path, reference: Path) -> list[str]:
    """Where a resumed run differs from one that nobody disturbed."""
    problems = []
    for name in COMPARED:
        if (folder / name).read_bytes() != (reference / name).read_bytes():
            problems.append(f"{name} differs")
    steps = [int(row[STEP] or 0) for row in read_metrics(folder)]
    if len(set(steps)) < len(steps):
        problems.append("metrics.jsonl has a step twice")
    logged = Counter(step for part in _fragments(folder) for step in wandb_steps(part) or [])
    warnings = " ".join(read_summary(folder)["warnings"])
    if missing := sorted(set(steps) - set(logged)):
        problems.append(f"W&B lacks the steps {missing} ({warnings})")
    repeated = [step for step, n in logged.items() if n > 1]
    if repeated and "more than one" not in warnings:
        problems.append(f"W&B has {repeated} more than once")
    return problems


def _fragments(folder: Path) -> list[Path]:
    return fragments(folder, str(read_process(folder)["wandb_id"]))


def undisturbed(folder: Path) -> Path:
    """A run from start to end."""
    process = start(folder, FORK.Value("i", 0))
    process.join()
    assert process.exitcode == 0
    return folder


def run_trials(
    folder: Path, reference: Path, number: signal.Signals, count: int, *, seed: int = 0
) -> list[Trial]:
    """That many runs, disturbed by a signal in every phase in turn."""
    draw = random.Random(seed)
    trials = []
    for trial in range(count):
        run = folder / f"{number.name}-{trial}"
        result = disturb(run, reference, number, trial % len(PHASES), draw)
        what = "; ".join(result.problems) or "the same"
        print(f"{number.name} {trial}: {result.phase}, {result.rows} rows: {what}", flush=True)
        trials.append(result)
    return trials


def main() -> int:
    """Run the trials; 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signals", type=int, default=20, help="of SIGTERM and SIGINT each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    lines, bad = [], 0
    with tempfile.TemporaryDirectory() as folder:
        reference = undisturbed(Path(folder) / "reference")
        for number, count in (
            (signal.SIGKILL, options.kills),
            (signal.SIGTERM, options.signals),
            (signal.SIGINT, options.signals),
        ):
            trials = run_trials(Path(folder), reference, number, count, seed=options.seed)
            slow = [t for t in trials if t.seconds > 5]
            good = sum(not trial.problems for trial in trials)
            bad += count - good + len(slow)
            phases = ", ".join(f"{n} {p}" for p, n in Counter(t.phase for t in trials).items())
            line = f"{good}/{count} {number.name} ({phases})"
            if number != signal.SIGKILL and trials:
                line += f", ended within {max(t.seconds for t in trials):.1f} s"
            lines.append(line)
    print(*lines, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
