"""The looks of the laboratory leave a model as it was, also when something interrupts them."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformer_lens.hook_points import HookPoint

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
from mechcausal.tasks import GraphTask, SingleParentTask, build_task
from mechcausal.tasks.priors import DirichletPrior
from mechcausal.theory import pairwise_theory, parent_information
from probes import AttentionGradient
from probes.reading import records
from tests.left_as_found import changed, fingerprint, interrupted, left_as_found

PRIOR = DirichletPrior.symmetric(0.5, vocab_size=3)
EPSILON = 1e-3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def simplified() -> tuple[GraphModel, GraphTask]:
    model = SimplifiedTransformer(3, 7)
    model.set_ideal(chain(6), strength=2.0)
    return model, build_task(chain(6), PRIOR)


def disentangled() -> tuple[GraphModel, GraphTask]:
    model = DisentangledTransformer(3, 6, (2, 1))
    model.initialise(scale=0.3, generator=generator())
    return model, build_task(two_parents(6), PRIOR)


def standard() -> tuple[GraphModel, GraphTask]:
    config = standard_config(3, 7, n_heads=2, d_model=8, d_mlp=8, layer_norm=True)
    return StandardTransformer(config), build_task(chain(6), PRIOR)


MODELS = {"simplified": simplified, "disentangled": disentangled, "standard": standard}
Work = Callable[[GraphModel, GraphTask, Observer], Any]


def effects_of_edges(model: GraphModel, task: GraphTask, observer: Observer) -> Any:
    return edge_effects(model, task.graph, observer.batch, epsilon=EPSILON)


def patched(model: GraphModel, task: GraphTask, observer: Observer) -> Any:
    return patch_ideal(model, task.graph, observer.batch, epsilon=EPSILON)


def elsewhere(model: GraphModel, task: GraphTask, observer: Observer) -> Any:
    assert isinstance(task, SingleParentTask)
    return evaluate_ood(
        model, task, n_sequences=4, generator=generator(), epsilon=EPSILON, bayes_draws=2
    )


def matched(model: GraphModel, task: GraphTask, observer: Observer) -> Any:
    return match_heads(model.layer1_attention(observer.batch.tokens).mean(0), task.graph)


def blocks_removed(model: GraphModel, task: GraphTask, observer: Observer) -> Any:
    assert isinstance(model, DisentangledTransformer)
    tokens = observer.batch.tokens
    return block_effects(model, lambda: model.hooked(tokens).sum().item())


def detected(model: GraphModel, task: GraphTask, observer: Observer) -> Any:
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


def applies(name: str, model: GraphModel, task: GraphTask) -> bool:
    """Whether this kind of look exists for the model and its task."""
    if name == "evaluate_ood":
        return isinstance(task, SingleParentTask)
    return name != "block_effects" or isinstance(model, DisentangledTransformer)


@pytest.fixture(scope="module", params=MODELS)
def looked_at(request: pytest.FixtureRequest) -> tuple[GraphModel, GraphTask, Observer]:
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


@pytest.mark.parametrize("name", WORKS)
def test_nothing_is_left_after_a_look(
    looked_at: tuple[GraphModel, GraphTask, Observer], name: str
) -> None:
    if applies(name, *looked_at[:2]):
        with left_as_found(looked_at[0].hooked):
            WORKS[name](*looked_at)


@pytest.mark.parametrize(
    ("name", "owner", "function", "n", "error"),
    [
        ("observe", HookPoint, "forward", 5, KeyboardInterrupt),
        ("observe", observer_module, "soft_cross_entropy", 1, ValueError),
        ("observe", records, "wide_type", 0, KeyboardInterrupt),
        ("observe", AttentionGradient, "_add", 1, KeyboardInterrupt),
        ("losses", observer_module, "soft_cross_entropy", 0, ValueError),
        ("edge_effects", interventions, "cross_entropies", 1, KeyboardInterrupt),
        ("patch_ideal", interventions, "cross_entropies", 1, ValueError),
        ("evaluate_ood", evaluation, "cross_entropies", 1, KeyboardInterrupt),
        ("match_heads", HookPoint, "forward", 1, ValueError),
        ("block_effects", HookPoint, "forward", 3, KeyboardInterrupt),
        ("detect", HookPoint, "forward", 40, ValueError),
    ],
)
def test_nothing_is_left_after_a_fault_in_any_kind_of_look(
    looked_at: tuple[GraphModel, GraphTask, Observer],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    owner: Any,
    function: str,
    n: int,
    error: type[BaseException],
) -> None:
    if not applies(name, *looked_at[:2]):
        return
    original, calls = getattr(owner, function), itertools.count()

    def faulty(*arguments: Any, **options: Any) -> Any:
        if next(calls) == n:
            raise error
        return original(*arguments, **options)

    with left_as_found(looked_at[0].hooked):
        monkeypatch.setattr(owner, function, faulty)
        with pytest.raises(error):
            WORKS[name](*looked_at)
        monkeypatch.undo()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_takes_gradients_is_as_before_after_a_fault_in_training(
    looked_at: tuple[GraphModel, GraphTask, Observer], error: type[BaseException]
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
    looked_at: tuple[GraphModel, GraphTask, Observer],
) -> None:
    model, _, observer = looked_at
    source = random.Random(0)
    met = 0
    for _ in range(20):
        before = fingerprint(model.hooked)
        met += interrupted(observer.observe, after=source.uniform(0.001, 0.05))
        torch.set_grad_enabled(True)  # torch's own blocks are not safe from Ctrl-C
        assert changed(fingerprint(model.hooked), before) == {}
    assert met >= 10
