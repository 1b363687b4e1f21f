"""Runs trained as one batch are the runs they would have been alone, up to float32 rounding.

A batch multiplies larger matrices than a single run, and processors add those up in another order.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mechcausal.graphs import chain, manual, star
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.recipes import Recipe, RecipeError, parse_recipe
from mechcausal.records.run_folder import (
    MATRICES_FILE,
    is_held,
    read_metrics,
    read_summary,
    run_info,
)
from mechcausal.records.wandb_fragments import fragments, wandb_steps
from mechcausal.sweeps.batch import batchable, batches, train_batch
from mechcausal.sweeps.member import PolledStop
from mechcausal.sweeps.outcome import Outcome
from mechcausal.tasks import SingleParentTask, soft_cross_entropy
from mechcausal.tasks.priors import DirichletPrior, FixedTransition
from mechcausal.tasks.single_parent import sample_each
from mechcausal.training.resuming import resume
from mechcausal.training.run import train

Folders = list[Path]


def tiny(**overrides: Any) -> Recipe:
    """S = 3, T = 8, a random forest; a dozen steps, W&B off."""
    data = {
        "name": "tiny",
        "graph": {"preset": "random_forest", "sequence_length": 8, "edge_probability": 0.6},
        "task": {"vocab_size": 3, "alpha": 0.3},
        "training": {
            "batch_size": 64,
            "stage1": {"steps": 8, "lr": 100.0},
            "stage2": {"steps": 4, "lr": 10.0},
            "joint": {"steps": 8, "optimizer": "adam", "lr": 0.05},
        },
        "evaluation": {"n_sequences": 64, "bayes_draws": 8, "theory_priors": 50},
        "probing": {"every": 4, "dense": 2, "images": 0, "report": False},
        "checkpoints": {"every": 5},
        "wandb": {"mode": "disabled"},
    }
    return parse_recipe(data, source="test").with_overrides(**overrides)


def various() -> list[Recipe]:
    """Recipes of one shape that differ in all that may differ."""
    several_roots = {"preset": "manual", "parents": [-1, -1, 0, 1, -1, 4, 2]}
    return [
        tiny(),
        tiny(
            seed=1,
            graph={"preset": "chain", "sequence_length": 8},
            task__alpha=1.5,
            training__beta0=2.0,
        ),
        tiny(seed=2, graph=several_roots, training__epsilon=0.01),
        tiny(
            seed=3,
            graph={"preset": "manual", "parents": [-1] * 7},
            training__stage1__lr=30.0,
            training__stage1__schedule="cosine",
        ),
        tiny(
            seed=4,
            task__alpha=[0.2, 1.0, 3.0],
            training__stage2__weight_decay=0.01,
            training__stage2__warmup=3,
            checkpoints__schedule="formation",
        ),
    ]


def train_in(folder: Path, recipes: list[Recipe], **options: Any) -> tuple[Folders, list[Outcome]]:
    folders = [folder / f"member{number}" for number in range(len(recipes))]
    return folders, train_batch(recipes, folders, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    """Equal up to what a few dozen steps make of float32 rounding (2^-24 = 6e-8)."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        largest = theirs[name].abs().max().item()
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-5 * max(largest, 1.0))


