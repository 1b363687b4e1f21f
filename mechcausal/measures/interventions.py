"""Interventions on layer 1's attention: does the model use the graph that its attention shows?

Attention on parents only correlates with the graph. `edge_effects` tests causally that knocking out
an edge raises the loss and knocking out a non-edge does not. `patch_ideal` swaps the trained
pattern and the ideal one, in both directions.

The loss of a sequence is `-sum_s target_s log((f_s + epsilon) / (1 + S epsilon))`, in nats, with f
from the hooked model. For several parents, the last position's row copies the query's parents
instead of its own, so it has a separate entry "query". Cost: three forward passes per edge and a
few more, each over the full batch.
"""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.measures.matching import match_heads
from mechcausal.models.base import GraphModel
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.support.statistics import sequence_mean
from mechcausal.tasks import Batch, cross_entropies
from probes.intervening.attention_edits import (
    Edit,
    knock_out,
    loss_rises,
    make_uniform,
    redirect,
)

Kind: TypeAlias = Literal[
    "edge",
    "non_edge",
    "redirect",
    "all_edges",
    "roots",
    "query",
    "ideal_into_trained",
    "trained_into_ideal",
    "whole_trained_into_ideal",
]
"""Kinds of interventions; see `edge_effects` and `patch_ideal`."""


@dataclass(frozen=True)
class InterventionEffect:
    """The effect on the loss of one intervention on layer 1's attention.

    Attributes:
        kind: kind of intervention.
        child: the changed row; None for several rows.
        parent: the key that lost attention, an edge's parent or a non-edge's key.
        new_parent: the key that gained it; None unless attention was redirected.
        head: the changed head; None for all.
        rise: mean rise of the loss, in nats.
        stderr: its standard error, paired over sequences (NaN for one sequence).
        loss: the loss without intervention, in nats.
    """

    kind: Kind
    rise: float
    stderr: float
    loss: float
    child: int | None = None
    parent: int | None = None
    new_parent: int | None = None
    head: int | None = None


@dataclass(frozen=True)
class EdgeEffects:
    """The effects of all interventions on the edges of a graph, and their means.

    Attributes:
        effects: one per intervention.
        means: mean rise in nats over the interventions of a kind and its standard error over
            sequences: `edge`, `non_edge`, `redirect`, and `edge_minus_non_edge`, paired. Empty
            without edges.
    """

    effects: tuple[InterventionEffect, ...]
    means: dict[str, tuple[float, float]]

    def of(self, kind: Kind) -> tuple[InterventionEffect, ...]:
        """The interventions of one kind."""
        return tuple(effect for effect in self.effects if effect.kind == kind)

    def rows(self) -> list[dict[str, str | int | float | None]]:
        """One row per intervention, for a pandas frame or a W&B table."""
        return [asdict(effect) for effect in self.effects]

    def figures(self, *, prefix: str = "interventions/") -> dict[str, float]:
        """Rise and standard error by name, for `means` and for `all_edges`, `roots` and `query`."""
        at_once = {
            effect.kind: (effect.rise, effect.stderr)
            for effect in self.effects
            if effect.kind in ("all_edges", "roots", "query")
        }
        return {
            f"{prefix}{name}_{figure}": value
            for name, pair in (self.means | at_once).items()
            for figure, value in zip(("rise", "stderr"), pair, strict=True)
        }


def sequence_losses(model: GraphModel, batch: Batch, *, epsilon: float) -> Float[Tensor, "batch"]:
    """Cross entropy of every sequence in nats, computed by the hooked model.

    The mean over sequences is `soft_cross_entropy`.
    """
    prediction = model.probabilities(model.hooked(batch.tokens))
    return cross_entropies(prediction, batch.target, epsilon=epsilon)


