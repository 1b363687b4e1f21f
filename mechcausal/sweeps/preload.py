"""What every worker process needs, imported once before workers are forked off."""

import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import wandb.apis.public  # noqa: F401  before TransformerLens, see `wandb_runs.load_wandb`

import mechcausal.training.experiments.causal_graph
import mechcausal.training.resuming
import mechcausal.training.run  # noqa: F401
from mechcausal.cli.main import GARBAGE_THRESHOLD

gc.set_threshold(GARBAGE_THRESHOLD)
