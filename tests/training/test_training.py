"""The training loop: it learns, it repeats bit for bit, and watching it does not change it."""

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mechcausal.measures.closed_form_observer import ClosedFormObserver
from mechcausal.measures.plateaus import find_drops, find_plateaus
from mechcausal.models.adapter import load_model
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.loading import load_graph_model
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.models.standard import StandardTransformer
from mechcausal.recipes import (
    ProbingSection,
    Recipe,
    RecipeError,
    StageSection,
    load_recipe,
    parse_recipe,
)
from mechcausal.recipes.stages import Stage, learning_rate, probe_steps, stages
from mechcausal.records.run_folder import MATRICES_FILE, read_metrics, read_summary
from mechcausal.studies.detection import detect
from mechcausal.studies.targets import load_target
from mechcausal.tasks import SeveralParentsTask, soft_cross_entropy
from mechcausal.training.checkpoints import checkpoint_folders
from mechcausal.training.experiments import Generators, build_experiment
from mechcausal.training.experiments.causal_graph import CausalGraphExperiment, hooked_look_seconds
from mechcausal.training.run import NonFiniteLossError, Progress, RunResult, check, train
from tests.refusals import raises_one_line

# What a run on a graph with edges reports, by the names of design.md.
FIGURES = {
    *("loss/train", "loss/eval", "loss/bayes", "loss/gap"),
    *("loss/construction", "loss/construction_gap"),
    *("graph/recovered", "graph/parent_attention", "graph/f1"),
    *("gradient/edge_hits", "gradient/theory_correlation"),
    *("gradient/chi2_correlation", "gradient/shannon_correlation"),
    *("induction/score", "induction/attention", "induction/prefix_matching"),
    *("induction/copying", "induction/formation_step"),
    *("strategy/kl_uniform", "strategy/kl_unigram", "strategy/kl_bigram"),
}


def tiny(**overrides: Any) -> Recipe:
    """S = 3, T = 8, a Markov chain; a dozen steps, W&B off."""
    data = {
        "name": "tiny",
        "graph": {"preset": "chain", "sequence_length": 8},
        "task": {"vocab_size": 3, "alpha": 0.3},
        "training": {
            "batch_size": 64,
            "stage1": {"steps": 8, "lr": 100.0},
            "stage2": {"steps": 4, "lr": 10.0},
            "joint": {"steps": 8, "optimizer": "adam", "lr": 0.05},
        },
        "evaluation": {"n_sequences": 64, "bayes_draws": 8, "theory_priors": 50},
        "probing": {"every": 4, "dense": 2, "images": 0, "report": False},
        "wandb": {"mode": "disabled"},
    }
    return parse_recipe(data, source="test").with_overrides(**overrides)


def graph_experiment(run: RunResult) -> CausalGraphExperiment:
    """The run's experiment, known to be that of a causal graph."""
    assert isinstance(run.experiment, CausalGraphExperiment)
    return run.experiment


def simplified(run: RunResult) -> SimplifiedTransformer:
    """The run's model, known to be the simplified one."""
    model = graph_experiment(run).model
    assert isinstance(model, SimplifiedTransformer)
    return model


def weights(run: RunResult) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "model" / "model.safetensors")


@pytest.fixture
def figures() -> None:
    """For tests that look at figures; the others leave them out, which saves half the time."""


@pytest.fixture(autouse=True)
def _figures_are_left_out(request: pytest.FixtureRequest) -> None:
    if "figures" not in request.fixturenames:
        request.getfixturevalue("no_figures")