def edge_effects(
    model: GraphModel,
    graph: CausalGraph,
    batch: Batch,
    *,
    epsilon: float,
    generator: torch.Generator | None = None,
) -> EdgeEffects:
    """How much the loss rises when interventions block layer 1's attention along the graph.

    - `edge`: attention from a child to one parent is knocked out, in the head that attends to it
      most (mean over the batch);
    - `non_edge`: the same for a random visible key that is not a parent (possibly the child
      itself); up to as many keys per row as it has parents;
    - `redirect`: attention on a parent is swapped with that on a random earlier position that is
      not a parent (on the child itself if there is none), in the edge's head;
    - `all_edges`: every edge is knocked out at once, in all heads;
    - `roots`: all rows of roots attend uniformly, in all heads;
    - `query`, for several parents only: the query's parents are knocked out of the last
      position's row, in all heads.

    Args:
        model: the trained model; left as it was.
        graph: of the model's sequence length.
        batch: sequences of the graph's task, on the model's device.
        epsilon: smoothing of predictions, as in `soft_cross_entropy`.
        generator: source of randomness; a new one with seed 0 when absent.

    Raises:
        ValueError: graph, batch and model differ in their sequence length.
    """
    _check_lengths(model, graph, batch)
    attention = model.layer1_attention(batch.tokens).mean(0)
    generator = generator or torch.Generator().manual_seed(0)
    plans = list(_plans(graph, attention, generator))
    baseline, rises = loss_rises(
        model.hooked,
        0,
        [edit for _, _, edit in plans],
        lambda: sequence_losses(model, batch, epsilon=epsilon),
    )
    loss = baseline.mean().item()
    effects = tuple(
        InterventionEffect(kind, *sequence_mean(rise), loss, *location)
        for (kind, location, _), rise in zip(plans, rises, strict=True)
    )
    by_kind = {
        kind: rises[[plan[0] == kind for plan in plans]].mean(0)
        for kind in ("edge", "non_edge", "redirect")
        if any(plan[0] == kind for plan in plans)
    }
    if by_kind:
        by_kind["edge_minus_non_edge"] = by_kind["edge"] - by_kind["non_edge"]
    return EdgeEffects(effects, {kind: sequence_mean(rise) for kind, rise in by_kind.items()})


def patch_ideal(
    model: GraphModel,
    graph: CausalGraph,
    batch: Batch,
    *,
    epsilon: float,
    beta: float = 5.0,
) -> tuple[InterventionEffect, ...]:
    """How the loss changes when the trained and the ideal layer-1 patterns are exchanged.

    - `ideal_into_trained`: the trained model with rows of children one-hot on their parents. Each
      head gets one parent of a row: heads and parents are matched on the batch's mean attention
      (`match_heads`), and unmatched heads get the parent they attend to most. Rows of roots and of
      the query keep the trained pattern. A rise near zero means that layer 1 is as good as ideal.
    - `trained_into_ideal`, for single-parent graphs: the ideal simplified model
      (`SimplifiedTransformer.set_ideal`) with the trained rows of children, sequence by sequence,
      of the head that attends to parents most; other rows keep the ideal pattern. A rise near zero
      means that the trained layer 1 can replace the ideal one.
    - `whole_trained_into_ideal`: the same with all rows. The query's row may raise the loss: if it
      copies the query's own token, layer 2 also attends to the query. This rise depends on beta
      more than on the graph.

    Each rise is relative to the same model without the patch.

    Args:
        model: the trained model; left as it was.
        graph: of the model's sequence length.
        batch: sequences of the graph's task, on the model's device.
        epsilon: smoothing of predictions, as in `soft_cross_entropy`.
        beta: the ideal model's A2 = beta I.

    Raises:
        ValueError: graph, batch and model differ in their sequence length, or a position has more
            parents than layer 1 has heads.
    """
    _check_lengths(model, graph, batch)
    patterns = model.layer1_attention(batch.tokens)
    ideal = _given_rows(_ideal_pattern(graph, patterns.mean(0)), graph.child_rows)
    effects = [_patched("ideal_into_trained", model, ideal, batch, epsilon)]
    if graph.is_single_parent:
        reference = SimplifiedTransformer(
            model.vocab_size, model.sequence_length, device=batch.tokens.device
        )
        reference.set_ideal(graph, beta=beta)
        parents, children = torch.tensor(graph.edges, dtype=torch.int64).view(-1, 2).T.tolist()
        head = int(patterns.mean(0)[:, children, parents].sum(-1).argmax())
        trained = patterns[:, head : head + 1]
        child_rows = _given_rows(trained, graph.child_rows)
        all_rows = _given_rows(trained, range(graph.sequence_length))
        effects.append(_patched("trained_into_ideal", reference, child_rows, batch, epsilon))
        effects.append(_patched("whole_trained_into_ideal", reference, all_rows, batch, epsilon))
    return tuple(effects)