def assert_same_rows(one: Path, other: Path, *, tolerance: float = 1e-5) -> None:
    """The same figures at the same steps."""
    rows, expected = read_metrics(one), read_metrics(other)
    assert [list(row) for row in rows] == [list(row) for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        for name, value in wanted.items():
            ours = row[name]
            assert (ours is None) == (value is None), name
            if ours is not None and value is not None:
                assert math.isclose(ours, value, rel_tol=0, abs_tol=tolerance), name


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights, rows, matrices and summary."""
    assert_same_weights(one, other)
    assert_same_rows(one, other)
    seen, frames = load_file(one / MATRICES_FILE), load_file(other / MATRICES_FILE)
    assert seen.keys() == frames.keys()
    for name in seen:
        torch.testing.assert_close(seen[name], frames[name], rtol=1e-5, atol=1e-6)
    summary, wanted_summary = read_summary(one), read_summary(other)
    assert list(summary) == list(wanted_summary)
    assert summary["state"] == wanted_summary["state"] == "finished"


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single runs draw nothing here: that takes longer than all the rest of them."""
    monkeypatch.setattr("mechcausal.pictures.static.run_figures.draw_figures", lambda *_, **__: {})


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folders, outcomes = train_in(tmp_path_factory.mktemp("batch"), various())
    assert outcomes == [Outcome("finished")] * len(folders)
    return folders


# --- Equal to the single run ---


@pytest.mark.parametrize("number", range(len(various())))
def test_a_member_is_its_single_run(batch: Folders, tmp_path: Path, number: int) -> None:
    train(various()[number], out=tmp_path / "single")
    assert_same_run(batch[number], tmp_path / "single")


@pytest.mark.parametrize(
    "overrides",
    [
        {
            "training__algorithm": "joint",
            "training__accumulation": 3,
            "training__batch_size": 63,
        },
        {
            "training__algorithm": "joint",
            "training__joint__optimizer": "adamw",
            "task__vocab_size": 12,
            "evaluation__n_sequences": 7,
        },
        {"probing__enabled": False, "training__stage1__steps": 0},
        {
            "task__transition": [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]],
            "graph__sequence_length": 2,
        },
    ],
    ids=["accumulated", "adamw", "without probes", "fixed matrix"],
)
def test_other_recipes_are_their_single_runs_too(tmp_path: Path, overrides: dict[str, Any]) -> None:
    recipes = [tiny(seed=seed, **overrides) for seed in (0, 1)]
    folders, outcomes = train_in(tmp_path, recipes)
    assert outcomes == [Outcome("finished")] * 2
    single = train(recipes[1], out=tmp_path / "single")
    if recipes[0].probing.enabled:
        assert_same_run(folders[1], single.folder)
    else:
        assert_same_weights(folders[1], single.folder)
        assert read_metrics(folders[1])[-1] == pytest.approx(read_metrics(single.folder)[-1])


def test_company_changes_nothing(batch: Folders, tmp_path: Path) -> None:
    recipes = various()
    for number, company in ((3, [3]), (1, [4, 1, 0])):
        folders, _ = train_in(tmp_path / str(number), [recipes[i] for i in company])
        ours = folders[company.index(number)]
        assert_same_run(ours, batch[number])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_on_a_gpu(tmp_path: Path) -> None:
    recipes = [tiny(seed=seed, device="cuda") for seed in range(3)]
    folders, outcomes = train_in(tmp_path, recipes)
    assert outcomes == [Outcome("finished")] * 3
    train(recipes[1], out=tmp_path / "single")
    ours, theirs = weights(folders[1]), weights(tmp_path / "single")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


# --- An ordinary run ---


def test_a_member_is_an_ordinary_finished_run(batch: Folders) -> None:
    info = run_info(batch[0])
    assert (info.state, info.step, info.problem) == ("finished", 12, "")
    summary = read_summary(batch[0])
    assert summary["rows"] == len(read_metrics(batch[0]))
    assert summary["warnings"] == []
    assert sorted(path.name for path in (batch[0] / "checkpoints").iterdir())[-1] == "00000012"
    assert not is_held(batch[0])


@pytest.mark.slow
def test_every_member_has_its_wandb_run(tmp_path: Path) -> None:
    recipes = [tiny(seed=seed, wandb__mode="offline") for seed in range(3)]
    folders, outcomes = train_in(tmp_path, recipes)
    assert outcomes == [Outcome("finished")] * 3
    for folder in folders:
        summary = read_summary(folder)
        assert summary["warnings"] == []
        (fragment,) = (folder / "wandb").glob("offline-run-*")
        steps = [row["train/step"] for row in read_metrics(folder)]
        assert wandb_steps(fragment) == steps
        assert fragments(folder, fragment.name.split("-", 4)[-1]) == [fragment]


# --- Interrupted, failed ---


def stop_after(count: int) -> PolledStop:
    """Says stop when it has been asked that many times."""
    asked = iter(range(10**6))
    return PolledStop(lambda: next(asked) >= count)


