"""Tasks: sequences drawn from a causal graph, and the distribution a model learns to predict."""

from mechcausal.graphs import CausalGraph
from mechcausal.tasks.base import Batch, cross_entropies, soft_cross_entropy, to_score
from mechcausal.tasks.priors import Prior
from mechcausal.tasks.several_parents import SeveralParentsTask
from mechcausal.tasks.single_parent import SingleParentTask

Task = SingleParentTask | SeveralParentsTask
"""Either task; both have `graph`, `prior`, `vocab_size`, `sequence_length` and `sample`."""


def build_task(graph: CausalGraph, prior: Prior) -> Task:
    """The single-parent task if the graph is a single-parent graph, else the several-parents task.

    Raises:
        GraphError: a position has several parents but the query has none.
        PriorError: a fixed matrix for a graph with several parents.

    Example:
        >>> from mechcausal.graphs import chain, two_parents
        >>> from mechcausal.tasks.priors import DirichletPrior
        >>> prior = DirichletPrior.symmetric(0.1, vocab_size=5)
        >>> [type(build_task(g, prior)).__name__ for g in (chain(9), two_parents(9))]
        ['SingleParentTask', 'SeveralParentsTask']
    """
    if graph.is_single_parent:
        return SingleParentTask(graph, prior)
    return SeveralParentsTask(graph, prior)


__all__ = [
    "Batch",
    "SeveralParentsTask",
    "SingleParentTask",
    "Task",
    "build_task",
    "cross_entropies",
    "soft_cross_entropy",
    "to_score",
]