class _Location(NamedTuple):
    child: int | None = None
    parent: int | None = None
    new_parent: int | None = None
    head: int | None = None


_Plan: TypeAlias = tuple[Kind, _Location, Edit]


def _plans(graph: CausalGraph, attention: Tensor, generator: torch.Generator) -> Iterator[_Plan]:
    """Kind, location and edit of every intervention of `edge_effects`."""
    rows = graph.child_rows
    most = attention.argmax(0).tolist()
    for child, parents in rows.items():
        for parent in parents:
            head = most[child][parent]
            yield "edge", _Location(child, parent, None, head), knock_out([(child, parent)], head)
            wrong = [key for key in range(child) if key not in parents] or [child]
            (new,) = _draw(wrong, 1, generator)
            swap = redirect([(child, parent, new)], head)
            yield "redirect", _Location(child, parent, new, head), swap
        others = [key for key in range(child + 1) if key not in parents]
        for key in _draw(others, len(parents), generator):
            head = most[child][key]
            yield "non_edge", _Location(child, key, None, head), knock_out([(child, key)], head)
    if rows:
        edges = [(child, parent) for child, parents in rows.items() for parent in parents]
        yield "all_edges", _Location(), knock_out(edges)
    last = graph.sequence_length - 1
    roots = [root for root in graph.roots if graph.query_parents is None or root != last]
    if roots:
        yield "roots", _Location(), make_uniform(roots)
    if graph.query_parents is not None:
        pairs = [(last, parent) for parent in graph.query_parents]
        yield "query", _Location(last), knock_out(pairs)


def _draw(keys: list[int], n: int, generator: torch.Generator) -> list[int]:
    """Draw up to n different keys."""
    order = torch.randperm(len(keys), generator=generator, device=generator.device)
    return [keys[index] for index in order[:n].tolist()]


def _ideal_pattern(
    graph: CausalGraph, attention: Float[Tensor, "head query key"]
) -> Float[Tensor, "1 head query key"]:
    """A pattern whose rows of children are one-hot, with one parent per head; other rows are 0."""
    n_heads = attention.shape[0]
    ideal = torch.zeros_like(attention)
    for child, serving in match_heads(attention, graph).rows.items():
        parents = graph.parents[child]
        if len(parents) > n_heads:
            raise ValueError(
                f"position {child} has {len(parents)} parents, layer 1 {n_heads} heads: one-hot "
                "heads cannot attend to all of them"
            )
        chosen = attention[:, child, list(parents)].argmax(1).tolist()
        for column, head in enumerate(serving):
            if head is not None:
                chosen[head] = column
        for head, column in enumerate(chosen):
            ideal[head, child, parents[column]] = 1.0
    return ideal.unsqueeze(0)


def _given_rows(given: Float[Tensor, "#batch head query key"], rows: Collection[int]) -> Edit:
    """An edit that takes some rows from another pattern."""
    taken = list(rows)

    def edit(
        pattern: Float[Tensor, "batch head query key"],
    ) -> Float[Tensor, "batch head query key"]:
        patched = pattern.clone()
        patched[:, :, taken] = given[:, :, taken].to(patched)
        return patched

    return edit


def _patched(
    kind: Kind, model: GraphModel, edit: Edit, batch: Batch, epsilon: float
) -> InterventionEffect:
    baseline, (rise,) = loss_rises(
        model.hooked, 0, [edit], lambda: sequence_losses(model, batch, epsilon=epsilon)
    )
    return InterventionEffect(kind, *sequence_mean(rise), baseline.mean().item())


def _check_lengths(model: GraphModel, graph: CausalGraph, batch: Batch) -> None:
    lengths = (model.sequence_length, graph.sequence_length, batch.tokens.shape[1])
    if len(set(lengths)) > 1:
        listed = "{}, {} and {}".format(*lengths)
        raise ValueError(f"model, graph and batch have sequences of {listed} tokens: they differ")
