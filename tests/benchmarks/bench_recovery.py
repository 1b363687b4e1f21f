"""The two-stage recipes over seeds 0-4: what `mechcausal train` finds.

The figures are those of the whole command, read back from the run folders; the W&B rows are
counted in the transaction log.
"""

import math
import subprocess
import sys

import pytest

from mechcausal.recipes import load_recipe, packaged_recipes
from mechcausal.records.run_folder import read_metrics, read_summary
from mechcausal.records.wandb_fragments import count_wandb_rows

pytestmark = pytest.mark.benchmark


RECIPES = [
    name
    for name in packaged_recipes()  # those of the paper's figures: `mechcausal replicate`
    if load_recipe(name).training.algorithm == "two_stage"
]


@pytest.mark.timeout(0)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recovery_over_seeds(recipe, tmp_path):
    print(
        f"\n{recipe:14} seed  recovered  parent attention  first edge hits  first f1  "
        "above hand-built  rows (W&B)"
    )
    for seed in range(5):
        folder = tmp_path / str(seed)
        command = [sys.executable, "-m", "mechcausal.cli.main", "train", recipe, "--quiet"]
        options = ["--seed", str(seed), "--out", str(folder), "--wandb-mode", "offline"]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
        summary = read_summary(folder)
        first = summary["first"]
        wandb_folder = next((folder / "wandb").glob("offline-run-*"))
        rows = f"{len(read_metrics(folder))} ({count_wandb_rows(wandb_folder)})"
        print(
            f"{'':14} {seed:4}  {summary['graph/recovered']:9.3f}  "
            f"{summary['graph/parent_attention']:16.4f}  {first['gradient/edge_hits']:15.3f}  "
            f"{first['graph/f1']:8.3f}  {summary.get('loss/construction_gap', math.nan):16.4f}  "
            f"{rows:>10}"
        )
