"""Sequences that a causal graph with several parents generates.

Every sequence has its own transition tensors, one for each number k of parents in the graph, with
S^k rows that are iid from the prior. A sequence visits few of these rows, so the sampler integrates
them out: given the earlier tokens, the next token follows a Polya urn.
Source: Nichani, Damian, Lee, ICML 2024 (arXiv 2402.14735), section 5.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.graphs import CausalGraph, GraphError
from mechcausal.tasks.base import Batch, cumulative
from mechcausal.tasks.dirichlet import sample_dirichlet
from mechcausal.tasks.priors import DirichletPrior, FixedTransition, PriorError

# Transition tensors with more entries raise PriorError before they exhaust the memory.
_MAX_ENTRIES = 10**8
# Codes of contexts must fit into an int64.
_CODE_BITS = 62


@dataclass(frozen=True)
class SeveralParentsTask:
    """The paper's task for graphs with any number of parents.

    Roots are uniform; a position with the k parents p_1 < ... < p_k is drawn from
    `pi_k(. | s_p1, ..., s_pk)`, where the rows of every `pi_k` are iid Dirichlet(concentration).
    The target is `pi_k(. | tokens of the query's k parents)`, where the query is the token to be
    predicted. Unlike in the single-parent task, no query token is added: T is the number of
    positions.

    Attributes:
        graph: positions 0 ... T-1, and the parents of the query, which follows them.
        prior: of every row; a fixed matrix is allowed if no position has more than one parent.

    Raises:
        GraphError: the query has no parents.
        PriorError: the prior is a fixed matrix, but a position has several parents.

    Example:
        >>> from mechcausal.graphs import two_parents
        >>> from mechcausal.tasks.priors import DirichletPrior
        >>> task = SeveralParentsTask(two_parents(32), DirichletPrior.symmetric(0.1, vocab_size=5))
        >>> task.sample(4, generator=torch.Generator().manual_seed(0)).tokens.shape
        torch.Size([4, 32])
    """

    graph: CausalGraph
    prior: DirichletPrior | FixedTransition

    def __post_init__(self) -> None:
        if self.graph.query_parents is None:
            raise GraphError(
                "the task with several parents needs query_parents, the parents of the token to be"
                " predicted: found None"
            )
        if isinstance(self.prior, FixedTransition) and self.graph.max_parents > 1:
            raise PriorError(
                f"a position has {self.graph.max_parents} parents: a fixed transition matrix allows"
                " at most one parent, a DirichletPrior any number"
            )

    @property
    def vocab_size(self) -> int:
        """Number of tokens S."""
        return self.prior.vocab_size

    @property
    def sequence_length(self) -> int:
        """Number of positions T, without the token to be predicted."""
        return self.graph.sequence_length

    @property
    def query_parents(self) -> tuple[int, ...]:
        """The parents of the token to be predicted, ascending."""
        return self.graph.query_parents or ()

    @property
    def parent_numbers(self) -> tuple[int, ...]:
        """The distinct numbers k >= 1 of parents of positions and of the query, ascending."""
        rows = (*self.graph.parents, self.query_parents)
        return tuple(sorted({len(row) for row in rows if row}))

    def sample(self, n_sequences: int, *, generator: torch.Generator) -> Batch:
        """Draw sequences on the generator's device, with the transition tensors integrated out.

        `s_i = s` with probability proportional to `alpha_s + N(s)`, where N(s) counts the earlier
        positions that hold s and have the same number of parents and the same parent tokens. The
        target is one draw of Dirichlet(alpha + N). The distribution equals that of
        `sample_given(sample_tensors(...))`; the cost is `batch * T^2` comparisons.
        """
        if isinstance(self.prior, FixedTransition):
            tensors = self.sample_tensors(n_sequences, generator=generator)
            return self.sample_given(tensors, generator=generator)
        device, length = generator.device, self.sequence_length
        alpha = torch.tensor(self.prior.representable, device=device)
        total = float(alpha.sum())
        from_prior, from_urn = torch.rand(
            (2, length, n_sequences), generator=generator, device=device
        )
        # First draw every token from the prior's mean (roots: uniform); the urns then replace some.
        # Axis 0 is the position, so the tokens of a position are contiguous.
        is_root = torch.tensor([not row for row in self.graph.parents], device=device)
        mean = cumulative(torch.where(is_root.unsqueeze(1), 1.0, alpha))
        tokens = (from_prior.unsqueeze(2) >= mean[:, :-1].unsqueeze(1)).sum(2)
        urns = {k: _Urns(self, k, n_sequences, device) for k in self.parent_numbers}
        for position, parents in enumerate(self.graph.parents):
            if parents:
                context = [tokens[parent] for parent in parents]
                tokens[position] = urns[len(parents)].draw(
                    context, tokens[position], from_urn[position], total
                )
        sequences = tokens.T.contiguous()
        counts = self.context_counts(sequences)
        return Batch(sequences, sample_dirichlet(alpha + counts, counts.shape, generator=generator))

    def context_counts(
        self, tokens: Int[Tensor, "batch pos"], *, n_nearest: int | None = None
    ) -> Float[Tensor, "batch vocab"]:
        """How often each token followed the context of the token to be predicted.

        Only positions with as many parents as that token count, and only if their parents hold the
        same tokens in the same order; `n_nearest` compares only the last so many parents.
        """
        query = self.query_parents
        skipped = 0 if n_nearest is None else len(query) - n_nearest
        children = [i for i, row in enumerate(self.graph.parents) if len(row) == len(query)]
        counts = torch.zeros(tokens.shape[0], self.vocab_size, device=tokens.device)
        if not children:
            return counts
        matches = torch.ones(len(tokens), len(children), dtype=torch.bool, device=tokens.device)
        for number in range(skipped, len(query)):
            column = torch.tensor(
                [self.graph.parents[child][number] for child in children], device=tokens.device
            )
            matches &= tokens[:, column] == tokens[:, query[number]].unsqueeze(1)
        following = tokens[:, torch.tensor(children, device=tokens.device)]
        return counts.scatter_add_(1, following, matches.to(counts.dtype))

    def sample_tensors(
        self, n: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> dict[int, Float[Tensor, "batch ... vocab"]]:
        """Draw n transition tensors for every number k in `parent_numbers`.

        The tensor for k has the shape `[n, S, ..., S, S]`: k axes for the tokens of the parents, in
        ascending order of position, then one for the child's token.

        Raises:
            PriorError: a tensor would have more than 10^8 entries.
        """
        if isinstance(self.prior, FixedTransition):
            return {1: self.prior.sample(n, generator=generator, dtype=dtype)}
        tensors = {}
        alpha = torch.tensor(self.prior.representable, dtype=dtype, device=generator.device)
        for k in self.parent_numbers:
            shape = (n, *(self.vocab_size,) * (k + 1))
            entries = n * self.vocab_size ** (k + 1)
            if entries > _MAX_ENTRIES:
                raise PriorError(
                    f"{n} transition tensors of {k} parents and {self.vocab_size} tokens have"
                    f" {entries} entries: at most {_MAX_ENTRIES} are allowed"
                )
            tensors[k] = sample_dirichlet(alpha, shape, generator=generator)
        return tensors

    def sample_given(
        self,
        tensors: Mapping[int, Float[Tensor, "batch ... vocab"]],
        *,
        generator: torch.Generator,
    ) -> Batch:
        """Draw one sequence from each of the given transition tensors.

        Args:
            tensors: as `sample_tensors` returns them. To draw many sequences from one set, expand
                it along the batch axis, which copies nothing.
            generator: source of the tokens.

        Raises:
            PriorError: the tensor for a number of parents is missing or has the wrong shape.
        """
        n_sequences = self._checked(tensors)
        device, vocab = generator.device, self.vocab_size
        rows = torch.arange(n_sequences, device=device)
        first = next(iter(tensors.values()))
        shape = (self.sequence_length, n_sequences, 1)
        threshold = torch.rand(shape, generator=generator, dtype=first.dtype, device=device)
        tokens = torch.empty(shape[:2], dtype=torch.int64, device=device)
        uniform_law = first.new_ones(vocab)
        for position, parents in enumerate(self.graph.parents):
            law = tensors[len(parents)][rows, *tokens[list(parents)]] if parents else uniform_law
            tokens[position] = (threshold[position] >= cumulative(law)[..., :-1]).sum(-1)
        query = self.query_parents
        return Batch(tokens.T.contiguous(), tensors[len(query)][rows, *tokens[list(query)]])

    def _checked(self, tensors: Mapping[int, Tensor]) -> int:
        if not set(self.parent_numbers) <= set(tensors):
            raise PriorError(
                f"transition tensors are given for {sorted(tensors)} parents:"
                f" the graph needs {list(self.parent_numbers)}"
            )
        n_sequences = next(iter(tensors.values())).shape[0]
        for k, tensor in tensors.items():
            expected = (n_sequences, *(self.vocab_size,) * (k + 1))
            if tensor.shape != expected:
                raise PriorError(
                    f"the transition tensor of {k} parents has the shape {tuple(tensor.shape)}:"
                    f" expected {expected}"
                )
        return n_sequences


class _Urns:
    """The Polya urns of all contexts of k tokens, for every sequence of a batch."""

    def __init__(self, task: SeveralParentsTask, k: int, n: int, device: torch.device) -> None:
        self.vocab_size = task.vocab_size
        # A context is encoded as an integer, or as several if S^k exceeds an int64.
        self.digits = max(1, int(_CODE_BITS / math.log2(self.vocab_size)))
        length = sum(len(row) == k for row in task.graph.parents)
        shape = (-(-k // self.digits), length, n)
        self.codes = torch.empty(shape, dtype=torch.int64, device=device)
        self.drawn = torch.empty(shape[1:], dtype=torch.int64, device=device)
        self.n_drawn = 0

    def draw(self, context: list[Tensor], new: Tensor, threshold: Tensor, total: float) -> Tensor:
        """One token for every sequence: `new`, or a copy of an earlier draw in the same context.

        `new` has the weight `total`, each earlier draw the weight 1.
        """
        m = self.n_drawn
        for word, start in enumerate(range(0, len(context), self.digits)):
            code = torch.zeros_like(new)
            for tokens in context[start : start + self.digits]:
                code = code * self.vocab_size + tokens
            self.codes[word, m] = code
        if m:
            matches = self.codes[0, :m] == self.codes[0, m]
            for codes in self.codes[1:]:
                matches &= codes[:m] == codes[m]
            drawn_before = matches.cumsum(0, dtype=torch.int16)
            count = drawn_before[-1]
            # Rounding must not pick an index past the last draw.
            picked = (threshold * (total + count) - total).minimum(count - 0.5)
            index = (drawn_before <= picked).sum(0).clamp(max=m - 1)
            copied = self.drawn[:m].gather(0, index.unsqueeze(0)).squeeze(0)
            new = torch.where(picked >= 0, copied, new)
        self.drawn[m] = new
        self.n_drawn += 1
        return new
