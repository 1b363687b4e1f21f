"""Recipes of tasks beyond causal graphs: what they train, record and refuse."""

from pathlib import Path

import pytest
import torch

import mechcausal
from mechcausal.cli.main import main
from mechcausal.measures.figures import STEP
from mechcausal.recipes import Recipe, RecipeError, load_recipe
from mechcausal.records.run_data import RunData
from mechcausal.tasks.finite_prior import FinitePrior
from mechcausal.training.experiments import Generators, build_experiment, check_experiment
from mechcausal.training.experiments.tree import attention_by_height, common_heights
from mechcausal.training.recorded_run import Progress
from tests.run_folders import contexts_recipe, lags_recipe, recipe_of, tree_recipe
from tests.small_recipes import without_figures

SMALL = {
    **{"training__batch_size": 16, "evaluation__n_sequences": 64, "training__joint__steps": 12},
    **{"probing__every": 6, "probing__dense": 1, "wandb__mode": "disabled"},
}


STANDARD_CONTEXTS = contexts_recipe().with_overrides(
    model__kind="standard", model__initial_scale=0.0, model__n_heads=2, model__d_model=16
)


@pytest.mark.parametrize(
    "recipe",
    [tree_recipe(), lags_recipe(), contexts_recipe(), STANDARD_CONTEXTS],
    ids=["tree", "lags", "contexts", "contexts, standard"],
)
def test_a_run_is_recorded_read_back_and_resumed(recipe: Recipe, tmp_path: Path) -> None:
    small = recipe.with_overrides(**SMALL, checkpoints__schedule="probes")
    result = mechcausal.train(small, out=tmp_path / "run")
    run = RunData.load(result.folder)
    assert run.kind == recipe.task.kind
    assert [row[STEP] for row in run.history] == [0, 6, 12]
    last = {key: value for key, value in run.history[-1].items() if value is not None}
    assert last["loss/gap"] == pytest.approx(last["loss/eval"] - last["loss/bayes"])
    assert (result.folder / "figures" / "curves.png").stat().st_size > 1000
    assert (result.folder / "report.html").stat().st_size > 10_000
    model = mechcausal.load_model(result.folder / "model")
    assert model.cfg.attention_dir == recipe.model.attention

    def stop(progress: Progress) -> None:
        if progress.step == 8:
            raise RuntimeError("stopped")

    # The second one is neither drawn nor put on a page, which takes longer than its training.
    small = small.with_overrides(probing__report=False)
    with without_figures():
        with pytest.raises(RuntimeError, match="stopped"):
            mechcausal.train(small, out=tmp_path / "again", on_progress=stop)
        resumed = mechcausal.resume(tmp_path / "again")
    assert resumed.history[-1] == result.history[-1]


def test_a_fresh_model_of_trees_has_not_used_any_sibling() -> None:
    recipe = tree_recipe().with_overrides(**SMALL)
    experiment = build_experiment(recipe, Generators.from_seed(0, torch.device("cpu")))
    figures = experiment.observe().figures
    for height in (1, 2):
        assert figures[f"tree/residual_block_{height}"] > 0.05
    assert figures["tree/residual_pair_1"] == pytest.approx(figures["tree/residual_block_1"])


def test_a_tree_run_says_when_each_scale_was_used() -> None:
    recipe = tree_recipe().with_overrides(**SMALL)
    experiment = build_experiment(recipe, Generators.from_seed(0, torch.device("cpu")))
    rows = [
        {STEP: 0, "tree/use_of_scale_1": 0.1},
        {STEP: 5, "tree/use_of_scale_1": 0.6},
        {STEP: 9, "tree/use_of_scale_1": 0.9},
    ]
    assert experiment.conclusions(rows) == {
        "tree/step_of_scale_1": 5,
        "tree/step_of_scale_2": None,
    }


def test_uniform_attention_has_ratio_one_at_every_height() -> None:
    heights = common_heights(8)
    assert heights.flatten().bincount().tolist() == [8, 8, 16, 32]
    uniform = {"attention/layer0": torch.full((2, 8, 8), 1 / 8)}
    figures = attention_by_height(uniform)
    assert list(figures) == [f"tree/attention_L0_height_{h}" for h in range(4)]
    assert list(figures.values()) == pytest.approx([1.0] * 4)
    siblings = torch.zeros(1, 8, 8)
    siblings[0, range(8), [i ^ 1 for i in range(8)]] = 1.0
    assert attention_by_height({"attention/layer1": siblings}) == pytest.approx(
        {f"tree/attention_L1_height_{h}": 8.0 * (h == 1) for h in range(4)}
    )


