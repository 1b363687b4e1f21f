"""What every worker process needs, imported once before workers are forked off."""

import gc
import os

from mechcausal.cli import GARBAGE_THRESHOLD
from mechcausal.wandb_runs import load_wandb

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
gc.set_threshold(GARBAGE_THRESHOLD)

load_wandb()  # before TransformerLens

import mechcausal.experiments.causal_graph
import mechcausal.resuming
import mechcausal.training  # noqa: F401
