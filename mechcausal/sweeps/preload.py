"""Imports that every worker process needs; the fork server runs them once, before it forks."""

from importlib import import_module

from mechcausal.records.wandb_runs import load_wandb
from mechcausal.support.startup import prepare_process

prepare_process()
load_wandb()  # before TransformerLens
for module in ("experiments.causal_graph", "resuming", "run"):
    import_module(f"mechcausal.training.{module}")
