"""Sequences that a causal graph with at most one parent for each position generates.

A task joins a `CausalGraph` with a prior over transition matrices. Every sequence draws a fresh
matrix `pi`, so nothing about `pi` can be memorised: it has to be read off the sequence along the
edges of the graph. Source: Nichani, Damian, Lee, ICML 2024 (arXiv 2402.14735), section 2.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.graphs import CausalGraph, GraphError
from mechcausal.tasks.base import Batch
from mechcausal.tasks.priors import Prior
from mechcausal.tasks.sequences import Level, draw_tokens


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
        transition = self.prior.sample(n_sequences, generator=generator)
        return self.sample_given(transition, generator=generator)

    def sample_given(
        self, transition: Float[Tensor, "batch vocab vocab"], *, generator: torch.Generator
    ) -> Batch:
        """Draw one sequence from each of the given transition matrices."""
        batch, vocab, _ = transition.shape
        device = generator.device
        shape = (self.sequence_length, batch)
        uniform = torch.rand(shape, generator=generator, device=device, dtype=transition.dtype)
        tokens = draw_tokens(transition, uniform, self._levels(device))
        query = torch.randint(vocab, (batch,), generator=generator, device=device)
        tokens[-1] = query
        target = transition[torch.arange(batch, device=device), query]
        return Batch(tokens.T.contiguous(), target, transition)

    def _levels(self, device: torch.device) -> list[Level]:
        """Positions of equal depth, roots first, each with its parents; kept for each device."""
        if device not in self._level_cache:
            parents = self.graph.parent_array()
            self._level_cache[device] = [
                Level.of([(0, i, max(parents[i], 0)) for i in level], device)
                for level in self.graph.levels
            ]
        return self._level_cache[device]

    @cached_property
    def _level_cache(self) -> dict[torch.device, list[Level]]:
        return {}
