"""What every worker process needs, imported once before workers are forked off."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import wandb  # noqa: E402, F401

import mechcausal.resuming  # noqa: E402, F401
import mechcausal.training  # noqa: E402, F401
