"""The skeleton of a causal graph, read off a trained model in several ways."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.recipes import Recipe
from mechcausal.support.devices import device_named
from mechcausal.tasks import soft_cross_entropy
from mechcausal.theory import named_edges
from mechcausal.training.experiments import Generators, build_experiment
from mechcausal.training.experiments.causal_graph import CausalGraphExperiment
from probes import AttentionGradient, AttentionPattern, attach
from probes.causal_discovery import discover_attention

Skeleton = frozenset[tuple[int, int]]
"""Pairs of positions, the earlier first."""

READINGS = {
    "layer1": "discovery, layer 1",
    "layer1_residual": "… with residual",
    "deepest": "discovery, last layer",
    "deepest_residual": "… with residual",
    "argmax": "largest attention",
    "gradient_start": "gradient, start",
    "gradient_end": "gradient, end",
}


@dataclass(frozen=True)
class Seen:
    """The skeletons that every reading found on one model, one for each sequence or one alone."""

    true: Skeleton
    n_positions: int
    found: dict[str, list[Skeleton]]


def read_skeletons(
    experiment: CausalGraphExperiment,
    recipe: Recipe,
    n_sequences: int,
    *,
    n_eff: float | int,
    alpha: float,
    max_cond: int,
) -> Seen:
    """Read attention and gradients of a trained model."""
    model, graph = experiment.model, experiment.task.graph
    n = graph.n_positions - (graph.query_parents is not None)
    true = frozenset(edge for edge in graph.edges if edge[1] < n)
    device = device_named(recipe.device)
    generator = torch.Generator(device=device).manual_seed(recipe.seed)
    tokens = experiment.task.sample(n_sequences, generator=generator).tokens
    layers = {"layer1": 0, "deepest": len(model.heads) - 1}
    with torch.no_grad(), attach(model.hooked, AttentionPattern()) as (pattern,):
        model.hooked(tokens)
    found: dict[str, list[Skeleton]] = {}
    for name, layer in layers.items():
        attention = pattern.reading().sel(layer=layer).values[:, : model.heads[layer]]
        # Graphs of attention that does not depend on the tokens are all the same.
        memory: dict[bytes, Skeleton] = {}
        for reading, own in ((name, 0.0), (f"{name}_residual", 0.5)):
            found[reading] = [
                discovered(heads, n, own, memory, n_eff=n_eff, alpha=alpha, max_cond=max_cond)
                for heads in attention
            ]
        if name == "layer1":
            found["argmax"] = [largest(heads[:, :n, :n]) for heads in attention]
    start = build_experiment(recipe, Generators.from_seed(recipe.seed, device))
    assert isinstance(start, CausalGraphExperiment)
    found["gradient_start"] = named(start, n)
    found["gradient_end"] = named(experiment, n)
    return Seen(true, n, found)


def discovered(
    heads: Float[Tensor, "head query key"],
    n: int,
    own: float,
    memory: dict[bytes, Skeleton],
    *,
    n_eff: float | int,
    alpha: float,
    max_cond: int,
) -> Skeleton:
    """Pairs with an edge in the graph of any head, `own` being the share of the token itself."""
    pairs: set[tuple[int, int]] = set()
    for head in heads[:, :n, :n].double().cpu():
        mixed = (1 - own) * head + own * torch.eye(n, dtype=head.dtype)
        key = mixed.numpy().tobytes()
        if key not in memory:
            pag = discover_attention(
                mixed, n_eff=n_eff, alpha=alpha, ordered=True, max_cond=max_cond
            ).pag
            memory[key] = frozenset((min(e.start, e.end), max(e.start, e.end)) for e in pag.edges())
        pairs |= memory[key]
    return frozenset(pairs)


def largest(heads: Float[Tensor, "head query key"]) -> Skeleton:
    """Each position with the one that it attends to most, in every head; itself is no edge."""
    keys = heads.argmax(-1).tolist()
    return frozenset((key, query) for row in keys for query, key in enumerate(row) if key < query)


def named(experiment: CausalGraphExperiment, n: int) -> list[Skeleton]:
    """The edges that the gradient of the evaluation loss names, in any head; none if it is 0."""
    model, observer = experiment.model, experiment.observer
    with (
        model.frozen(),
        attach(model.hooked, AttentionGradient("pattern", 0, centred=True)) as (probe,),
    ):
        prediction = model.probabilities(model.hooked(observer.batch.tokens))
        soft_cross_entropy(prediction, observer.batch.target, epsilon=observer.epsilon).backward()
    gradient = -probe.reading().sel(layer=0).values[: model.heads[0], :n, :n].cpu()
    spread = probe.stderr().sel(layer=0).values[: model.heads[0], :n, :n].cpu()
    if not bool(gradient.any()):
        return []
    by_head = [named_edges(*head) for head in zip(gradient, spread, strict=True)]
    return [frozenset(edge for edges in by_head for edge in edges)]


def scores(seen: Seen, reading: str) -> list[tuple[float, float, float]]:
    """Precision (NaN where nothing was found), recall and F1, by sequence."""
    values = []
    for found in seen.found[reading]:
        right = len(found & seen.true)
        total = len(found) + len(seen.true)
        values.append(
            (
                right / len(found) if found else float("nan"),
                right / len(seen.true) if seen.true else 1.0,
                2 * right / total if total else 1.0,
            )
        )
    return values
