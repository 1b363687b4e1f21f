"""Runs that several tests of studies look at."""

import pytest

from mechcausal.recipes import parse_recipe
from mechcausal.training.run import RunResult, train
from tests.small_recipes import GRAPH, LEAN, without_figures


@pytest.fixture(scope="session")
def lean_run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run of a language model, four steps with checkpoints at 0, 2 and 4."""
    return train(parse_recipe(LEAN, source="test"), out=tmp_path_factory.mktemp("lean") / "run")


@pytest.fixture(scope="session")
def graph_run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run of one step on a causal graph, with a checkpoint at 1."""
    with without_figures():
        folder = tmp_path_factory.mktemp("graph") / "run"
        return train(parse_recipe(GRAPH, source="test"), out=folder)
