"""The laboratory's looks at a model leave it as it was, wherever they were broken off."""

import contextlib
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from mechcausal.graphs import CausalGraph, chain, two_parents
from mechcausal.measures import interventions
from mechcausal.measures import observer as observer_module
from mechcausal.measures.blocks import block_effects
from mechcausal.measures.generalisation import evaluate_ood, evaluation
from mechcausal.measures.interventions import edge_effects, patch_ideal
from mechcausal.measures.matching import match_heads
from mechcausal.measures.observer import Observer
from mechcausal.models.base import GraphModel
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.models.standard import StandardTransformer, standard_config
from mechcausal.studies.detection import detect
from mechcausal.studies.targets import Target
from mechcausal.tasks import SingleParentTask, Task, build_task
from mechcausal.tasks.priors import DirichletPrior
from mechcausal.theory import pairwise_theory, parent_information
from probes.reading import activation, records
from tests.left_as_found import fingerprint, interrupted, left_as_found

PRIOR = DirichletPrior.symmetric(0.5, vocab_size=3)
EPSILON = 1e-3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def simplified() -> tuple[GraphModel, Task]:
    model = SimplifiedTransformer(3, 7)
    model.set_ideal(chain(6), strength=2.0)
    return model, build_task(chain(6), PRIOR)


def disentangled() -> tuple[GraphModel, Task]:
    model = DisentangledTransformer(3, 6, (2, 1))
    model.initialise(scale=0.3, generator=generator())
    return model, build_task(two_parents(6), PRIOR)


def standard() -> tuple[GraphModel, Task]:
    config = standard_config(3, 7, n_heads=2, d_model=8, d_mlp=8, layer_norm=True)
    return StandardTransformer(config), build_task(chain(6), PRIOR)


MODELS = {"simplified": simplified, "disentangled": disentangled, "standard": standard}
Work = Callable[[GraphModel, Task, Observer], Any]


def effects_of_edges(model: GraphModel, task: Task, observer: Observer) -> Any:
    return edge_effects(model, task.graph, observer.batch, epsilon=EPSILON)


def patched(model: GraphModel, task: Task, observer: Observer) -> Any:
    return patch_ideal(model, task.graph, observer.batch, epsilon=EPSILON)


def elsewhere(model: GraphModel, task: Task, observer: Observer) -> Any:
    if isinstance(task, SingleParentTask):
        evaluate_ood(
            model, task, n_sequences=4, generator=generator(), epsilon=EPSILON, bayes_draws=2
        )


def matched(model: GraphModel, task: Task, observer: Observer) -> Any:
    return match_heads(model.layer1_attention(observer.batch.tokens).mean(0), task.graph)


def blocks_removed(model: GraphModel, task: Task, observer: Observer) -> Any:
    if isinstance(model, DisentangledTransformer):
        tokens = observer.batch.tokens
        return block_effects(model, lambda: model.hooked(tokens).sum().item())
    return None


def detected(model: GraphModel, task: Task, observer: Observer) -> Any:
    target = Target("model", model.hooked, None, None, False)
    return detect(target, n_sequences=2, compose=True)


WORKS: dict[str, Work] = {
    "observe": lambda model, task, observer: observer.observe(),
    "losses": lambda model, task, observer: observer.losses(),
    "edge_effects": effects_of_edges,
    "patch_ideal": patched,
    "evaluate_ood": elsewhere,
    "match_heads": matched,
    "block_effects": blocks_removed,
    "detect": detected,
}


@pytest.fixture(scope="module", params=MODELS)
def looked_at(request: pytest.FixtureRequest) -> tuple[GraphModel, Task, Observer]:
    """A model in training, with gradients, and what looks at it."""
    model, task = MODELS[request.param]()
    graph: CausalGraph = task.graph
    theory = (
        pairwise_theory(graph, PRIOR, n_priors=5)
        if isinstance(task, SingleParentTask)
        else parent_information(task, n_priors=5)
    )
    observer = Observer(
        model,
        task,
        theory,
        n_sequences=8,
        epsilon=EPSILON,
        bayes_draws=2,
        generator=generator(),
    )
    model(observer.batch.tokens).square().sum().backward()
    model.hooked.blocks[0].train()
    model.hooked.blocks[1].eval()
    model.hooked.add_hook("blocks.0.attn.hook_z", lambda x, hook: None)
    return model, task, observer


