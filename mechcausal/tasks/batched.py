"""Sequences of many runs at once, for each run those that its own task would draw.

Random numbers are drawn run by run, each from its run's generator, into one buffer; whatever
follows from them is computed for all runs together. So what a run gets depends on its generator
alone, up to rounding, and not on the runs beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.tasks.priors import DirichletPrior, FixedTransition, draw_for_each, sample_dirichlet
from mechcausal.tasks.sequences import Level, draw_tokens
from mechcausal.tasks.single_parent import SingleParentTask


@dataclass(frozen=True)
class RunsBatch:
    """Sequences of several runs, as `Batch` has them of one.

    Attributes:
        tokens: the last position is the query.
        target: soft labels.
    """

    tokens: Int[Tensor, "run batch pos"]
    target: Float[Tensor, "run batch vocab"]


class BatchedTask:
    """Single-parent tasks of equal size, sampled together.

    Example:
        >>> from mechcausal.graphs import chain, star
        >>> prior = DirichletPrior.symmetric(0.1, vocab_size=3)
        >>> tasks = [SingleParentTask(graph, prior) for graph in (chain(5), star(5))]
        >>> sources = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        >>> together = BatchedTask(tasks, sources).sample(4).tokens
        >>> alone = tasks[1].sample(4, generator=torch.Generator().manual_seed(1)).tokens
        >>> torch.equal(together[1], alone)
        True
    """

    def __init__(
        self, tasks: Sequence[SingleParentTask], generators: Sequence[torch.Generator]
    ) -> None:
        """Index the graphs.

        Args:
            tasks: of one number of tokens and one length; graphs and priors may differ, but fixed
                matrices and Dirichlet priors do not mix.
            generators: of each run, on one device.

        Raises:
            ValueError: tasks that cannot be sampled together.
        """
        sizes = {(t.vocab_size, t.sequence_length, type(t.prior)) for t in tasks}
        if len(sizes) != 1 or len(tasks) != len(generators):
            raise ValueError("tasks of one batch need one vocabulary, length and kind of prior")
        self._generators = list(generators)
        self._device = generators[0].device
        self._vocab, self._length, _ = next(iter(sizes))
        self._levels = _levels(tasks, self._length, self._device)
        dirichlet = [t.prior.representable for t in tasks if isinstance(t.prior, DirichletPrior)]
        fixed = [t.prior.rows for t in tasks if isinstance(t.prior, FixedTransition)]
        values = torch.tensor(dirichlet or fixed, dtype=torch.float32, device=self._device)
        self._concentration = values if dirichlet else None
        self._fixed = values if fixed else None

    def sample(self, n_sequences: int) -> RunsBatch:
        """Draw that many sequences of every run, as `SingleParentTask.sample` does."""
        runs, vocab, length = len(self._generators), self._vocab, self._length
        transition = self._transitions(n_sequences).view(-1, vocab, vocab)
        uniform = draw_for_each(
            self._generators, torch.rand, [length * n_sequences] * runs, dtype=transition.dtype
        )
        tokens = draw_tokens(transition, uniform.view(-1, n_sequences), self._levels)
        query = torch.empty(runs, n_sequences, dtype=torch.int64, device=self._device)
        for row, generator in zip(query, self._generators, strict=True):
            torch.randint(vocab, row.shape, generator=generator, out=row)
        tokens = tokens.view(runs, length, n_sequences)
        tokens[:, -1] = query
        sequence = torch.arange(runs * n_sequences, device=self._device).view(runs, -1)
        target = transition.view(-1, vocab)[query + sequence * vocab]
        return RunsBatch(tokens.mT.contiguous(), target)

    def _transitions(self, n_sequences: int) -> Float[Tensor, "run batch vocab vocab"]:
        if self._fixed is not None:
            return self._fixed.unsqueeze(1).repeat(1, n_sequences, 1, 1)
        assert self._concentration is not None
        runs, vocab = self._concentration.shape
        return sample_dirichlet(
            self._concentration.view(runs, 1, 1, vocab),
            (runs, n_sequences, vocab, vocab),
            generator=self._generators,
        )


def _levels(tasks: Sequence[SingleParentTask], length: int, device: torch.device) -> list[Level]:
    levels: list[list[tuple[int, int, int]]] = []
    for run, task in enumerate(tasks):
        parents = task.graph.parent_array()
        for depth, level in enumerate(task.graph.levels):
            if depth == len(levels):
                levels.append([])
            start = run * length
            levels[depth] += [(run, start + i, start + max(parents[i], 0)) for i in level]
    return [Level.of(rows, device) for rows in levels]
