"""The list of figures: it holds every figure that a run writes, and the docs show it."""

import math
import re
from pathlib import Path

import pytest
import torch

from mechcausal.measures.figures import axis_limits, figure_of, figures, keys_in
from mechcausal.recipes import Recipe
from mechcausal.training.experiments import Generators, build_experiment
from tests.run_folders import (
    contexts_recipe,
    heads_recipe,
    lags_recipe,
    recipe_of,
    tree_recipe,
    two_parents_recipe,
)


def figures_table() -> str:
    """The table of docs/figures.md, to copy there when the list changes."""
    rows = ["| key | name | unit | range | meaning |", "|---|---|---|---|---|"]
    for item in figures().values():
        low, high = (f"{bound:g}".replace("inf", "∞") for bound in (item.low, item.high))
        key, label = (re.sub(r"{(\w+)}", r"‹\1›", text) for text in (item.key, item.label))
        limits = f"{low} to {high}".replace("-", "−")
        rows.append(f"| `{key}` | {label} | {item.unit} | {limits} | {item.meaning} |")
    return "\n".join(rows) + "\n"


def test_the_page_of_figures_shows_the_list(repository: Path) -> None:
    page = (repository / "docs" / "figures.md").read_text(encoding="utf-8")
    assert figures_table() in page, f"docs/figures.md needs this table:\n{figures_table()}"


@pytest.mark.parametrize(
    "recipe",
    [
        recipe_of(),
        recipe_of(task__matrices=4),
        *(two_parents_recipe(), heads_recipe(), tree_recipe(), lags_recipe(), contexts_recipe()),
    ],
)
def test_every_figure_of_a_run_is_listed_and_in_its_range(recipe: Recipe) -> None:
    recipe = recipe.with_overrides(evaluation__n_sequences=16, evaluation__theory_priors=10)
    experiment = build_experiment(recipe, Generators.from_seed(0, torch.device("cpu")))
    written = experiment.observe().figures | experiment.losses() | {"loss/train": 1.0}
    for key, value in written.items():
        item = figure_of(key)
        assert item.meaning, f"{key} is missing in figures.toml"
        assert "{" not in item.label
        if not math.isnan(value):
            assert item.low - 1e-6 <= value <= item.high + 1e-6, key


def test_families_are_told_apart() -> None:
    assert figure_of("gradient/pattern_edge_hits").label == "parents named by ∂L/∂pattern"
    assert figure_of("gradient/head1/pattern_chi2_correlation").label.startswith("head 1")
    assert figure_of("no/such").title == "no/such"
    rows = [{"heads/L0H1/induction": 0.1, "heads/L0H1/previous_token": 0.1}]
    assert keys_in(rows, ["heads/{head}/induction"]) == ["heads/L0H1/induction"]


def test_axes_hold_the_range_of_their_figures() -> None:
    assert axis_limits(["loss/eval"], [0.3]) is None
    assert axis_limits(["graph/recovered", "graph/f1"], [0.2]) == (-0.03, 1.05)
    assert axis_limits(["gradient/theory_correlation"], [-0.4, None]) == pytest.approx(
        (-0.45, 1.05)
    )
    assert all(item.low < item.high for item in figures().values())
