"""Experiments of the user's own: a task, a prior, a model, a class; recorded, resumed, refused."""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from mechcausal.cli import main as cli
from mechcausal.cli.watch import Watched
from mechcausal.models.adapter import HookedTransformer, build_hooked, load_model
from mechcausal.models.base import ModelError
from mechcausal.models.standard import StandardTransformer, standard_config
from mechcausal.pictures.pages import write_report
from mechcausal.recipes import Recipe, RecipeError, load_recipe, parse_recipe
from mechcausal.records.run_data import RunData
from mechcausal.records.run_folder import RunFolderError, read_metrics
from mechcausal.studies.targets import load_target
from mechcausal.tasks import Batch, TaskError
from mechcausal.tasks.priors import DirichletPrior, PriorError, sample_transitions
from mechcausal.training.experiments import Experiment
from mechcausal.training.experiments.any_task import TaskExperiment
from mechcausal.training.experiments.causal_graph import CausalGraphExperiment
from mechcausal.training.experiments.own import check_own
from mechcausal.training.resuming import resume
from mechcausal.training.run import Progress, RunResult, train
from tests.small_recipes import GRAPH


@dataclass(frozen=True)
class Coins:
    """Throws of a coin with an unknown bias; Laplace's rule is the Bayes predictor."""

    sequence_length: int = 6
    vocab_size: int = 2

    def sample(self, n_sequences: int, *, generator: torch.Generator) -> Batch:
        options: dict[str, Any] = {"generator": generator, "device": generator.device}
        bias = torch.rand(n_sequences, 1, **options)
        throws = torch.rand(n_sequences, self.sequence_length, **options) < bias
        return Batch(throws.long(), torch.cat([1 - bias, bias], 1))

    def predictions(self, batch: Batch) -> dict[str, Tensor]:
        heads = (batch.tokens.sum(1, keepdim=True) + 1) / (batch.tokens.shape[1] + 2)
        uniform = torch.full_like(batch.target, 0.5)
        return {"uniform": uniform, "bayes": torch.cat([1 - heads, heads], 1)}


def recipe_of(**overrides: Any) -> Recipe:
    data = {
        "name": "mine",
        "task": {"kind": "own"},
        "model": {"kind": "standard", "d_model": 8, "n_heads": 2},
        "training": {
            "algorithm": "joint",
            "batch_size": 16,
            "joint": {"steps": 6, "optimizer": "adam", "lr": 0.01},
        },
        "evaluation": {"n_sequences": 32},
        "probing": {"every": 3, "dense": 1, "images": 0},
        "checkpoints": {"every": 2},
        "wandb": {"mode": "disabled"},
    }
    return parse_recipe(data, source="test").with_overrides(**overrides)


coins = partial(TaskExperiment, task=Coins())


def of_task(run: RunResult) -> TaskExperiment:
    assert isinstance(run.experiment, TaskExperiment)
    return run.experiment


def of_graph(run: RunResult) -> CausalGraphExperiment:
    assert isinstance(run.experiment, CausalGraphExperiment)
    return run.experiment


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run on a task of the user's own, with W&B offline, that several tests read."""
    recipe = recipe_of(wandb__mode="offline", probing__images=2)
    return train(recipe, experiment=coins, out=tmp_path_factory.mktemp("own") / "run")


# --- A task ---


def test_a_task_of_ones_own_trains_and_is_compared_with_its_oracle(run: RunResult) -> None:
    last = run.history[-1]
    assert run.state == "finished"
    assert not run.warnings
    assert set(last) == {
        *("train/step", "loss/train", "loss/eval", "loss/bayes", "loss/gap"),
        *("strategy/kl_uniform", "strategy/kl_bayes", "strategy/mixture_kl"),
        *("strategy/weight_uniform", "strategy/weight_bayes"),
    }
    batch = Coins().sample(32, generator=run.experiment.generators.evaluation)  # other sequences
    bayes = Coins().predictions(batch)["bayes"]
    expected = -(batch.target * bayes.log()).sum(1)
    stderr = expected.std().item() * math.sqrt(2 / 32)
    assert last["loss/bayes"] == pytest.approx(expected.mean().item(), abs=4 * stderr)
    assert (run.folder / "figures" / "curves.png").stat().st_size > 5000


