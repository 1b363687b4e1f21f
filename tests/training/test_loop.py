"""The bare loop: it takes the steps of a recorded run, and holds what its caller sees."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mechcausal.graphs import chain
from mechcausal.models.base import ModelError
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.models.standard import StandardTransformer, standard_config
from mechcausal.recipes import RecipeError, StageSection, parse_recipe
from mechcausal.recipes.stages import Stage, stages
from mechcausal.tasks import Batch, SingleParentTask, TaskError
from mechcausal.tasks.priors import DirichletPrior
from mechcausal.training.experiments import Generators
from mechcausal.training.experiments.causal_graph import CausalGraphExperiment
from mechcausal.training.fit import fit
from mechcausal.training.loop import Step
from mechcausal.training.run import train
from tests.oracles import seeded
from tests.small_recipes import GRAPH

task = SingleParentTask(chain(7), DirichletPrior.symmetric(0.3, vocab_size=3))


def model() -> SimplifiedTransformer:
    simplified = SimplifiedTransformer(3, 8)
    simplified.initialise(beta0=1.0)
    return simplified


def steps_of(
    trained: Any, *plan: Any, batch_size: int = 16, seed: int = 0, **options: Any
) -> list[Step]:
    return list(fit(trained, task, plan, batch_size=batch_size, generator=seeded(seed), **options))


def test_it_takes_the_steps_of_a_recorded_run_bit_by_bit(tmp_path: Path, no_figures: None) -> None:
    recipe = parse_recipe(GRAPH, source="test").with_overrides(
        training__stage1__steps=4, training__stage2__steps=3, probing__every=1
    )
    run = train(recipe, out=tmp_path / "run")
    assert isinstance(run.experiment, CausalGraphExperiment)
    bare = model()
    steps = list(
        fit(
            bare,
            run.experiment.task,
            stages(recipe),
            batch_size=recipe.training.batch_size,
            generator=Generators.from_seed(recipe.seed, torch.device("cpu")).data,
            epsilon=recipe.training.epsilon,
        )
    )
    assert [step.number for step in steps] == [row["train/step"] for row in run.history]
    assert [step.loss for step in steps] == [row["loss/train"] for row in run.history]
    assert [step.stage for step in steps] == ["stage1"] * 4 + ["stage2"] * 4
    trained = run.experiment.model.parameters_by_name
    for name, parameter in bare.parameters_by_name.items():
        assert torch.equal(parameter, trained[name])


def test_it_is_gradient_descent_by_hand(tmp_path: Path) -> None:
    by_loop, by_hand = model(), model()
    steps = steps_of(by_loop, Stage("one", ("A1",), StageSection(steps=3, lr=20.0)))
    generator, losses = seeded(0), []
    for _ in range(3):
        batch = task.sample(16, generator=generator)
        smoothed = (by_hand(batch.tokens) + 1e-3) / (1 + 3e-3)
        loss = -(batch.target * smoothed.log()).sum(1).mean()
        (gradient,) = torch.autograd.grad(loss, [by_hand.parameters_by_name["A1"]])
        losses.append(loss.item())
        with torch.no_grad():
            by_hand.parameters_by_name["A1"].sub_(20.0 * gradient)
    assert [step.loss for step in steps[:3]] == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(by_loop.A1, by_hand.A1)
    assert torch.equal(by_loop.A2, torch.eye(3))


def test_the_caller_sees_gradients_before_the_optimizer_moves() -> None:
    trained, plan = model(), [StageSection(steps=2, lr=5.0)]
    weights = []
    for step in fit(trained, task, plan, batch_size=16, generator=seeded(0)):
        assert trained.parameters_by_name["A1"].grad is not None
        weights.append(trained.A1.detach().clone())
        assert step.is_last == (step.number == 2)
    assert torch.equal(weights[0], torch.zeros(8, 8))
    assert torch.equal(weights[2], trained.A1)  # the last turn is a look alone


def test_warm_up_and_accumulation_are_those_of_recipes() -> None:
    section = StageSection(steps=4, lr=2.0, warmup=4, optimizer="adam")
    steps = steps_of(model(), section)
    assert [step.lr for step in steps] == [0.5, 1.0, 1.5, 2.0, 2.0]
    halves, first = model(), StageSection(steps=1, lr=1.0)
    (step, _) = steps_of(halves, first, accumulation=2)
    generator, reference = seeded(0), model()
    parts = [task.sample(8, generator=generator) for _ in range(2)]
    tokens, target = (torch.cat([getattr(p, name) for p in parts]) for name in ("tokens", "target"))
    smoothed = (reference(tokens) + 1e-3) / (1 + 3e-3)
    by_hand = -(target * smoothed.log()).sum(1).mean().item()
    assert step.loss == pytest.approx(by_hand, rel=1e-5)


def test_nothing_is_random_but_the_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = steps_of(model(), StageSection(steps=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert steps_of(model(), StageSection(steps=3)) == first
    assert steps_of(model(), StageSection(steps=3), seed=1) != first


def test_who_leaves_early_finds_every_parameter_trainable() -> None:
    trained = model()
    one = Stage("one", ("A1",), StageSection(steps=5))
    for step in fit(trained, task, [one], batch_size=4, generator=seeded(0)):
        assert not trained.parameters_by_name["A2"].requires_grad
        if step.number == 2:
            break
    assert all(p.requires_grad for p in trained.parameters_by_name.values())
    assert trained.A1.abs().max() > 0


def test_a_plain_hooked_transformer_and_labels_at_every_position() -> None:
    class Next:
        """Each token is the one before, plus one."""

        vocab_size, sequence_length = 3, 5

        def sample(self, n_sequences: int, *, generator: torch.Generator) -> Batch:
            start = torch.randint(3, (n_sequences, 1), generator=generator)
            tokens = (start + torch.arange(5)) % 3
            return Batch(tokens, torch.nn.functional.one_hot((tokens + 1) % 3, 3).float())

    hooked = StandardTransformer(standard_config(3, 5, d_model=8, n_layers=1), seed=0).hooked
    section = StageSection(steps=60, optimizer="adam", lr=0.03)
    steps = list(fit(hooked, Next(), [section], batch_size=16, generator=seeded(0)))
    assert steps[-1].loss < 0.1 * steps[0].loss
    with pytest.raises(ModelError, match="simplified model predicts at the last position alone"):
        next(fit(SimplifiedTransformer(3, 5), Next(), [section], batch_size=2, generator=seeded(0)))


class Broken:
    vocab_size, sequence_length = 3, 5

    def sample(self, n_sequences: int, *, generator: torch.Generator) -> Batch:
        return Batch(torch.zeros(n_sequences, 5).long(), torch.full((n_sequences, 2), 0.5))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            partial(steps_of, model(), StageSection(steps=0)),
            "no steps",
        ),
        (
            partial(steps_of, model(), StageSection(), accumulation=3),
            "3 parts do not divide",
        ),
        (partial(steps_of, model(), StageSection(lr=-1.0)), "stage stage1: lr: input should be"),
        (
            partial(steps_of, model(), Stage("two", ("W",), StageSection())),
            "no parameter W in this model, but all, or A1, A2",
        ),
    ],
)
def test_bad_settings_are_refused_in_one_line(build: Any, message: str) -> None:
    with pytest.raises((RecipeError, ModelError), match=message) as caught:
        build()
    assert len(str(caught.value).splitlines()) == 1


def test_a_batch_of_wrong_shapes_is_refused_in_one_line() -> None:
    steps = fit(model(), Broken(), [StageSection()], batch_size=4, generator=seeded(0))
    with pytest.raises(TaskError, match=r"Broken: target of shape \(4, 2\), needed is \(4, 3\)"):
        next(steps)
