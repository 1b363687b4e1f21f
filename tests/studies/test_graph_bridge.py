"""The bridge: what discovery and its rivals find in a model whose graph is known."""

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


def lean(**changes: object) -> Recipe:
    graph = {"preset": "manual", "parents": [-1, 0, 1, 1, 3]}
    data = {
        "graph": graph,
        "task": {"vocab_size": 3},
        "training": {
            "batch_size": 256,
            "stage1": {"steps": 60, "lr": 200},
            "stage2": {"steps": 2, "lr": 1},
        },
        "evaluation": {"n_sequences": 1024, "bayes_draws": 4, "theory_priors": 10},
        "probing": {"every": 60, "dense": 1, "images": 0, "report": False},
    }
    recipe = parse_recipe({**data, "name": "lean"}, source="test")
    return recipe.with_overrides(**changes) if changes else recipe


@pytest.mark.slow
def test_every_reading_of_both_models_is_compared_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_JOINT_STEPS", 30)
    lines: list[str] = []
    result = bridge(
        lean(),
        seeds=1,
        n_sequences=2,
        folder=tmp_path / "out",
        quick=True,
        wandb_mode="disabled",
        on_progress=lines.append,
    )
    kinds = ("simplified", "disentangled")
    assert [(r.model, r.reading) for r in result.rows] == [(k, x) for k in kinds for x in READINGS]
    rows = {(row.model, row.reading): row for row in result.rows}
    for row in result.rows:
        for value in (row.precision, row.recall, row.f1):
            assert value is None or 0 <= value <= 1
    # All weights of a disentangled model are 0 at its start: there is no gradient.
    assert rows["disentangled", "gradient_start"].f1 is None
    learned = rows["simplified", "argmax"]
    assert learned.recall == 1
    # Discovery with the residual keeps every edge that attention learned.
    assert rows["simplified", "layer1_residual"].recall == 1
    assert len(lines) == 2
    written = json.loads((tmp_path / "out" / "bridge.json").read_text())
    assert written == result.as_json()
    assert (tmp_path / "out" / "bridge.png").stat().st_size > 10_000


def test_a_skeleton_holds_the_edges_of_any_head_and_scores_count_them() -> None:
    n = 4
    chain = torch.eye(n, dtype=torch.float64).roll(-1, 1).tril()
    chain[0, 0] = 1
    heads = torch.stack([chain, torch.eye(n, dtype=torch.float64)])
    found = discovered(heads, n, 0.5, {}, n_eff=768, alpha=0.01, max_cond=2)
    mixed = (chain + torch.eye(n)) / 2
    graph = discover_attention(mixed, n_eff=768, ordered=True, max_cond=2).pag
    assert found == {
        (e.start, e.end) if e.start < e.end else (e.end, e.start) for e in graph.edges()
    }
    assert largest(heads[:1]) == {(0, 1), (1, 2), (2, 3)}
    assert largest(heads[1:]) == frozenset()
    true = frozenset({(0, 1), (1, 2), (2, 3), (0, 3)})
    skeletons = ModelSkeletons(
        true, n, {"a": [frozenset({(0, 1), (0, 2)}), frozenset()], "none": []}
    )
    first, second = scores(skeletons, "a")
    assert first == (0.5, 0.25, 2 / 6)
    assert second[0] != second[0]
    assert second[1:] == (0, 0)
    row = module._row("kind", "a", [skeletons])
    assert (row.precision, row.precision_stderr) == (0.5, None)
    assert row.recall == pytest.approx(0.125)
    assert module._row("kind", "none", [skeletons, skeletons]).f1 is None


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


def test_what_went_wrong_with_recording_a_training_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned(recipe: Recipe, *, out: Path, **options: Any) -> RunResult:
        result = train(recipe, out=out, **options)
        result.warnings.append("W&B kept 1 of 2 rows")
        return result

    monkeypatch.setattr(module, "train", warned)
    monkeypatch.setattr(module, "_JOINT_STEPS", 3)
    recipe = lean(training__stage1__steps=3)
    result = bridge(recipe, seeds=1, n_sequences=1, folder=tmp_path, wandb_mode="disabled")
    assert result.warnings == [
        f"{kind}-seed-0: W&B kept 1 of 2 rows" for kind in ("simplified", "disentangled")
    ]


@pytest.mark.parametrize("name", ["repeated_tokens", "figure8_mlp"])
def test_recipes_without_a_graph_in_their_attention_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="the bridge needs a causal graph"):
        bridge(load_recipe(name), seeds=1, n_sequences=1, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_conditioning_sets_are_no_larger_than_n_eff_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_JOINT_STEPS", 3)
    recipe = lean(training__stage1__steps=3)
    with pytest.raises(ValueError, match="n_eff is 3; it must be above 3"):
        bridge(recipe, seeds=1, n_sequences=1, folder=tmp_path, n_eff=3)
    result = bridge(recipe, seeds=1, n_sequences=1, folder=tmp_path, n_eff=5, wandb_mode="disabled")
    assert result.settings["max_cond"] == 1
