"""What every worker process needs, imported once before workers are forked off."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import wandb  # noqa: F401

import mechcausal.resuming
import mechcausal.training  # noqa: F401