@pytest.mark.parametrize("asked", [4, 23])
def test_an_interrupted_member_is_resumed_to_its_single_run(
    batch: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    monkeypatch.setattr("mechcausal.sweeps.member.POLL_SECONDS", 0.0)
    recipes = various()[:2]
    folders, outcomes = train_in(tmp_path, recipes, stop=stop_after(asked))
    assert {outcome.state for outcome in outcomes} == {"interrupted"}
    for number, folder in enumerate(folders):
        assert read_summary(folder)["state"] == "interrupted"
        result = resume(folder)
        assert result.state == "finished"
        assert result.warnings == []
        assert 0 <= result.start < 12
        assert_same_run(folder, batch[number])


def test_a_killed_member_is_resumed_to_its_single_run(batch: Folders, tmp_path: Path) -> None:
    (folder,), _ = train_in(tmp_path, [tiny()])
    for lost in ("checkpoints/00000012", "model"):
        shutil.rmtree(folder / lost)
    for lost in ("summary.json", MATRICES_FILE):
        (folder / lost).unlink()
    result = resume(folder)
    assert result.start == 10
    assert not any("came out differently" in warning for warning in result.warnings)
    assert_same_weights(folder, batch[0])


def test_a_batch_whose_members_are_all_refused_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(recipe: Recipe) -> None:
        raise RecipeError("device: this machine has no cuda")

    monkeypatch.setattr("mechcausal.sweeps.batch.check", refuse)
    _, outcomes = train_in(tmp_path, various()[:2])
    assert outcomes == [Outcome("failed", "device: this machine has no cuda")] * 2


def test_members_that_were_not_begun_leave_nothing(tmp_path: Path) -> None:
    folders, outcomes = train_in(tmp_path, various()[:2], stop=PolledStop(lambda: True))
    assert outcomes == [Outcome("interrupted")] * 2
    assert not any(folder.exists() for folder in folders)


def test_a_member_that_fails_does_not_disturb_the_others(batch: Folders, tmp_path: Path) -> None:
    recipes = various()
    diverging = tiny(seed=9, training__stage1__lr=1e9, training__epsilon=0.0)
    taken = tmp_path / "member2"
    taken.mkdir()
    (taken / "metrics.jsonl").write_text("")
    several = tiny(graph={"preset": "two_parents", "sequence_length": 8})  # too much for the model
    company = [recipes[0], diverging, recipes[1], several, recipes[3]]
    folders, outcomes = train_in(tmp_path, company)
    assert [outcome.state for outcome in outcomes] == [
        *("finished", "failed", "failed", "failed", "finished")
    ]
    assert "at step" in outcomes[1].error
    assert "mechcausal resume" in outcomes[1].error
    assert "already holds a run" in outcomes[2].error
    assert "model.kind" in outcomes[3].error
    assert all("\n" not in outcome.error for outcome in outcomes)
    assert read_summary(folders[1])["state"] == "failed"
    assert not is_held(folders[1])
    for ours, theirs in ((folders[0], batch[0]), (folders[4], batch[3])):
        assert_same_rows(ours, theirs)


def test_a_batch_that_breaks_fails_its_members_and_lets_go_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("mechcausal.training.experiments.causal_graph.sample_each", full)
    folders, outcomes = train_in(tmp_path, various()[:2])
    assert {outcome.state for outcome in outcomes} == {"failed"}
    assert "out of memory" in outcomes[0].error
    assert not any(is_held(folder) for folder in folders)


# --- What can be batched ---


def test_recipes_are_grouped_by_their_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny(graph__sequence_length=9)
    assert batches([tiny(), other, tiny(seed=3, task__alpha=2.0), tiny(task__vocab_size=4)]) == [
        [0, 2],
        [1],
        [3],
    ]
    for change in (
        *("training__batch_size", "training__stage1__steps", "evaluation__n_sequences"),
        *("threads", "probing__every"),
    ):
        assert len(batches([tiny(), tiny(**{change: 32})])) == 2
    assert batches([]) == []
    # About equal parts: one for each worker, or as many as the largest batch asks for.
    assert batches([tiny()] * 5, n_workers=2) == [[0, 1, 2], [3, 4]]
    monkeypatch.setattr("mechcausal.sweeps.batch.MAX_BATCH", 4)
    assert batches([tiny()] * 5) == [[0, 1, 2], [3, 4]]


def test_simplified_models_alone_train_in_batches() -> None:
    assert batchable(tiny())
    for kind in ("disentangled", "standard"):
        assert not batchable(tiny(model__kind=kind, training__algorithm="joint"))


# --- The parts ---


@pytest.mark.parametrize("n_sequences", [1, 7, 64])
def test_sequences_are_those_of_each_task(n_sequences: int) -> None:
    graphs = [chain(6), star(6), manual([-1, -1, 0, 1, -1, 4])]
    priors = [DirichletPrior.symmetric(alpha, 4) for alpha in (0.1, 1.0, 5.0)]
    tasks = [SingleParentTask(g, p) for g, p in zip(graphs, priors, strict=True)]
    together, alone = ([torch.Generator().manual_seed(seed) for seed in range(3)] for _ in range(2))
    for _ in range(3):
        batch = sample_each(tasks, n_sequences, generators=together)
        for run, (one, generator) in enumerate(zip(tasks, alone, strict=True)):
            expected = one.sample(n_sequences, generator=generator)
            # A draw within rounding of a threshold may give another token: one sequence at most.
            same = (batch.tokens[run] == expected.tokens).all(-1)
            assert (~same).sum() <= 1
            torch.testing.assert_close(batch.target[run][same], expected.target[same])


def test_tasks_of_unequal_size_are_refused() -> None:
    prior = DirichletPrior.symmetric(0.1, 3)
    fixed = FixedTransition(((0.5, 0.25, 0.25),) * 3)
    tasks = [SingleParentTask(chain(4), prior), SingleParentTask(chain(4), fixed)]
    with pytest.raises(ValueError, match="one vocabulary, length and kind of prior"):
        sample_each(tasks, 1, generators=[torch.Generator() for _ in tasks])


def random_start(vocab: int, length: int) -> list[SimplifiedTransformer]:
    generator = torch.Generator().manual_seed(0)
    models = [SimplifiedTransformer(vocab, length) for _ in range(3)]
    with torch.no_grad():
        for block in (block for model in models for block in (model.A1, model.A2)):
            block.copy_(torch.randn(block.shape, generator=generator))
    return models


def saturated_start() -> list[SimplifiedTransformer]:
    """Attention that underflows: 0 / 0 in the derivative where labels have zeros."""
    models = [SimplifiedTransformer(4, 10) for _ in range(3)]
    for model in models:
        model.initialise(beta0=1e4)
    return models


@pytest.mark.parametrize(
    ("models", "epsilons"),
    [
        *((random_start(*size), [1e-3, 0.01, 0.5]) for size in [(2, 2), (3, 8), (10, 20), (5, 60)]),
        (saturated_start(), [0.0, 0.0, 0.0]),
    ],
    ids=["2, 2", "3, 8", "10, 20", "5, 60", "saturated"],
)
def test_losses_and_gradients_are_those_of_each_model(
    models: list[SimplifiedTransformer], epsilons: list[float]
) -> None:
    vocab, length = models[0].vocab_size, models[0].sequence_length
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab, (3, 48, length), generator=generator)
    target = torch.rand(3, 48, vocab, generator=generator).softmax(-1)
    if 0.0 in epsilons:  # labels for what is predicted alone, else the loss is infinite
        predicted = torch.stack([m(x).detach() > 0 for m, x in zip(models, tokens, strict=True)])
        target = predicted / predicted.sum(-1, keepdim=True)
        absent = ~predicted.gather(2, tokens)
        assert absent.any()
        assert not absent.all()
    parameters = [list(model.parameters_by_name.values()) for model in models]
    expected = []
    for number, model in enumerate(models):
        loss = soft_cross_entropy(model(tokens[number]), target[number], epsilon=epsilons[number])
        expected.append((loss.item(), torch.autograd.grad(loss, parameters[number])))
    together = SimplifiedTransformer.predict_each(models, tokens)
    losses = soft_cross_entropy(together, target, epsilon=torch.tensor(epsilons))
    losses.sum().backward()
    for loss, own, (alone, gradients) in zip(losses, parameters, expected, strict=True):
        assert math.isfinite(alone)
        assert loss.item() == pytest.approx(alone, abs=1e-6)
        for parameter, gradient in zip(own, gradients, strict=True):
            assert parameter.grad is not None
            assert gradient.isfinite().all()
            torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        (
            "task__transition",
            [
                [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]],
                [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]],
            ],
        ),
        ("task__alpha", [1e-40, 1e40]),
    ],
)
def test_priors_at_the_edge_have_finite_losses_alone_and_in_a_batch(
    tmp_path: Path, field: str, values: list[Any]
) -> None:
    recipes = [tiny(**{field: value}) for value in values]
    folders, outcomes = train_in(tmp_path, recipes)
    assert outcomes == [Outcome("finished")] * 2
    finite = ("loss/eval", "loss/bayes", "loss/gap", "strategy/kl_unigram", "strategy/kl_bigram")
    for number, (recipe, folder) in enumerate(zip(recipes, folders, strict=True)):
        single = train(recipe, out=tmp_path / f"single{number}")
        for ours, theirs in zip(read_metrics(folder), read_metrics(single.folder), strict=True):
            for name in finite:
                value = theirs[name]
                assert value is not None, name
                assert ours[name] == pytest.approx(value, abs=1e-4), name