@pytest.fixture(scope="module")
def progress() -> list[Progress]:
    """What the run tells while it trains."""
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, progress: list[Progress]) -> RunResult:
    """One tiny run that several tests read."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return train(tiny(), out=folder, on_progress=progress.append)


# --- It learns ---


@pytest.mark.slow
def test_markov_chain_recipe_recovers_the_chain_at_once(tmp_path: Path) -> None:
    recipe = load_recipe("markov_chain").with_overrides(
        wandb__mode="disabled",
        training__stage1__steps=100,  # a third of the recipe's
        training__stage2__steps=100,
        probing__every=50,
        probing__report=False,
    )
    summary = train(recipe, out=tmp_path / "run").summary
    assert summary["first"]["gradient/edge_hits"] == 1.0
    assert summary["graph/recovered"] == 1.0
    assert summary["graph/parent_attention"] >= 0.99
    assert summary["induction/score"] > 0.5
    assert 0 < summary["loss/gap"] < summary["first"]["loss/gap"]


@pytest.mark.parametrize("preset", ["chain", "icl_pairs", "star"])
def test_small_graph_is_recovered(tmp_path: Path, preset: str) -> None:
    recipe = tiny(
        graph__preset=preset,
        task__alpha=0.1,
        training__batch_size=1024,
        training__stage1__steps=60,
        training__stage1__lr=2000.0,
        training__stage2__steps=30,
        evaluation__n_sequences=1024,
        probing__every=50,
    )
    summary = train(recipe, out=tmp_path / "run").summary
    assert summary["first"]["gradient/edge_hits"] == 1.0
    assert summary["graph/recovered"] == 1.0
    assert summary["graph/parent_attention"] >= 0.99
    assert summary["loss/eval"] < summary["first"]["loss/eval"]


@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 0.05), ("sgd", 20.0)])
def test_joint_training_lowers_the_loss_and_moves_both_layers(
    tmp_path: Path, optimizer: str, lr: float
) -> None:
    recipe = tiny(
        training__algorithm="joint",
        training__batch_size=256,
        training__joint__optimizer=optimizer,
        training__joint__lr=lr,
        training__joint__steps=40,
    )
    result = train(recipe, out=tmp_path / "run")
    assert result.summary["loss/eval"] < result.summary["first"]["loss/eval"]
    assert simplified(result).A1.abs().max() > 0
    assert not torch.equal(simplified(result).A2, torch.eye(3))


def test_two_stages_train_one_layer_each(tmp_path: Path) -> None:
    first = simplified(train(tiny(training__stage2__steps=0), out=tmp_path / "first"))
    assert first.A1.abs().max() > 0
    assert torch.equal(first.A2, torch.eye(3))
    second = simplified(train(tiny(training__stage1__steps=0), out=tmp_path / "second"))
    assert torch.equal(second.A1, torch.zeros(8, 8))
    assert not torch.equal(second.A2, torch.eye(3))


def test_a_fixed_transition_matrix_in_place_of_the_prior(tmp_path: Path) -> None:
    matrix = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]
    result = train(tiny(task__transition=matrix), out=tmp_path / "run")
    assert result.state == "finished"
    entropy = -sum(p * math.log(p) for p in matrix[0])  # what knowing the matrix leaves
    assert result.summary["loss/bayes"] == pytest.approx(entropy, abs=1e-4)


def test_graph_without_edges_trains_and_leaves_out_the_figures_of_edges(
    tmp_path: Path, figures: None
) -> None:
    graph = {"preset": "manual", "parents": [-1] * 5}
    result = train(tiny(graph=graph), out=tmp_path / "run")
    assert result.state == "finished"
    assert "graph/recovered" not in result.summary
    assert "gradient/edge_hits" not in result.summary
    assert (result.folder / "figures" / "curves.png").is_file()


# --- It repeats ---


def test_same_seed_gives_the_same_numbers_and_weights(run: RunResult, tmp_path: Path) -> None:
    torch.manual_seed(12345)  # the global generator plays no part
    again = train(tiny(), out=tmp_path / "again")
    for name in ("metrics.jsonl", "model/model.safetensors", MATRICES_FILE):
        assert (again.folder / name).read_bytes() == (run.folder / name).read_bytes()


def test_other_seed_gives_other_data(run: RunResult, tmp_path: Path) -> None:
    other = train(tiny(seed=1), out=tmp_path / "other")
    assert [row["loss/train"] for row in other.history] != [
        row["loss/train"] for row in run.history
    ]
    assert other.summary["loss/bayes"] != run.summary["loss/bayes"]


def test_a_frame_has_a_row_for_every_probe_step(run: RunResult) -> None:
    frame = run.to_frame()
    assert list(frame["train/step"]) == [row["train/step"] for row in run.history]
    assert set(frame) == {name for row in run.history for name in row}
    assert frame["loss/eval"].iloc[-1] == run.summary["loss/eval"]


def test_what_takes_long_before_the_first_step_is_told(
    run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechcausal.training.recorded_run.SILENT_SECONDS", -1.0)
    monkeypatch.setattr("mechcausal.theory.pairwise._MAX_ELEMENTS", 1)  # one draw at a time
    told: list[Progress] = []
    other = train(tiny(), out=tmp_path / "other", on_progress=told.append)
    assert (told[0].step, told[0].is_preparing) == (0, True)
    assert told[0].stage == "theory: 1 of 50 draws of the prior"
    assert [p.step for p in told if not p.is_preparing] == list(range(13))
    assert other.history[-1]["loss/eval"] == run.history[-1]["loss/eval"]


def test_theory_takes_no_longer_than_the_recipe_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechcausal.theory.pairwise._MAX_ELEMENTS", 1)
    recipe = tiny(evaluation__theory_seconds=1e-9)
    result = train(recipe, out=tmp_path / "run")
    assert graph_experiment(result).theory.n_priors == 2
    (warning,) = read_summary(result.folder)["warnings"]
    assert warning.startswith("theory was averaged over 2 draws of the prior in place of 50")
    assert "raise evaluation.theory_seconds" in warning


def test_looks_that_would_take_too_long_read_the_closed_form(
    run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechcausal.training.experiments.causal_graph._MOST_SECONDS", 0.0)
    other = train(tiny(), out=tmp_path / "other")
    assert isinstance(graph_experiment(other).observer, ClosedFormObserver)
    (warning,) = other.warnings
    assert warning.endswith("attention and gradients are computed in closed form instead")
    for ours, theirs in zip(other.history, run.history, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if value is None:
                assert ours[name] is None
            elif not name.endswith("_spearman"):  # ranks show every rounding
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-4, nan_ok=True), name


def test_the_cost_of_a_look_grows_with_its_sizes() -> None:
    small = hooked_look_seconds(SimplifiedTransformer(10, 20), 1024)
    assert small < 1
    assert hooked_look_seconds(SimplifiedTransformer(10, 20), 2048) == pytest.approx(2 * small)
    assert hooked_look_seconds(SimplifiedTransformer(100, 400), 1024) > 100


@pytest.mark.parametrize(
    "overrides",
    [
        {"probing__enabled": False},
        {
            "probing__every": 1,
            "evaluation__n_sequences": 7,
            "evaluation__bayes_draws": 3,
            "evaluation__theory_priors": 10,
        },
    ],
    ids=["without probes", "other probes"],
)
def test_watching_does_not_change_what_is_learned(
    run: RunResult, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    other = train(tiny(**overrides), out=tmp_path / "other")
    losses = {row["train/step"]: row["loss/train"] for row in run.history}
    common = [row for row in other.history if row["train/step"] in losses]
    assert {0, 12} <= {row["train/step"] for row in common}
    for row in common:
        assert row["loss/train"] == losses[row["train/step"]]
    assert (other.folder / "model/model.safetensors").read_bytes() == (
        run.folder / "model/model.safetensors"
    ).read_bytes()
    if not other.experiment.recipe.probing.enabled:  # the losses alone are kept
        assert [row["train/step"] for row in other.history] == [0, 12]
        assert {"loss/train", "loss/eval", "loss/bayes", "loss/gap"} <= set(other.summary)
        assert "graph/recovered" not in other.summary
        assert not (other.folder / "figures").exists()


def test_evaluation_is_split_without_changing_the_figures(
    run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mechcausal.models.predicting._MAX_ENTRIES", 1000
    )  # 15 of 64 sequences at a time
    other = train(tiny(), out=tmp_path / "other")
    for key in ("loss/eval", "graph/f1", "gradient/theory_correlation", "induction/score"):
        for ours, theirs in zip(run.history, other.history, strict=True):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-3, nan_ok=True)


# --- Every step is the one that the recipe describes ---


def disentangled(**overrides: Any) -> Recipe:
    """A disentangled transformer with a start that weight decay can shrink; joint training."""
    return tiny(
        **{
            "model__kind": "disentangled",
            "model__initial_scale": 0.3,
            "training__algorithm": "joint",
            "training__joint__steps": 6,
            "training__joint__optimizer": "sgd",
            "training__joint__lr": 1.0,
            "probing__enabled": False,
        }
        | overrides
    )


def several_parents(**overrides: Any) -> Recipe:
    """Two parents for each position, two heads."""
    graph = {"preset": "two_parents", "sequence_length": 8}
    several = {"graph": graph, "model__heads": (2, 1)}
    return disentangled(**several | overrides)


def at_the_start(recipe: Recipe) -> CausalGraphExperiment:
    generators = Generators.from_seed(recipe.seed, torch.device("cpu"))
    experiment = build_experiment(recipe, generators)
    assert isinstance(experiment, CausalGraphExperiment)
    return experiment


def parameters(experiment: CausalGraphExperiment) -> list[torch.nn.Parameter]:
    return list(experiment.model.parameters_by_name.values())


def test_the_cosine_schedule_steps_with_its_learning_rates_bit_by_bit(tmp_path: Path) -> None:
    recipe = disentangled(training__joint__schedule="cosine", training__joint__weight_decay=0.01)
    run = train(recipe, out=tmp_path / "run")
    by_hand, steps = at_the_start(recipe), recipe.training.joint.steps
    optimizer = torch.optim.SGD(parameters(by_hand), lr=123.0, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.5 * 1.0 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        by_hand.training_loss(64).backward()
        optimizer.step()
    for ours, theirs in zip(parameters(graph_experiment(run)), parameters(by_hand), strict=True):
        assert torch.equal(ours, theirs)


def test_the_summary_names_plateaus_and_drops(tmp_path: Path) -> None:
    recipe = tiny(probing__every=1, training__stage2__steps=0, training__stage1__steps=12)
    result = train(recipe, out=tmp_path / "run")
    stored = read_summary(tmp_path / "run")
    for name, find in (("plateaus", find_plateaus), ("drops", find_drops)):
        assert stored[name] == result.summary[name] == [asdict(x) for x in find(result.history)]


def test_a_warm_up_rises_in_a_straight_line_under_any_schedule() -> None:
    constant = StageSection(steps=8, lr=2.0, warmup=4)
    assert [learning_rate(constant, t) for t in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    cosine = StageSection(steps=8, lr=2.0, warmup=4, schedule="cosine")
    plain = StageSection(steps=8, lr=2.0, schedule="cosine")
    for t in range(8):
        expected = min(1.0, (t + 1) / 4) * learning_rate(plain, t)
        assert learning_rate(cosine, t) == pytest.approx(expected)


def test_each_stage_has_a_cosine_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    step = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, closure: None = None) -> None:
        used.append(self.param_groups[0]["lr"])
        step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    train(
        tiny(
            probing__enabled=False,
            training__stage1__schedule="cosine",
            training__stage2__schedule="cosine",
        ),
        out=tmp_path / "run",
    )
    expected = [
        0.5 * lr * (1 + math.cos(math.pi * t / n))
        for lr, n in ((100.0, 8), (10.0, 4))
        for t in range(n)
    ]
    assert used == expected


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_is_that_of_the_optimizers_definition(tmp_path: Path, optimizer: str) -> None:
    lr, decay, steps = (0.5, 0.2, 5) if optimizer == "sgd" else (0.02, 0.2, 5)
    recipe = disentangled(
        training__joint__optimizer=optimizer,
        training__joint__lr=lr,
        training__joint__steps=steps,
        training__joint__weight_decay=decay,
    )
    run = train(recipe, out=tmp_path / "run")
    by_hand = at_the_start(recipe)
    held = parameters(by_hand)
    first = [torch.zeros_like(p) for p in held]
    second = [torch.zeros_like(p) for p in held]
    for step in range(1, steps + 1):
        gradients = torch.autograd.grad(by_hand.training_loss(64), held)
        with torch.no_grad():
            for p, gradient, m, v in zip(held, gradients, first, second, strict=True):
                if optimizer == "sgd":
                    p.sub_(lr * (gradient + decay * p))
                    continue
                m.mul_(0.9).add_(0.1 * gradient)
                v.mul_(0.999).add_(0.001 * gradient**2)
                p.mul_(1 - lr * decay)
                root = (v / (1 - 0.999**step)).sqrt() + 1e-8
                p.sub_(lr * m / (1 - 0.9**step) / root)
    for ours, theirs in zip(parameters(graph_experiment(run)), held, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [disentangled, several_parents])
def test_accumulated_parts_are_one_batch_of_the_same_parts(tmp_path: Path, make: Any) -> None:
    recipe = make(training__accumulation=4, training__joint__steps=3)
    run = train(recipe, out=tmp_path / "run")
    by_hand = at_the_start(recipe)
    generator = Generators.from_seed(recipe.seed, torch.device("cpu")).data
    losses = []
    for _ in range(3):
        parts = [by_hand.task.sample(16, generator=generator) for _ in range(4)]
        tokens, target = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "target")
        )
        loss = soft_cross_entropy(by_hand.model(tokens), target, epsilon=1e-3)
        losses.append(loss.item())
        with torch.no_grad():
            held = parameters(by_hand)
            for p, gradient in zip(held, torch.autograd.grad(loss, held), strict=True):
                p.sub_(gradient)
    for ours, theirs in zip(parameters(graph_experiment(run)), parameters(by_hand), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert run.history[0]["loss/train"] == pytest.approx(losses[0], rel=1e-6)


# --- The paper's other models ---


def finite(run: RunResult, *prefixes: str) -> None:
    """All figures of these names are numbers in the last row."""
    last = {k: v for k, v in run.history[-1].items() if k.startswith(prefixes)}
    assert last
    assert all(value is not None and math.isfinite(value) for value in last.values()), last


def check_files(run: RunResult, *figures: str) -> None:
    assert run.state == "finished"
    assert {path.name for path in (run.folder / "figures").iterdir()} == set(figures)
    for name in figures:
        assert (run.folder / "figures" / name).stat().st_size > 5000
    assert [row["train/step"] for row in read_metrics(run.folder)] == [
        row["train/step"] for row in run.history
    ]
    for row in run.history:
        for name in ("loss/train", "loss/eval", "loss/bayes", "loss/gap"):
            assert math.isfinite(row[name])
    loaded = load_graph_model(run.folder / "model")
    experiment = graph_experiment(run)
    assert type(loaded) is type(experiment.model)
    tokens = experiment.task.sample(8, generator=torch.Generator().manual_seed(0)).tokens
    assert torch.equal(loaded(tokens), experiment.model(tokens))


WATCHED = {"probing__enabled": True, "probing__every": 15, "probing__dense": 2}
FIGURE_FILES = ("attention.png", "gradient.png", "curves.png")


def test_a_disentangled_model_trains_from_end_to_end(tmp_path: Path, figures: None) -> None:
    recipe = disentangled(
        training__joint__steps=30,
        training__joint__optimizer="adam",
        training__joint__lr=0.05,
        training__batch_size=256,
        model__initial_scale=0.0,
        **WATCHED,
    )
    run = train(recipe, out=tmp_path / "run")
    check_files(run, *FIGURE_FILES, "blocks.png")
    assert isinstance(graph_experiment(run).model, DisentangledTransformer)
    summary = read_summary(run.folder)
    assert {"graph/rows_matched", "graph/f1", "graph/recovered"} <= set(summary)
    assert "graph/head_consistency" not in summary
    assert summary["loss/eval"] < summary["first"]["loss/eval"]
    assert summary["first"]["blocks/solution_share"] is None  # W is still 0
    finite(run, "loss/", "graph/", "gradient/", "blocks/", "composition/", "strategy/")
    saved = load_file(run.folder / MATRICES_FILE)
    assert saved["00000030/attention/layer0"].shape == (8, 8)
    assert "theory/gradient" in saved


def test_several_parents_train_from_end_to_end(tmp_path: Path, figures: None) -> None:
    recipe = several_parents(
        training__joint__steps=30,
        training__joint__optimizer="adamw",
        training__joint__lr=0.03,
        training__joint__schedule="cosine",
        training__target="posterior",
        **WATCHED,
    )
    run = train(recipe, out=tmp_path / "run")
    check_files(run, *FIGURE_FILES, "blocks.png")
    summary = read_summary(run.folder)
    assert {
        *("graph/rows_matched", "graph/head_consistency", "graph/query_attention"),
        *("graph/recovered", "graph/parent_attention", "blocks/solution_share"),
        *("strategy/kl_bigram", "strategy/kl_trigram", "gradient/edge_hits"),
        *("composition/L1H0_reads_L0H0", "composition/L1H0_reads_L0H1"),
    } <= set(summary)
    assert {"graph/f1", "gradient/theory_correlation"}.isdisjoint(summary)
    assert summary["loss/eval"] < summary["first"]["loss/eval"]
    finite(run, "loss/", "graph/", "gradient/", "blocks/", "composition/", "strategy/")
    saved = load_file(run.folder / MATRICES_FILE)
    assert saved["00000030/attention/layer0"].shape == (2, 8, 8)
    assert saved["theory/chi2"].shape == (9, 9)  # the token to be predicted is the ninth
    assert "theory/gradient" not in saved


def test_a_standard_model_with_an_mlp_trains_and_is_looked_at_afterwards(
    tmp_path: Path, figures: None
) -> None:
    recipe = tiny(
        graph__sequence_length=10,
        model__kind="standard",
        model__n_heads=1,
        model__d_model=16,
        model__d_mlp=32,
        training__algorithm="joint",
        training__batch_size=256,
        training__joint__steps=30,
        training__joint__optimizer="adamw",
        training__joint__lr=0.01,
        training__joint__weight_decay=2e-4,
        checkpoints__schedule="probes",
        **WATCHED,
    )
    run = train(recipe, out=tmp_path / "run")
    check_files(run, *FIGURE_FILES)
    assert isinstance(graph_experiment(run).model, StandardTransformer)
    assert run.summary["loss/eval"] < run.summary["first"]["loss/eval"]
    finite(run, "loss/", "graph/", "gradient/", "composition/", "strategy/", "induction/score")
    for step in (None, 0, 30):
        target = load_target(str(run.folder), step=step)
        assert not target.predicts_every_token
        assert target.bos is None
        detection = detect(target, n_sequences=4, compose=True)
        assert detection.scores.prefix_matching.shape == (2, 1)
        assert bool(detection.scores.prefix_matching.isfinite().all())
    with pytest.raises(ValueError, match="needs next-token predictions"):
        detect(target, n_sequences=4, ablate=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrix products on several threads of a busy machine may add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["disentangled", "standard"])
def test_the_other_models_repeat_bit_by_bit(tmp_path: Path, kind: str, one_thread: None) -> None:
    recipe = tiny(model__kind=kind, training__algorithm="joint", training__joint__steps=4)
    runs = [train(recipe, out=tmp_path / name) for name in ("one", "two")]
    for name in ("metrics.jsonl", "model/model.safetensors", MATRICES_FILE):
        first, second = ((run.folder / name).read_bytes() for run in runs)
        assert first == second
    unwatched = train(recipe.with_overrides(probing__enabled=False), out=tmp_path / "three")
    for name, weight in weights(runs[0]).items():
        assert torch.equal(weights(unwatched)[name], weight)


# --- The posterior as target ---


def test_the_posterior_is_no_target_for_single_parents(tmp_path: Path) -> None:
    with raises_one_line(RecipeError, match="posterior is for graphs that name"):
        train(disentangled(training__target="posterior"), out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_posterior_has_the_expected_gradient_of_the_sampled_target() -> None:
    """Pairs of gradients on the same sequences: their difference is noise around zero."""
    recipe = several_parents(graph__sequence_length=6, task__vocab_size=2)
    n_batches, gradients = 60, []
    for target in ("sampled", "posterior"):
        experiment = at_the_start(recipe.with_overrides(training__target=target))
        assert isinstance(experiment.task, SeveralParentsTask)
        held = parameters(experiment)
        with torch.no_grad():
            held[-1].copy_(torch.randn(held[-1].shape, generator=torch.Generator().manual_seed(5)))
        rows = [torch.autograd.grad(experiment.training_loss(250), held) for _ in range(n_batches)]
        gradients.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    sampled, posterior = gradients
    # Idle heads, and keys that no query sees, have no gradient at all.
    moved = sampled.abs().sum(0) > 1e-6 * sampled.abs().sum(0).max()
    sampled, posterior = sampled[:, moved].double(), posterior[:, moved].double()
    difference = sampled - posterior
    scores = difference.mean(0) / (difference.std(0) / n_batches**0.5)
    assert scores.abs().max() < 5.5
    assert scores.square().mean() < 2  # entries of one gradient hang together: few of them count
    # As a whole: the mean difference is as small as the noise of its own average.
    noise = difference.var(0).sum() / n_batches
    assert difference.mean(0).square().sum() < 3 * noise
    assert posterior.var(0).sum() < 0.8 * sampled.var(0).sum()


# --- When it is looked at ---


def plan(*lengths: int) -> list[Stage]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        Stage(f"stage{i}", ("A1",), StageSection(steps=steps), start)
        for i, (steps, start) in enumerate(zip(lengths, starts, strict=True))
    ]


@pytest.mark.parametrize(
    ("probing", "expected"),
    [
        (ProbingSection(every=4, dense=0), [0, 4, 8, 10, 14, 16]),
        (ProbingSection(every=100, dense=3), [0, 1, 2, 10, 11, 12, 16]),
        (ProbingSection(every=100, dense=50), list(range(17))),
        (ProbingSection(every=1, dense=0), list(range(17))),
        (ProbingSection(schedule="geometric", dense=0), [0, 1, 2, 4, 8, 11, 12, 14, 16]),
        (ProbingSection(schedule="geometric", dense=1), [0, 1, 2, 4, 8, 10, 11, 12, 14, 16]),
        (ProbingSection(enabled=False), [0, 16]),
    ],
)
def test_probe_steps_follow_the_schedule(probing: ProbingSection, expected: list[int]) -> None:
    assert probe_steps(probing, plan(10, 6)) == expected
    assert probe_steps(probing, plan(1)) == [0, 1]


def test_stages_without_steps_are_left_out() -> None:
    assert [s.name for s in stages(tiny())] == ["stage1", "stage2"]
    (only,) = stages(tiny(training__stage1__steps=0))
    assert (only.name, only.parameters, only.start) == ("stage2", ("A2",), 0)
    (joint,) = stages(tiny(training__algorithm="joint"))
    assert joint.parameters == ("all",)


def test_history_has_a_row_for_every_probe_step(run: RunResult) -> None:
    expected = probe_steps(tiny().probing, stages(tiny()))
    assert [row["train/step"] for row in run.history] == expected
    assert [row["train/step"] for row in read_metrics(run.folder)] == expected


def test_progress_is_told_at_every_step(run: RunResult, progress: list[Progress]) -> None:
    assert [told.step for told in progress] == list(range(13))
    assert {told.n_steps for told in progress} == {12}
    assert [told.stage for told in progress] == ["stage1"] * 8 + ["stage2"] * 5
    assert all("loss/gap" in told.figures for told in progress)


# --- What is left behind ---


def test_summary_holds_every_name_of_the_design(run: RunResult) -> None:
    summary = read_summary(run.folder)
    assert set(summary) >= FIGURES | {"first", "state", "train/steps", "train/step", "recipe"}
    assert set(summary["first"]) >= FIGURES
    assert summary["first"]["train/step"] == 0
    assert (summary["state"], summary["train/steps"], summary["recipe"]) == ("finished", 12, "tiny")
    assert summary["rows"] == len(run.history)
    last = read_metrics(run.folder)[-1]
    assert {key: summary[key] for key in last} == last


def test_run_folder_holds_the_recipe_that_repeats_the_run(run: RunResult) -> None:
    assert load_recipe(run.folder / "recipe.toml") == tiny()
    assert {path.name for path in run.folder.iterdir()} == {
        *("recipe.toml", "metrics.jsonl", "summary.json", "run.json", ".lock"),
        *("checkpoints", "figures", "model", MATRICES_FILE),
    }


def test_saved_model_computes_the_same(run: RunResult) -> None:
    tokens = (
        graph_experiment(run).task.sample(20, generator=torch.Generator().manual_seed(0)).tokens
    )
    loaded = SimplifiedTransformer.load(run.folder / "model")
    with torch.no_grad():
        assert torch.equal(loaded(tokens), simplified(run)(tokens))
        hooked = load_model(run.folder / "model")(tokens)[:, -1]
    assert torch.allclose(hooked, simplified(run)(tokens), atol=1e-6)


def test_saved_matrices_are_those_that_were_seen(run: RunResult) -> None:
    saved = load_file(run.folder / MATRICES_FILE)
    assert torch.equal(saved["theory/chi2"], graph_experiment(run).theory.chi2)
    assert torch.equal(saved["theory/gradient"], graph_experiment(run).theory.predicted_gradient)
    steps = {int(key.split("/")[0]) for key in saved if key[0].isdigit()}
    assert {0, 12} <= steps <= {row["train/step"] for row in run.history}
    for name in ("attention/layer0", "gradient/scores", "gradient/pattern"):
        assert saved[f"00000000/{name}"].shape == (8, 8)
    uniform = torch.ones(8, 8).tril() / torch.arange(1, 9).unsqueeze(1)
    assert torch.allclose(saved["00000000/attention/layer0"], uniform)
    last = saved["00000012/attention/layer0"]
    assert torch.allclose(last, simplified(run).attention1().detach(), atol=1e-6)


def test_formation_step_is_the_first_with_a_strong_induction_head(tmp_path: Path) -> None:
    recipe = tiny(
        graph={"preset": "chain", "sequence_length": 16},
        task={"vocab_size": 10, "alpha": 0.1},
        training__stage1__steps=20,
        training__stage2__steps=30,
        evaluation__n_sequences=256,
    )
    run = train(recipe, out=tmp_path / "run")
    formed = [(row["induction/score"] or 0) >= 0.5 for row in run.history]
    assert True in formed
    first = formed.index(True)
    step = run.history[first]["train/step"]
    seen = [row["induction/formation_step"] for row in run.history]
    assert seen == [None] * first + [step] * (len(seen) - first)


@pytest.mark.parametrize(("vocab_size", "beta0"), [(2, 1.0), (3, 0.01), (5, 1.0)])
def test_an_untrained_head_has_not_formed_and_is_not_forming(
    tmp_path: Path, vocab_size: int, beta0: float
) -> None:
    recipe = tiny(
        graph={"preset": "chain", "sequence_length": 20},
        task={"vocab_size": vocab_size, "alpha": 0.1},
        training__beta0=beta0,
        training__stage1__lr=1e-9,
        training__stage2__lr=1e-9,
        evaluation__n_sequences=512,
        checkpoints={"schedule": "formation", "every": 100},
    )
    result = train(recipe, out=tmp_path / "run")
    assert (result.history[0]["induction/attention"] or 0) > 0.25
    assert all(abs(row["induction/score"] or 0) < 0.1 for row in result.history)
    assert result.summary["induction/formation_step"] is None
    assert read_summary(result.folder)["induction/formation_step"] is None
    assert list(checkpoint_folders(result.folder)) == [recipe.n_steps]


# --- What goes wrong ---


@pytest.mark.parametrize(
    "overrides",
    [
        {
            # Without smoothing the first sequence that lacks one of the tokens costs infinity.
            "task__vocab_size": 2,
            "task__alpha": 5.0,
            "training__batch_size": 1,
            "training__epsilon": 0.0,
            "training__stage1__steps": 2000,
            "training__stage1__lr": 0.01,
        },
        {"training__beta0": 1e39},
    ],
    ids=["after some steps", "at the first step"],
)
def test_loss_that_is_not_finite_stops_the_run_and_keeps_its_rows(
    tmp_path: Path, overrides: dict[str, Any]
) -> None:
    recipe = tiny(**overrides)
    with raises_one_line(NonFiniteLossError, match=r"at step \d+ \(stage1, sgd") as caught:
        train(recipe, out=tmp_path / "run")
    summary = read_summary(tmp_path / "run")
    assert summary["state"] == "failed"
    rows = read_metrics(tmp_path / "run")
    assert summary["rows"] == len(rows)
    assert bool(rows) == (summary["train/steps"] > 0)
    assert f"at step {summary['train/steps']} " in str(caught.value)
    # Strict JSON: no bare NaN, which other readers refuse.
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"training__stage1__steps": 0, "training__stage2__steps": 0}, "nothing to train"),
        ({"device": "cuda:99"}, "device: cuda:99 is not there; available: cpu"),
    ],
)
def test_a_run_that_cannot_start_leaves_no_folder(
    tmp_path: Path, overrides: dict[str, Any], part: str
) -> None:
    with pytest.raises(RecipeError, match=part):
        train(tiny(**overrides), out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_another_machine_may_have_what_this_one_lacks() -> None:
    check(tiny(device="cuda:99"), on_this_machine=False)
    with pytest.raises(RecipeError, match="simplified learns"):
        check(tiny(graph__preset="two_parents"), on_this_machine=False)


def test_a_signal_in_the_last_step_still_gets_the_last_look(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(tiny(), out=tmp_path / "run", on_progress=stop)
    assert (result.state, result.signal) == ("finished", None)
    assert result.history[-1]["train/step"] == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_runs_on_cuda(tmp_path: Path) -> None:
    result = train(tiny(device="cuda", training__batch_size=256), out=tmp_path / "run")
    assert simplified(result).A1.device.type == "cuda"
    assert result.summary["first"]["gradient/edge_hits"] >= 0.8
    assert SimplifiedTransformer.load(tmp_path / "run" / "model").A1.device.type == "cpu"
