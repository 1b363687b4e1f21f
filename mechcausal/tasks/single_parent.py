"""Sequences that a causal graph with at most one parent for each position generates.

A task joins a `CausalGraph` with a prior over transition matrices. Every sequence draws a fresh
matrix `pi`, so nothing about `pi` can be memorised: it has to be read off the sequence along the
edges of the graph. Source: Nichani, Damian, Lee, ICML 2024 (arXiv 2402.14735), section 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.graphs import CausalGraph, GraphError
from mechcausal.tasks.base import Batch
from mechcausal.tasks.dirichlet import draw_for_each
from mechcausal.tasks.priors import sample_transitions
from mechcausal.tasks.protocol import Prior
from mechcausal.tasks.sequences import draw_tokens, levels_of


@dataclass(frozen=True)
class SingleParentTask:
    """The paper's task for graphs in which no position has more than one parent.

    Roots are drawn from the stationary distribution `mu`, position i from `pi(. | s_parent(i))`,
    the query uniformly; the label is the row `pi(. | query)`.

    Attributes:
        graph: positions 0 ... T-2; the query is position T-1.
        prior: what `pi` is drawn from, for every sequence anew.

    Raises:
        GraphError: a position with several parents, or a query with parents.

    Example:
        >>> from mechcausal.graphs import chain
        >>> from mechcausal.tasks.priors import DirichletPrior
        >>> task = SingleParentTask(chain(19), DirichletPrior.symmetric(0.1, vocab_size=10))
        >>> task.sample(4, generator=torch.Generator().manual_seed(0)).tokens.shape
        torch.Size([4, 20])
    """

    graph: CausalGraph
    prior: Prior

    def __post_init__(self) -> None:
        if not self.graph.is_single_parent or self.graph.query_parents is not None:
            raise GraphError(
                "the single-parent task needs at most one parent for every position and a query "
                f"without parents: found up to {self.graph.max_parents} parents, "
                f"query parents {self.graph.query_parents}"
            )

    @property
    def vocab_size(self) -> int:
        """Number of tokens S."""
        return self.prior.vocab_size

    @property
    def sequence_length(self) -> int:
        """Number of positions T, the query included."""
        return self.graph.sequence_length

    def sample(self, n_sequences: int, *, generator: torch.Generator) -> Batch:
        """Draw sequences on the generator's device.

        Work is vectorised over the batch and over all positions of equal depth in the graph.
        """
        return sample_each([self], n_sequences, generators=[generator]).run(0)

    def sample_given(
        self, transition: Float[Tensor, "batch vocab vocab"], *, generator: torch.Generator
    ) -> Batch:
        """Draw one sequence from each of the given transition matrices."""
        return _sample_given([self], transition.unsqueeze(0), [generator]).run(0)


def sample_each(
    tasks: Sequence[SingleParentTask], n_sequences: int, *, generators: Sequence[torch.Generator]
) -> Batch:
    """Draw sequences of several tasks together, as each task's own `sample` would.

    Args:
        tasks: of one length, one number of tokens and one kind of prior; graphs may differ.
        n_sequences: sequences for each task.
        generators: of each task, on one device; what a task gets depends on its own alone, to
            rounding.

    Returns:
        A batch with a leading run axis.

    Raises:
        ValueError: tasks that cannot be sampled together.

    Example:
        >>> from mechcausal.graphs import chain, star
        >>> from mechcausal.tasks.priors import DirichletPrior
        >>> prior = DirichletPrior.symmetric(0.1, vocab_size=3)
        >>> tasks = [SingleParentTask(graph, prior) for graph in (chain(5), star(5))]
        >>> sources = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        >>> together = sample_each(tasks, 4, generators=sources).tokens
        >>> alone = tasks[1].sample(4, generator=torch.Generator().manual_seed(1)).tokens
        >>> torch.equal(together[1], alone)
        True
    """
    kinds = {(task.vocab_size, task.sequence_length, type(task.prior)) for task in tasks}
    if len(kinds) != 1 or len(tasks) != len(generators):
        raise ValueError("tasks of one batch need one vocabulary, length and kind of prior")
    priors = [task.prior for task in tasks]
    transition = sample_transitions(priors, n_sequences, generators=generators)
    return _sample_given(tasks, transition, generators)


def _sample_given(
    tasks: Sequence[SingleParentTask],
    transition: Float[Tensor, "run batch vocab vocab"],
    generators: Sequence[torch.Generator],
) -> Batch:
    runs, batch, vocab, _ = transition.shape
    length, device = tasks[0].sequence_length, transition.device
    counts = [length * batch] * runs
    uniform = draw_for_each(generators, torch.rand, counts, dtype=transition.dtype)
    tokens = draw_tokens(
        transition.reshape(-1, vocab, vocab),
        uniform.view(-1, batch),
        levels_of(tuple(task.graph for task in tasks), device),
    ).view(runs, length, batch)
    query = torch.stack(
        [torch.randint(vocab, (batch,), generator=g, device=device) for g in generators]
    )
    tokens[:, -1] = query
    target = transition.take_along_dim(query[:, :, None, None], 2).squeeze(2)
    return Batch(tokens.mT.contiguous(), target, transition)
