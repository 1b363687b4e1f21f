"""A look without a run gives the row that a run records."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mechcausal.measures.figures import STEP
from mechcausal.measures.look import observe
from mechcausal.models.base import ModelError
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.models.standard import StandardTransformer, standard_config
from mechcausal.recipes import parse_recipe
from mechcausal.tasks import Batch
from mechcausal.training.experiments import Generators
from mechcausal.training.experiments.causal_graph import CausalGraphExperiment
from mechcausal.training.run import train
from tests.oracles import seeded
from tests.small_recipes import GRAPH


def test_it_is_the_row_that_a_run_records(tmp_path: Path, no_figures: None) -> None:
    recipe = parse_recipe(GRAPH, source="test").with_overrides(training__stage1__lr=50.0)
    run = train(recipe, out=tmp_path / "run")
    experiment = run.experiment
    assert isinstance(experiment, CausalGraphExperiment)
    gradients = [p.grad for p in experiment.hooked.parameters()]
    look = observe(
        experiment.model,
        experiment.task,
        theory=experiment.theory,
        generator=Generators.from_seed(recipe.seed, torch.device("cpu")).evaluation,
        n_sequences=recipe.evaluation.n_sequences,
        epsilon=recipe.training.epsilon,
        bayes_draws=recipe.evaluation.bayes_draws,
    )
    row = run.history[-1]
    of_the_run = {STEP, "loss/train", "induction/formation_step"}
    assert set(look.figures) == set(row) - of_the_run
    for name, value in look.figures.items():
        assert value == pytest.approx(row[name], rel=0, abs=0, nan_ok=True), name
    after = [p.grad for p in experiment.hooked.parameters()]
    assert all(a is b for a, b in zip(after, gradients, strict=True))


class Echo:
    """The next token is the first one."""

    vocab_size, sequence_length = 3, 5

    def sample(self, n_sequences: int, *, generator: torch.Generator) -> Batch:
        tokens = torch.randint(3, (n_sequences, 5), generator=generator)
        return Batch(tokens, torch.nn.functional.one_hot(tokens[:, 0], 3).float())

    def predictions(self, batch: Batch) -> Any:
        return {"uniform": torch.full_like(batch.target, 1 / 3), "bayes": batch.target}


def test_any_task_and_a_plain_hooked_transformer() -> None:
    hooked = StandardTransformer(standard_config(3, 6, d_model=8), seed=0).hooked
    look = observe(hooked, Echo(), generator=seeded(0), n_sequences=16)
    batch = Echo().sample(16, generator=seeded(0))
    with torch.no_grad():
        prediction = hooked(batch.tokens)[:, -1].softmax(-1).double()
    smoothed = (prediction + 1e-3) / (1 + 3e-3)
    loss = -(batch.target.double() * smoothed.log()).sum(1).mean().item()
    assert look.figures["loss/eval"] == pytest.approx(loss, rel=1e-5)
    assert look.figures["loss/bayes"] == 0
    uniform = (smoothed * (3 * smoothed).log()).sum(1).mean().item()
    assert look.figures["strategy/kl_uniform"] == pytest.approx(uniform, rel=1e-5)
    assert set(look.matrices) == {"attention/layer0", "attention/layer1"}
    rows = look.matrices["attention/layer0"].sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_a_model_that_does_not_fit_is_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match="the model reads 4 positions, the task has sequences"):
        observe(SimplifiedTransformer(3, 4), Echo(), generator=seeded(0))
