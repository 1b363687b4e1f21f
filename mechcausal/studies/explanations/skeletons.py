"""Recover the skeleton of the causal graph from a trained model, by several methods."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.recipes import Recipe
from mechcausal.recipes.devices import device_named
from mechcausal.tasks import soft_cross_entropy
from mechcausal.theory import named_edges
from mechcausal.training.experiments import Generators, build_experiment
from mechcausal.training.experiments.causal_graph import CausalGraphExperiment
from probes import AttentionGradient, AttentionPattern, attach
from probes.causal_discovery import discover_attention

Skeleton = frozenset[tuple[int, int]]
"""Pairs of adjacent positions, the earlier one first."""

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
class ModelSkeletons:
    """The skeletons of one model: the true one, and those recovered by each reading.

    Attributes:
        true: skeleton of the causal graph.
        n_positions: positions of the graph.
        by_reading: a skeleton for each sequence, or a single one for readings of the gradient.
    """

    true: Skeleton
    n_positions: int
    by_reading: dict[str, list[Skeleton]]


def read_skeletons(
    experiment: CausalGraphExperiment,
    recipe: Recipe,
    n_sequences: int,
    *,
    n_eff: float | int,
    alpha: float,
    max_cond: int,
) -> ModelSkeletons:
    """Recover skeletons from attention and gradients of a trained model."""
    model, graph = experiment.model, experiment.task.graph
    n = graph.n_graph_rows
    true = frozenset(edge for edge in graph.edges if edge[1] < n)
    device = device_named(recipe.device)
    generator = torch.Generator(device=device).manual_seed(recipe.seed)
    tokens = experiment.task.sample(n_sequences, generator=generator).tokens
    layers = {"layer1": 0, "deepest": len(model.heads) - 1}
    with torch.no_grad(), attach(model.hooked, AttentionPattern()) as (pattern,):
        model.hooked(tokens)
    by_reading: dict[str, list[Skeleton]] = {}
    for name, layer in layers.items():
        attention = pattern.reading().sel(layer=layer).values[:, : model.heads[layer]]
        # If attention does not depend on the tokens, every sequence has the same graph.
        cache: dict[bytes, Skeleton] = {}
        for reading, identity_share in ((name, 0.0), (f"{name}_residual", 0.5)):
            by_reading[reading] = [
                discovered(
                    heads, n, identity_share, cache, n_eff=n_eff, alpha=alpha, max_cond=max_cond
                )
                for heads in attention
            ]
        if name == "layer1":
            by_reading["argmax"] = [largest(heads[:, :n, :n]) for heads in attention]
    start = build_experiment(recipe, Generators.from_seed(recipe.seed, device))
    assert isinstance(start, CausalGraphExperiment)
    by_reading["gradient_start"] = named(start, n)
    by_reading["gradient_end"] = named(experiment, n)
    return ModelSkeletons(true, n, by_reading)


def discovered(
    heads: Float[Tensor, "head query key"],
    n: int,
    identity_share: float,
    cache: dict[bytes, Skeleton],
    *,
    n_eff: float | int,
    alpha: float,
    max_cond: int,
) -> Skeleton:
    """Pairs with an edge in the discovered graph of any head.

    The residual stream also carries the token itself: discovery reads
    `(1 - identity_share) * attention + identity_share * I`.
    """
    pairs: set[tuple[int, int]] = set()
    for head in heads[:, :n, :n].double().cpu():
        mixed = (1 - identity_share) * head + identity_share * torch.eye(n, dtype=head.dtype)
        key = mixed.numpy().tobytes()
        if key not in cache:
            pag = discover_attention(
                mixed, n_eff=n_eff, alpha=alpha, ordered=True, max_cond=max_cond
            ).pag
            cache[key] = frozenset((min(e.start, e.end), max(e.start, e.end)) for e in pag.edges())
        pairs |= cache[key]
    return frozenset(pairs)


def largest(heads: Float[Tensor, "head query key"]) -> Skeleton:
    """Edges from each position to the one it attends to most, in every head; no self-loops."""
    keys = heads.argmax(-1).tolist()
    return frozenset((key, query) for row in keys for query, key in enumerate(row) if key < query)


def named(experiment: CausalGraphExperiment, n: int) -> list[Skeleton]:
    """The edges that the gradient of the evaluation loss names in any head; empty if it is 0."""
    model, observer = experiment.model, experiment.observer
    with (
        model.frozen(),
        attach(model.hooked, AttentionGradient("pattern", 0, centred=True)) as (probe,),
    ):
        prediction = model.probabilities(model.hooked(observer.batch.tokens))
        soft_cross_entropy(prediction, observer.batch.target, epsilon=observer.epsilon).backward()
    gradient = -probe.reading().sel(layer=0).values[: model.heads[0], :n, :n].cpu()
    stderr = probe.stderr().sel(layer=0).values[: model.heads[0], :n, :n].cpu()
    if not bool(gradient.any()):
        return []
    by_head = [named_edges(*head) for head in zip(gradient, stderr, strict=True)]
    return [frozenset(edge for edges in by_head for edge in edges)]


def scores(skeletons: ModelSkeletons, reading: str) -> list[dict[str, float]]:
    """Precision (NaN for an empty skeleton), recall and F1 of every skeleton.

    All are NaN for a reading without skeletons. F1 is `2 |found ∩ true| / (|found| + |true|)`.
    """
    true = skeletons.true
    if not skeletons.by_reading[reading]:
        return [dict.fromkeys(("precision", "recall", "f1"), float("nan"))]
    values = []
    for skeleton in skeletons.by_reading[reading]:
        n_correct = len(skeleton & true)
        total = len(skeleton) + len(true)
        values.append(
            {
                "precision": n_correct / len(skeleton) if skeleton else float("nan"),
                "recall": n_correct / len(true) if true else 1.0,
                "f1": 2 * n_correct / total if total else 1.0,
            }
        )
    return values