def test_matrices_make_a_finite_prior_with_its_strategies() -> None:
    recipe = recipe_of(task__matrices=5, task__seed=7, evaluation__n_sequences=64)
    prior = recipe.build_prior()
    assert isinstance(prior, FinitePrior)
    assert (prior.n_matrices, prior.seed) == (5, 7)
    experiment = build_experiment(recipe, Generators.from_seed(0, torch.device("cpu")))
    figures = experiment.observe().figures
    weights = {k: v for k, v in figures.items() if k.startswith("strategy/weight_")}
    assert [key.removeprefix("strategy/weight_") for key in weights] == [
        *("uniform", "unigram", "bigram", "unigram_retrieval", "bigram_retrieval")
    ]
    assert sum(weights.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (tree_recipe(), {"task__filter": 3}, "task.filter: 0 to the depth, 2, allowed; found 3"),
        (tree_recipe(), {"task__depth": 11}, "task.depth"),
        (tree_recipe(), {"task__vocab_size": 65}, "at most 64 symbols for tree, found 65"),
        (tree_recipe(), {"task__lags": [1]}, "task.lags: belongs to kind selective_lags"),
        (
            tree_recipe(),
            {"model__attention": "causal"},
            "model.attention: tree needs bidirectional",
        ),
        (
            tree_recipe(),
            {"task__depth": 10, "task__vocab_size": 64, "evaluation__n_sequences": 100_000},
            "are for belief propagation: reduce task.depth, task.vocab_size",
        ),
        (lags_recipe(), {"task__lags": [1, 12]}, "at most 11 in a context of 12, found 12"),
        (lags_recipe(), {"task__lags": [2, 2]}, "distinct lags needed, found [2, 2]"),
        (lags_recipe(), {"task__kind": "lags"}, "task.kind"),
        (
            contexts_recipe(),
            {"task__positions": 100, "task__examples": 100},
            "task.examples: 100 + 1 examples of 100 positions are 10,100 tokens; at most 10,000",
        ),
        (contexts_recipe(), {"task__positions": 2}, "task.positions"),
        (contexts_recipe(), {"task__examples": 0}, "task.examples"),
        (contexts_recipe(), {"task__alpha": [1.0, 1.0]}, "2 values for a vocabulary of 3"),
        (contexts_recipe(), {"model__n_heads": 0}, "model.n_heads"),
        (contexts_recipe(), {"model__heads": [2, 1]}, "model.heads: not an option of kind in_con"),
        (contexts_recipe(), {"model__initial_scale": 0.0}, "must be above 0 with several heads"),
        (contexts_recipe(), {"model__kind": "simplified"}, "needs kind standard or in_context_g"),
        (
            contexts_recipe(),
            {"model__n_heads": 1000, "task__examples": 999, "task__positions": 10},
            "are for the model: reduce model.n_heads, task.vocab_size, task.positions",
        ),
        (
            recipe_of(),
            {"model__kind": "in_context_graphs", "training__algorithm": "joint"},
            "learns the task of that name alone, not causal_graph",
        ),
        (recipe_of(), {"task__positions": 4}, "task.positions: belongs to kind in_context_graphs"),
        (recipe_of(), {"task__depth": 2}, "task.depth: belongs to kind tree"),
        (
            recipe_of(),
            {"task__matrices": 2, "task__transition": [[1 / 3] * 3] * 3},
            "task.matrices: does not go with task.transition",
        ),
    ],
)
def test_settings_that_do_not_fit(recipe: Recipe, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        check_experiment(recipe.with_overrides(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_refuses_a_lag_beyond_the_sequence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "selective_lags", "--task.context", "8", "--task.lags", "1", "8"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "task.lags: at most 7 in a context of 8, found 8" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tree", "selective_lags", "finite_mixture", "in_context_graphs"])
def test_bundled_recipes_can_be_built(name: str) -> None:
    check_experiment(load_recipe(name))
