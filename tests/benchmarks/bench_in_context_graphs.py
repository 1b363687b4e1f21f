"""What the recipe in_context_graphs reaches, over seeds; each draws a kernel and initial weights.

python -m pytest -s tests/benchmarks/bench_in_context_graphs.py

Prints means and standard errors over seeds. The acceptance: parents by attention within 0.005 of
those by Bayes' rule, column error below 0.15 while the row error is above 0.3, and all rows named
by the first gradient.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mechcausal.measures.context_graphs import kernel_errors
from mechcausal.recipes import load_recipe
from mechcausal.tasks.in_context_graphs import InContextGraphTask
from mechcausal.theory.context_gradient import first_score_gradient
from tests.oracles import seeded

pytestmark = pytest.mark.benchmark

SEEDS = (0, 1, 2)
KEYS = (
    "loss/eval",
    "loss/bayes",
    "loss/gap",
    "parents/top1",
    "parents/oracle_top1",
    "parents/posterior_kl",
    "kernel/column_error",
    "kernel/row_error",
    "copies/examples_chosen",
)


def summaries(folder: Path, *options: str) -> list[dict[str, float]]:
    """The summaries of the recipe's runs, one for each seed."""
    read = []
    for seed in SEEDS:
        out = folder / str(seed)
        command = [sys.executable, "-m", "mechcausal.cli.main", "train", "in_context_graphs"]
        command += ["--seed", str(seed), "--out", str(out), "--quiet", "--wandb-mode", "disabled"]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
        read.append(json.loads((out / "summary.json").read_text()))
        print(f"\nseed {seed}: " + ", ".join(f"{key} {read[-1][key]:.4f}" for key in KEYS))
    return read


def report(label: str, values: list[float]) -> None:
    """Mean and standard error over seeds."""
    value = torch.tensor(values, dtype=torch.float64)
    print(f"  {label}: {value.mean():.4f} ± {value.std() / len(values) ** 0.5:.4f}")


def task_of(seed: int) -> InContextGraphTask:
    task = load_recipe("in_context_graphs").with_overrides(seed=seed).build_task()
    assert isinstance(task, InContextGraphTask)
    return task


@pytest.mark.timeout(0)
def test_recipe(tmp_path: Path) -> None:
    """Losses, parents and the kernel after training."""
    runs = summaries(tmp_path)
    for key in KEYS:
        report(key, [run[key] for run in runs])
    report(
        "top1 below the oracle's",
        [run["parents/oracle_top1"] - run["parents/top1"] for run in runs],
    )


@pytest.mark.timeout(0)
def test_from_uniform_columns(tmp_path: Path) -> None:
    """The same without a start on the own column."""
    runs = summaries(tmp_path, "--model.own-column", "0")
    for key in ("loss/gap", "parents/top1", "parents/posterior_kl", "copies/own_column"):
        report(key, [run[key] for run in runs])


@pytest.mark.timeout(0)
def test_first_gradient() -> None:
    """Five random graphs for each seed's kernel, and the row error that log π itself would have."""
    for seed in SEEDS:
        task, generator = task_of(seed), seeded(seed)
        graphs = task.draw_parents(5, generator=generator).tolist()
        first = [first_score_gradient(task, parents, generator=generator) for parents in graphs]
        named = [hit for each in first for hit in each.named.values()]
        r = torch.tensor([r for each in first for r in each.chi2_correlations.values()])
        kernel = torch.tensor(task.kernel.rows, dtype=torch.float64)
        centred = kernel.log() - kernel.log().mean(0)
        row = kernel_errors(centred, kernel)["kernel/row_error"]
        print(
            f"\nseed {seed}: {sum(named)} of {len(named)} rows named; r with χ² in a row "
            f"{r.mean():.2f} ± {r.std() / len(r) ** 0.5:.2f}, smallest {r.min():.2f}; row error of "
            f"log π with columns of mean 0: {row:.2f}"
        )
