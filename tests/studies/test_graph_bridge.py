"""The bridge: skeletons recovered by every reading of a model whose graph is known."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from mechcausal.recipes import Recipe, RecipeError, load_recipe, parse_recipe
from mechcausal.records.run_folder import read_summary
from mechcausal.studies.explanations import bridge as module
from mechcausal.studies.explanations.bridge import bridge
from mechcausal.studies.explanations.recording import Comparison
from mechcausal.studies.explanations.skeletons import (
    READINGS,
    ModelSkeletons,
    discovered,
    largest,
    scores,
)
from mechcausal.support.signals import StopRequested
from mechcausal.training.run import Progress, RunResult, train
from probes.causal_discovery import discover_attention
from tests.small_recipes import without_figures

KINDS = ("simplified", "disentangled")


def lean(**changes: object) -> Recipe:
    data = {
        "name": "lean",
        "graph": {"preset": "manual", "parents": [-1, 0, 1, 1, 3]},
        "task": {"vocab_size": 3},
        "training": {
            "batch_size": 256,
            "stage1": {"steps": 60, "lr": 200},
            "stage2": {"steps": 2, "lr": 1},
        },
        "evaluation": {"n_sequences": 1024, "bayes_draws": 4, "theory_priors": 10},
        "probing": {"every": 60, "dense": 1, "images": 0, "report": False},
    }
    return parse_recipe(data, source="test").with_overrides(**changes)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, list[str]]:
    """A bridge whose runs each have a warning, with its lines of progress."""
    lines: list[str] = []

    def warned(recipe: Recipe, *, out: Path, **options: Any) -> RunResult:
        result = train(recipe, out=out, **options)
        result.warnings.append("W&B kept 1 of 2 rows")
        return result

    with without_figures() as monkeypatch:
        monkeypatch.setattr(module, "train", warned)
        monkeypatch.setattr(module, "_JOINT_STEPS", 30)
        result = bridge(
            lean(),
            seeds=1,
            n_sequences=2,
            folder=tmp_path_factory.mktemp("bridge") / "out",
            n_eff=5,
            quick=True,
            wandb_mode="disabled",
            on_progress=lines.append,
        )
    return result, lines


def test_every_reading_of_both_models_is_compared_and_recorded(
    compared: tuple[Comparison, list[str]],
) -> None:
    result, lines = compared
    rows = {(row.labels["model"], row.labels["reading"]): row.mean for row in result.rows}
    assert list(rows) == [(kind, reading) for kind in KINDS for reading in READINGS]
    for mean in rows.values():
        assert list(mean) == ["precision", "recall", "f1"]
        assert all(value is None or 0 <= value <= 1 for value in mean.values())
    # All weights of a disentangled model are 0 at its start: there is no gradient.
    assert rows["disentangled", "gradient_start"]["f1"] is None
    assert rows["simplified", "argmax"]["recall"] == 1
    assert len(lines) == 2
    assert json.loads((result.folder / "bridge.json").read_text()) == result.as_json()
    assert result.picture.stat().st_size > 10_000
    # Warnings of the runs are passed on; conditioning sets are as large as n_eff allows.
    assert result.warnings == [f"{kind}-seed-0: W&B kept 1 of 2 rows" for kind in KINDS]
    assert result.settings["max_cond"] == 1


def test_discovery_with_the_residual_keeps_every_edge_that_attention_learned(
    compared: tuple[Comparison, list[str]],
) -> None:
    from mechcausal.models.loading import load_graph_model
    from mechcausal.tasks import build_task

    recipe = lean()
    task = build_task(recipe.build_graph(), recipe.build_prior())
    model = load_graph_model(compared[0].folder / "simplified-seed-0" / "model")
    tokens = task.sample(1, generator=torch.Generator().manual_seed(0)).tokens
    heads = model.layer1_attention(tokens)[0].detach()
    n = task.graph.n_positions - (task.graph.query_parents is not None)
    skeleton = discovered(heads, n, 0.5, {}, n_eff=768, alpha=0.01, max_cond=3)
    assert {edge for edge in task.graph.edges if edge[1] < n} <= skeleton


def test_a_skeleton_holds_the_edges_of_any_head_and_scores_count_them() -> None:
    n = 4
    chain = torch.eye(n, dtype=torch.float64).roll(-1, 1).tril()
    chain[0, 0] = 1
    heads = torch.stack([chain, torch.eye(n, dtype=torch.float64)])
    skeleton = discovered(heads, n, 0.5, {}, n_eff=768, alpha=0.01, max_cond=2)
    mixed = (chain + torch.eye(n)) / 2
    graph = discover_attention(mixed, n_eff=768, ordered=True, max_cond=2).pag
    assert skeleton == {tuple(sorted(edge[:2])) for edge in graph.edges()}
    assert largest(heads[:1]) == {(0, 1), (1, 2), (2, 3)}
    assert largest(heads[1:]) == frozenset()
    true = frozenset({(0, 1), (1, 2), (2, 3), (0, 3)})
    pairs = [frozenset({(0, 1), (0, 2)}), frozenset()]
    skeletons = ModelSkeletons(true, n, {"a": pairs, "none": []})
    first, second = scores(skeletons, "a")
    assert first == {"precision": 0.5, "recall": 0.25, "f1": 2 / 6}
    assert second["precision"] != second["precision"]
    assert second["recall"] == second["f1"] == 0
    row = module._row("kind", "a", [skeletons])
    assert (row.mean["precision"], row.stderr["precision"]) == (0.5, None)
    assert row.mean["recall"] == pytest.approx(0.125)
    assert module._row("kind", "none", [skeletons, skeletons]).mean["f1"] is None


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("number", "nth"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_stopped_training_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, nth: int
) -> None:
    begun: list[Path] = []

    def stopped(recipe: Recipe, *, out: Path, **options: Any) -> RunResult:
        begun.append(out)

        def at(progress: Progress) -> None:
            if (len(begun), progress.step) == (nth, 2):
                signal.raise_signal(number)

        return train(recipe, out=out, on_progress=at, **options)

    monkeypatch.setattr(module, "train", stopped)
    recipe = lean(training__stage1__steps=3)
    with pytest.raises(StopRequested, match=f"stopped while {tmp_path}.* nothing was") as caught:
        bridge(recipe, seeds=2, n_sequences=1, folder=tmp_path, wandb_mode="disabled")
    assert caught.value.number == number
    assert len(begun) == nth
    assert read_summary(begun[-1])["state"] == "interrupted"
    assert not (tmp_path / "bridge.json").exists()


def test_what_cannot_be_compared_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for name in ("repeated_tokens", "figure8_mlp"):
        with pytest.raises(RecipeError, match="the bridge needs a causal graph"):
            bridge(load_recipe(name), seeds=1, n_sequences=1, folder=tmp_path / "out")
    with pytest.raises(ValueError, match="n_eff is 3; it must be above 3"):
        bridge(lean(), seeds=1, n_sequences=1, folder=tmp_path / "out", n_eff=3)
    assert not (tmp_path / "out").exists()
