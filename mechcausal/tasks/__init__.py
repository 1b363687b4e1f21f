"""Tasks: sequences, and the distributions a model learns to predict."""

from mechcausal.graphs import CausalGraph
from mechcausal.tasks.base import (
    Batch,
    batch_loss,
    cross_entropies,
    scored_rows,
    soft_cross_entropy,
    to_score,
)
from mechcausal.tasks.checking import TaskError, check_batch, check_prior
from mechcausal.tasks.priors import DirichletPrior, FixedTransition, PriorError
from mechcausal.tasks.protocol import PredictableTask, Prior, PriorWithPosterior, Task
from mechcausal.tasks.several_parents import SeveralParentsTask
from mechcausal.tasks.single_parent import SingleParentTask

GraphTask = SingleParentTask | SeveralParentsTask
"""Either task of a causal graph; both have `graph` and `prior` besides what a `Task` has."""


def build_task(graph: CausalGraph, prior: Prior) -> GraphTask:
    """The single-parent task if the graph is a single-parent graph, else the several-parents task.

    Raises:
        GraphError: a position has several parents but the query has none.
        PriorError: a fixed matrix for a graph with several parents, or a prior of your own for a
            graph that names the query's parents.

    Example:
        >>> from mechcausal.graphs import chain, two_parents
        >>> from mechcausal.tasks.priors import DirichletPrior
        >>> prior = DirichletPrior.symmetric(0.1, vocab_size=5)
        >>> [type(build_task(g, prior)).__name__ for g in (chain(9), two_parents(9))]
        ['SingleParentTask', 'SeveralParentsTask']
    """
    if graph.is_single_parent:
        return SingleParentTask(graph, prior)
    if not isinstance(prior, DirichletPrior | FixedTransition):
        raise PriorError(
            f"{type(prior).__name__}: a graph that names the query's parents needs a "
            "DirichletPrior or a fixed matrix"
        )
    return SeveralParentsTask(graph, prior)


__all__ = [
    "Batch",
    "GraphTask",
    "PredictableTask",
    "Prior",
    "PriorWithPosterior",
    "SeveralParentsTask",
    "SingleParentTask",
    "Task",
    "TaskError",
    "batch_loss",
    "build_task",
    "check_batch",
    "check_prior",
    "cross_entropies",
    "scored_rows",
    "soft_cross_entropy",
    "to_score",
]