class Fault:
    """Raises once, at the n-th call."""

    def __init__(self, error: type[BaseException], n: int) -> None:
        self.error, self.n = error, n

    def __call__(self, *arguments: Any) -> None:
        self.n -= 1
        if self.n == -1:
            raise self.error


@pytest.mark.parametrize("name", WORKS)
def test_nothing_is_left_after_a_look(
    looked_at: tuple[GraphModel, Task, Observer], name: str
) -> None:
    with left_as_found(looked_at[0].hooked):
        WORKS[name](*looked_at)


@pytest.mark.parametrize(
    ("place", "n", "error"),
    [
        ("embed", 0, KeyboardInterrupt),
        ("blocks.0.attn.hook_pattern", 1, ValueError),
        ("blocks.1.attn.hook_z", 2, KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("name", WORKS)
def test_nothing_is_left_after_a_fault_in_the_model(
    looked_at: tuple[GraphModel, Task, Observer],
    name: str,
    place: str,
    n: int,
    error: type[BaseException],
) -> None:
    hooked = looked_at[0].hooked
    handle = hooked.get_submodule(place).register_forward_hook(Fault(error, n))
    with left_as_found(hooked), contextlib.suppress(error):
        WORKS[name](*looked_at)
    handle.remove()


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize(
    ("name", "owner", "function"),
    [
        ("observe", observer_module, "soft_cross_entropy"),
        ("observe", observer_module, "matching_figures"),
        ("observe", records, "_wide"),
        ("observe", activation, "partial"),
        ("edge_effects", interventions, "cross_entropies"),
        ("patch_ideal", interventions, "cross_entropies"),
        ("evaluate_ood", evaluation, "cross_entropies"),
        ("detect", records, "_wide"),
    ],
)
def test_nothing_is_left_after_a_fault_in_a_loss_or_a_probe(
    looked_at: tuple[GraphModel, Task, Observer],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    owner: ModuleType,
    function: str,
    n: int,
) -> None:
    whole, fault = getattr(owner, function), Fault(KeyboardInterrupt, n)

    def faulty(*arguments: Any, **options: Any) -> Any:
        fault()
        return whole(*arguments, **options)

    with left_as_found(looked_at[0].hooked), contextlib.suppress(KeyboardInterrupt):
        monkeypatch.setattr(owner, function, faulty)
        WORKS[name](*looked_at)
    monkeypatch.undo()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_a_fault_in_the_backward_pass(
    looked_at: tuple[GraphModel, Task, Observer],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    model, _, observer = looked_at

    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(torch.Tensor, "backward", fail)
    with left_as_found(model.hooked), pytest.raises(error):
        observer.observe()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_takes_gradients_is_as_before_after_a_fault_in_training(
    looked_at: tuple[GraphModel, Task, Observer], error: type[BaseException]
) -> None:
    model = looked_at[0]
    with (
        left_as_found(model.hooked),
        pytest.raises(error),
        model.frozen(),
        model.training_only(tuple(model.parameters_by_name)[:1]),
    ):
        raise error


def test_ctrl_c_at_random_moments_leaves_nothing(
    looked_at: tuple[GraphModel, Task, Observer],
) -> None:
    model, _, observer = looked_at
    source = random.Random(0)
    met = 0
    for _ in range(20):
        before = fingerprint(model.hooked)
        met += interrupted(observer.observe, after=source.uniform(0.001, 0.05))
        torch.set_grad_enabled(True)  # torch's own blocks are not safe from Ctrl-C
        now = fingerprint(model.hooked)
        assert {key: now[key] for key in now if now[key] != before[key]} == {}
    assert met >= 10
