"""Does the model use the graph that its attention shows: change layer 1's attention, read the loss.

A row of attention on a parent is a correlation with the graph. `edge_effects` makes it causal: an
edge taken away must cost loss, a non-edge must not. `patch_ideal` asks the other way round what
the trained pattern is worth beside the one that the graph prescribes, in both models.

The loss of a sequence is `-sum_s target_s log((f_s + epsilon) / (1 + S epsilon))`, in nats, with f
from the hooked model. With several parents the last position's row copies the query's parents, not
its own: it has an entry of its own, "query". Cost: three passes for each edge and a few more, each
over the whole batch at once.
"""

from collections.abc import Iterator
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
    replace_pattern,
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
"""What was done to layer 1's attention; see `edge_effects` and `patch_ideal`."""


@dataclass(frozen=True)
class InterventionEffect:
    """What one intervention on layer 1's attention costs.

    Attributes:
        kind: what was done.
        child: the row changed; None for several rows.
        parent: the key that lost the row's attention, an edge's parent or a non-edge's key.
        new_parent: the key that got it; None where nothing was redirected.
        head: the head changed; None for all.
        rise: mean rise of the loss, in nats.
        stderr: its standard error, paired over sequences (NaN for one sequence).
        loss: the loss before, in nats.
    """

    kind: Kind
    rise: float
    stderr: float
    loss: float
    child: int | None = None
    parent: int | None = None
    new_parent: int | None = None
    head: int | None = None

    def row(self) -> dict[str, str | int | float | None]:
        """The attributes as a row of a table; every effect has the same columns."""
        return asdict(self)