def test_the_recipe_says_whose_experiment_it_was(run: RunResult) -> None:
    recipe = load_recipe(run.folder / "recipe.toml")
    assert recipe.experiment == "TaskExperiment(task=Coins(sequence_length=6, vocab_size=2))"
    assert recipe.task.kind == "own"
    assert recipe == run.experiment.recipe


def test_its_folder_is_read_by_everything_that_reads_runs(
    run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = RunData.load(run.folder)
    assert (data.kind, data.has_graph) == ("own", False)
    page = write_report(run.folder, tmp_path / "page.html").read_text()
    assert "attention/layer1" in page
    assert "TaskExperiment(task=Coins" in page
    assert cli.main(["runs", str(run.folder)]) == 0
    assert cli.main(["detect", str(run.folder)]) == 0
    assert load_target(str(run.folder)).folder == run.folder
    assert load_model(run.folder / "model").cfg.d_vocab == 2
    capsys.readouterr()
    for command in ("train", "resume"):
        target = run.folder / "recipe.toml" if command == "train" else run.folder
        assert cli.main([command, str(target)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "the experiment is the caller's own, TaskExperiment(task=Coins" in line


def test_it_is_watched_live_by_its_own_figures(run: RunResult) -> None:
    rows = [{**row, "coins/error": 0.125} for row in run.history]
    progress = Progress(6, 6, "joint", figures=rows[-1], history=rows)
    console = Console(width=100, height=30, file=io.StringIO(), force_terminal=True)
    console.print(Watched(RunData(name="mine", recipe=run.experiment.recipe), progress))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "coins/error" in text
    assert "0.125" in text
    assert "evaluation" in text or "loss" in text


def stop_at(step: int) -> Any:
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            raise RuntimeError("stopped")

    return on_progress


def test_it_resumes_bit_by_bit(run: RunResult, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = recipe_of(probing__report=False)
    with pytest.raises(RuntimeError, match="stopped"):
        train(recipe, experiment=coins, out=folder, on_progress=stop_at(5))
    with pytest.raises(RecipeError, match="the experiment is the caller's own, TaskExperiment"):
        resume(folder)
    other = partial(TaskExperiment, task=Coins(sequence_length=7))
    with pytest.raises(RunFolderError, match=r"experiment was .*=6.*, is .*=7") as caught:
        resume(folder, experiment=other)
    assert len(str(caught.value).splitlines()) == 1
    result = resume(folder, experiment=coins)
    assert (result.state, result.start) == ("finished", 4)
    for name in ("metrics.jsonl", "model/model.safetensors", "matrices.safetensors"):
        assert (folder / name).read_bytes() == (run.folder / name).read_bytes()


@dataclass(frozen=True)
class MaskedBatch(Batch):
    hidden: Tensor | None = None


class Parity:
    """Bits whose sum is even, one of them masked: the others tell it, in both directions."""

    vocab_size, sequence_length = 3, 4

    def sample(self, n_sequences: int, *, generator: torch.Generator) -> MaskedBatch:
        bits = torch.randint(2, (n_sequences, 4), generator=generator)
        bits[:, 3] = bits[:, :3].sum(1) % 2
        hidden = torch.randint(4, (n_sequences,), generator=generator)
        scored = torch.nn.functional.one_hot(hidden, 4).bool()
        target = torch.nn.functional.one_hot(bits, 3).float()
        return MaskedBatch(bits.masked_fill(scored, 2), target, scored=scored, hidden=hidden)

    def predictions(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"bayes": batch.target}


def bidirectional(task: Any, *, seed: int, device: torch.device) -> HookedTransformer:
    config = standard_config(task.vocab_size, task.sequence_length, d_model=16, d_mlp=32)
    config.attention_dir, config.seed = "bidirectional", seed
    return build_hooked(config)


def test_masked_tokens_labels_at_every_position_and_a_bidirectional_model(tmp_path: Path) -> None:
    experiment = partial(TaskExperiment, task=Parity(), model=bidirectional)
    recipe = recipe_of(training__joint__steps=2, training__epsilon=0.0, probing__report=False)
    run = train(recipe, experiment=experiment, out=tmp_path / "run")
    assert run.experiment.recipe.model.kind == "own"
    assert run.summary["loss/bayes"] == 0.0
    assert run.summary["loss/gap"] == run.summary["loss/eval"]
    first = of_task(run).observer
    batch = first.batch
    assert isinstance(batch, MaskedBatch)
    assert batch.hidden is not None
    assert torch.equal(batch[3:].hidden, batch.hidden[3:])
    # The loss is that of the scored positions alone.
    with torch.no_grad():
        logits = run.experiment.hooked(batch.tokens).double()
    rows = torch.arange(len(batch)), batch.hidden
    by_hand = -(logits.log_softmax(-1)[rows] * batch.target[rows]).sum(1).mean().item()
    assert run.summary["loss/eval"] == pytest.approx(by_hand, rel=1e-5)
    attention = RunData.load(run.folder).frame()[1]["attention/layer0"]
    assert np.triu(attention[0], 1).any()


# --- A prior and a model ---


@dataclass(frozen=True)
class Sticky:
    """One matrix in two keeps its token with probability 0.8, the others with 0.2."""

    vocab_size: int = 3

    def sample(
        self, n_samples: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        device = generator.device
        stays = torch.rand(n_samples, 1, 1, generator=generator, device=device) < 0.5
        return torch.where(stays, self._matrix(0.8, dtype), self._matrix(0.2, dtype)).to(device)

    def _matrix(self, stay: float, dtype: torch.dtype) -> Tensor:
        s = self.vocab_size
        others = torch.full((s, s), (1 - stay) / (s - 1), dtype=dtype)
        return others.fill_diagonal_(stay)


@dataclass(frozen=True)
class KnownSticky(Sticky):
    """The same, with its exact posterior; mu is uniform, so that roots say nothing."""

    def posterior_mean(self, transitions: Tensor, roots: Tensor) -> Tensor:
        matrices = torch.stack([self._matrix(p, transitions.dtype) for p in (0.8, 0.2)])
        log_weights = torch.einsum("bij,nij->bn", transitions, matrices.log())
        return torch.einsum("bn,nij->bij", log_weights.softmax(1), matrices)


def graph_recipe(**overrides: Any) -> Recipe:
    return parse_recipe(GRAPH, source="test").with_overrides(**overrides)


def test_a_prior_of_ones_own_gets_theory_and_with_its_posterior_bayes(
    tmp_path: Path, no_figures: None
) -> None:
    without = train(
        graph_recipe(),
        experiment=partial(CausalGraphExperiment, prior=Sticky()),
        out=tmp_path / "without",
    )
    assert "Sticky has no posterior_mean" in without.warnings[0]
    assert not {"loss/bayes", "loss/gap", "strategy/kl_bigram"} & set(without.summary)
    assert without.summary["first"]["gradient/edge_hits"] is not None
    known = train(
        graph_recipe(evaluation__n_sequences=512),
        experiment=partial(CausalGraphExperiment, prior=KnownSticky()),
        out=tmp_path / "with",
    )
    assert known.experiment.recipe.experiment == (
        "CausalGraphExperiment(prior=KnownSticky(vocab_size=3))"
    )
    # By enumeration of the two matrices on the same sequences.
    batch = of_graph(known).observer.batch
    matrices = torch.stack([Sticky()._matrix(p, torch.float64) for p in (0.8, 0.2)])
    tokens = batch.tokens[:, :-1]
    log_weights = torch.stack([m.log()[tokens[:, :-1], tokens[:, 1:]].sum(1) for m in matrices], 1)
    prediction = torch.einsum(
        "bn,nbs->bs", log_weights.softmax(1), matrices[:, batch.tokens[:, -1]]
    )
    expected = -(batch.target.double() * prediction.log()).sum(1).mean().item()
    assert known.summary["loss/bayes"] == pytest.approx(expected, rel=1e-5)
    assert RunData.load(known.folder).has_graph


def test_priors_of_ones_own_are_drawn_for_each_run_of_a_batch() -> None:
    priors = [Sticky(), Sticky()]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    together = sample_transitions(priors, 5, generators=generators)
    alone = Sticky().sample(5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(together[1], alone)


class Wide(StandardTransformer):
    """A model class of the user's own."""

    kind = "wide"


def wide(task: Any, *, seed: int, device: torch.device) -> Wide:
    config = standard_config(task.vocab_size, task.sequence_length, d_model=32, device=str(device))
    return Wide(config, seed=seed)


def test_a_model_of_ones_own_learns_a_graph(tmp_path: Path, no_figures: None) -> None:
    recipe = graph_recipe(training__algorithm="joint", training__joint__steps=2)
    own = partial(CausalGraphExperiment, model=wide)
    run = train(recipe, experiment=own, out=tmp_path / "run")
    assert run.experiment.recipe.model.kind == "own"
    assert "composition/L1H0_reads_L0H0" in run.summary
    experiment = of_graph(run)
    tokens = experiment.observer.batch.tokens
    loaded = Wide.load(run.folder / "model")
    assert torch.equal(loaded(tokens), experiment.model(tokens))
    write_report(run.folder, tmp_path / "page.html")
    assert not load_target(str(run.folder)).predicts_every_token


# --- An experiment ---


class Copying(Experiment):
    """The smallest experiment: a model and a loss; one figure that no list has."""

    def __init__(self, recipe: Recipe, generators: Any, *, width: int = 8) -> None:
        super().__init__(recipe, generators)
        config = standard_config(4, 5, d_model=width)
        self._model = StandardTransformer(config, seed=generators.init)

    @property
    def hooked(self) -> HookedTransformer:
        return self._model.hooked

    def training_loss(self, n_sequences: int) -> Tensor:
        tokens = torch.randint(4, (n_sequences, 5), generator=self.generators.data)
        loss: Tensor = self.hooked(tokens, return_type="loss")
        return loss

    def losses(self) -> dict[str, float]:
        return {"loss/eval": 1.5, "copying/share": 0.25}


def test_the_smallest_experiment_needs_two_methods(tmp_path: Path) -> None:
    run = train(recipe_of(), experiment=partial(Copying, width=16), out=tmp_path / "run")
    assert run.state == "finished"
    rows = read_metrics(run.folder)
    assert {row["copying/share"] for row in rows} == {0.25}
    assert len({row["loss/train"] for row in rows}) == len(rows)
    page = (run.folder / "report.html").read_text()
    assert "copying/share" in page
    assert (run.folder / "figures" / "curves.png").is_file()
    assert load_model(run.folder / "model").cfg.d_model == 16


# --- Bad input ---


class NoRecipe(Copying):
    def __init__(self, recipe: Recipe, generators: Any) -> None:
        self._model = StandardTransformer(standard_config(4, 5, d_model=8))


class Unequal(Coins):
    def sample(self, n_sequences: int, *, generator: torch.Generator) -> Batch:
        return super().sample(n_sequences + 1, generator=generator)


class Unnormalised(Coins):
    def sample(self, n_sequences: int, *, generator: torch.Generator) -> Batch:
        batch = super().sample(n_sequences, generator=generator)
        return Batch(batch.tokens, 2 * batch.target)


class ThirdSide(Coins):
    def sample(self, n_sequences: int, *, generator: torch.Generator) -> Batch:
        batch = super().sample(n_sequences, generator=generator)
        return Batch(batch.tokens + 1, batch.target)


@dataclass(frozen=True)
class Lopsided(Sticky):
    def _matrix(self, stay: float, dtype: torch.dtype) -> Tensor:
        return 0.5 * super()._matrix(stay, dtype)


def short(task: Any, *, seed: int, device: torch.device) -> StandardTransformer:
    return StandardTransformer(standard_config(task.vocab_size, 3, d_model=8))


@pytest.mark.parametrize(
    ("experiment", "error", "message"),
    [
        (Experiment, RecipeError, "experiment: Experiment lacks hooked, training_loss"),
        (partial(Copying, 3), RecipeError, "give the arguments of Copying to partial by name"),
        (partial(Copying, **{"depth": 2}), RecipeError, "unexpected keyword argument 'depth'"),
        (TaskExperiment, RecipeError, "missing a required argument: 'task'"),
        (partial(TaskExperiment, task=3), TaskError, "task: a int lacks vocab_size"),
        (
            partial(TaskExperiment, task=Unequal()),
            TaskError,
            r"Unequal: tokens of shape \(3, 6\), needed is \(2, 1 to 6\)",
        ),
        (partial(TaskExperiment, task=Unnormalised()), TaskError, "a label is no distribution"),
        (
            partial(TaskExperiment, task=ThirdSide()),
            TaskError,
            r"ThirdSide: tokens from 1 to 2, allowed are 0 to 1",
        ),
        (partial(CausalGraphExperiment, prior=Sticky(4)), PriorError, "of 4 tokens, but task"),
        (partial(CausalGraphExperiment, prior=Lopsided()), PriorError, "no distribution"),
        (partial(CausalGraphExperiment, prior=Coins()), PriorError, "Coins"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(
    tmp_path: Path, experiment: Any, error: type[Exception], message: str
) -> None:
    is_of_graph = getattr(experiment, "func", None) is CausalGraphExperiment
    recipe = graph_recipe() if is_of_graph else recipe_of()
    with pytest.raises(error, match=message) as caught:
        train(recipe, experiment=experiment, out=tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("experiment", [Coins, "coins", Coins(), partial(Coins), None])
def test_what_is_no_experiment_is_refused(experiment: Any) -> None:
    with pytest.raises(RecipeError, match=r"^experiment: .* is neither a subclass of mechcausal"):
        check_own(experiment)


@pytest.mark.parametrize(
    ("experiment", "error", "message"),
    [
        (NoRecipe, RecipeError, "NoRecipe has not kept its recipe"),
        (partial(TaskExperiment, task=Coins(), model=short), ModelError, "reads 3 positions"),
    ],
)
def test_what_shows_only_when_it_is_built_ends_the_run_in_one_line(
    tmp_path: Path, experiment: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(recipe_of(), experiment=experiment, out=tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_model_of_causal_graphs_does_not_learn_another_task(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.kind: simplified learns causal graphs alone"):
        train(
            parse_recipe({"task": {"kind": "own"}}, source="test"),
            experiment=coins,
            out=tmp_path / "run",
        )


def test_labels_are_those_of_the_task(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"training.target: posterior is for causal graphs"):
        train(recipe_of(training__target="posterior"), experiment=coins, out=tmp_path / "run")


def test_a_graph_with_a_query_takes_no_prior_of_ones_own(tmp_path: Path) -> None:
    recipe = graph_recipe(
        graph__preset="two_parents",
        model__kind="disentangled",
        training__algorithm="joint",
    )
    experiment = partial(CausalGraphExperiment, prior=Sticky())
    with pytest.raises(PriorError, match="Sticky: a graph that names the query's parents"):
        train(recipe, experiment=experiment, out=tmp_path / "run")
    assert isinstance(recipe.build_prior(), DirichletPrior)
