"""Recipes that train in a second, and runs that draw nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mechcausal.training.experiments.base import Experiment
from mechcausal.training.experiments.causal_graph import CausalGraphExperiment
from mechcausal.training.experiments.text import TextExperiment

LEAN = {
    "name": "lean",
    "task": {"kind": "repeated_tokens", "vocab_size": 12, "repeat_lengths": [3, 5]},
    "model": {"kind": "standard", "n_heads": 2, "d_model": 8},
    "training": {
        "algorithm": "joint",
        "batch_size": 4,
        "joint": {"steps": 4, "optimizer": "adam", "lr": 0.01},
    },
    "evaluation": {"n_sequences": 4},
    "probing": {"every": 2, "dense": 0, "images": 0, "report": False},
    "checkpoints": {"schedule": "probes"},
    "wandb": {"mode": "disabled"},
}
GRAPH = {
    "graph": {"preset": "chain", "sequence_length": 8},
    "task": {"vocab_size": 3},
    "training": {"batch_size": 8, "stage1": {"steps": 1}, "stage2": {"steps": 0}},
    "evaluation": {"n_sequences": 8, "bayes_draws": 2, "theory_priors": 10},
    "probing": {"images": 0, "report": False},
    "wandb": {"mode": "disabled"},
}


@contextmanager
def without_figures() -> Iterator[pytest.MonkeyPatch]:
    """Runs in the block draw no figures, which take most of the time of a short run.

    All but those of repeated tokens, whose few curves cost little.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        for experiment in (Experiment, CausalGraphExperiment, TextExperiment):
            monkeypatch.setattr(experiment, "draw_figures", lambda *_, **__: {})
        yield monkeypatch