@dataclass(frozen=True)
class EdgeEffects:
    """Every intervention on the edges of a graph, and their means.

    Attributes:
        effects: one for each intervention.
        means: mean rise in nats over the interventions of a kind, and its standard error over
            sequences: `edge`, `non_edge`, `redirect`, and `edge_minus_non_edge`, paired. Empty
            without edges.
    """

    effects: tuple[InterventionEffect, ...]
    means: dict[str, tuple[float, float]]

    def of(self, kind: Kind) -> tuple[InterventionEffect, ...]:
        """The interventions of one kind."""
        return tuple(effect for effect in self.effects if effect.kind == kind)

    def rows(self) -> list[dict[str, str | int | float | None]]:
        """One row for each intervention, as for a pandas frame or a W&B table."""
        return [effect.row() for effect in self.effects]

    def figures(self, *, prefix: str = "interventions/") -> dict[str, float]:
        """Rise and standard error by name: the means, and the interventions done at once."""
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

    Its mean is `soft_cross_entropy`; labels of zero cost nothing even at `epsilon = 0`.
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
    """How much the loss rises when layer 1 may not attend along the graph.

    - `edge`: attention from a child to one parent is knocked out, in the head that attends to it
      most (mean over the batch);
    - `non_edge`: the same with another visible key of the same row, drawn at random, the child
      itself included; for each row as many as it has parents, or all there are;
    - `redirect`: attention to a parent swaps with that to a wrong parent, drawn at random from the
      earlier positions (the child itself where there is no other), in the edge's head;
    - `all_edges`: every edge is knocked out at once, in all heads;
    - `roots`: all rows of roots attend uniformly, in all heads (position 0 sees itself alone);
    - `query`, with several parents only: the query's parents are knocked out of the last
      position's row, in all heads.

    Args:
        model: the trained model; left as it was.
        graph: of the model's sequence length.
        batch: sequences of the graph's task, on the model's device.
        epsilon: smoothing of predictions, as in `soft_cross_entropy`.
        generator: the source of randomness; None for a new one with seed 0.

    Raises:
        ValueError: graph, batch and model differ in their sequence length.
    """
    _check_lengths(model, graph, batch)
    attention = model.layer1_attention(batch.tokens).mean(0)
    generator = generator or torch.Generator().manual_seed(0)
    plans = list(_plans(graph, attention, generator))
    whole, rises = loss_rises(
        model.hooked,
        0,
        [edit for _, _, edit in plans],
        lambda: sequence_losses(model, batch, epsilon=epsilon),
    )
    loss = whole.mean().item()
    effects = tuple(
        InterventionEffect(kind, *sequence_mean(rise), loss, *place)
        for (kind, place, _), rise in zip(plans, rises, strict=True)
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
    """What changes when the trained layer-1 pattern and the ideal one take each other's place.

    - `ideal_into_trained`: the trained model with rows of children one-hot on their parents. Each
      head takes one parent of a row: heads and parents are matched on the batch's mean attention
      (`match_heads`); heads left over take the parent they attend to most. Rows of roots and of
      the query keep the trained pattern. A rise near zero: layer 1 does all that layer 2 can use.
    - `trained_into_ideal`, for single-parent graphs: the ideal simplified model
      (`SimplifiedTransformer.set_ideal`) with the trained rows of children, sequence by sequence,
      of the head that attends to parents most; the other rows keep the ideal pattern. A rise near
      zero: the trained layer 1 stands in for the ideal one.
    - `whole_trained_into_ideal`: the same with all rows. Of these the query's may matter: where
      it copies the query's own token, layer 2 matches it and looks at the query as well. What
      that costs depends on beta more than on the graph.

    Each rise is against the loss of its own unpatched model.

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
    ideal = _ideal_rows(graph, patterns.mean(0))
    effects = [_patched("ideal_into_trained", model, ideal, batch, epsilon)]
    if graph.is_single_parent:
        reference = SimplifiedTransformer(
            model.vocab_size, model.sequence_length, device=batch.tokens.device
        )
        reference.set_ideal(graph, beta=beta)
        parents, children = torch.tensor(graph.edges, dtype=torch.int64).view(-1, 2).T.tolist()
        head = int(patterns.mean(0)[:, children, parents].sum(-1).argmax())
        trained = patterns[:, head : head + 1]
        part, whole = _given_rows(trained, _children(graph)), replace_pattern(trained)
        effects.append(_patched("trained_into_ideal", reference, part, batch, epsilon))
        effects.append(_patched("whole_trained_into_ideal", reference, whole, batch, epsilon))
    return tuple(effects)


class _Place(NamedTuple):
    child: int | None = None
    parent: int | None = None
    new_parent: int | None = None
    head: int | None = None


_Plan: TypeAlias = tuple[Kind, _Place, Edit]


def _plans(graph: CausalGraph, attention: Tensor, generator: torch.Generator) -> Iterator[_Plan]:
    """What `edge_effects` does: the kind, where, and the edit."""
    rows = {child: graph.parents[child] for child in _children(graph)}
    most = attention.argmax(0).tolist()
    for child, parents in rows.items():
        for parent in parents:
            head = most[child][parent]
            yield "edge", _Place(child, parent, None, head), knock_out([(child, parent)], head)
            wrong = [key for key in range(child) if key not in parents] or [child]
            (new,) = _draw(wrong, 1, generator)
            swap = redirect([(child, parent, new)], head)
            yield "redirect", _Place(child, parent, new, head), swap
        others = [key for key in range(child + 1) if key not in parents]
        for key in _draw(others, len(parents), generator):
            head = most[child][key]
            yield "non_edge", _Place(child, key, None, head), knock_out([(child, key)], head)
    if rows:
        edges = [(child, parent) for child, parents in rows.items() for parent in parents]
        yield "all_edges", _Place(), knock_out(edges)
    last = graph.sequence_length - 1
    roots = [root for root in graph.roots if graph.query_parents is None or root != last]
    if roots:
        yield "roots", _Place(), make_uniform(roots)
    if graph.query_parents is not None:
        pairs = [(last, parent) for parent in graph.query_parents]
        yield "query", _Place(last), knock_out(pairs)


def _children(graph: CausalGraph) -> list[int]:
    """Rows that attend to their own parents: with several parents the last one does not."""
    last = graph.sequence_length - 1
    return [child for child in graph.non_roots if graph.query_parents is None or child != last]


def _draw(keys: list[int], n: int, generator: torch.Generator) -> list[int]:
    """Up to n different keys."""
    order = torch.randperm(len(keys), generator=generator, device=generator.device)
    return [keys[index] for index in order[:n].tolist()]


def _ideal_rows(graph: CausalGraph, attention: Float[Tensor, "head query key"]) -> Edit:
    """Make the rows of children one-hot, one parent for each head; idle heads are not touched."""
    n_heads = attention.shape[0]
    places = []
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
        places += [(head, child, parents[column]) for head, column in enumerate(chosen)]

    def edit(
        pattern: Float[Tensor, "batch head query key"],
    ) -> Float[Tensor, "batch head query key"]:
        index = torch.tensor(places, dtype=torch.int64, device=pattern.device).view(-1, 3)
        heads, children, parents = index.unbind(1)
        patched = pattern.clone()
        patched[:, heads, children] = 0.0
        patched[:, heads, children, parents] = 1.0
        return patched

    return edit


def _given_rows(given: Float[Tensor, "batch head query key"], rows: list[int]) -> Edit:
    """Take some rows from another pattern."""

    def edit(
        pattern: Float[Tensor, "batch head query key"],
    ) -> Float[Tensor, "batch head query key"]:
        patched = pattern.clone()
        patched[:, :, rows] = given[:, :, rows].to(patched)
        return patched

    return edit


def _patched(
    kind: Kind, model: GraphModel, edit: Edit, batch: Batch, epsilon: float
) -> InterventionEffect:
    whole, (rise,) = loss_rises(
        model.hooked, 0, [edit], lambda: sequence_losses(model, batch, epsilon=epsilon)
    )
    return InterventionEffect(kind, *sequence_mean(rise), whole.mean().item())


def _check_lengths(model: GraphModel, graph: CausalGraph, batch: Batch) -> None:
    lengths = (model.sequence_length, graph.sequence_length, batch.tokens.shape[1])
    if len(set(lengths)) > 1:
        found = "{}, {} and {}".format(*lengths)
        raise ValueError(f"model, graph and batch have sequences of {found} tokens: they differ")
