"""Sequences of many runs at once, for each run those that its own task would draw.

Random numbers are drawn run by run, each from its run's generator, into one buffer; whatever
follows from them is computed for all runs together. So what a run gets depends on its generator
alone, up to rounding, and not on the runs beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.priors import (
    PROBABILITY_FLOOR,
    DirichletPrior,
    FixedTransition,
    log_gamma_correction,
    log_gamma_scale,
    propose_log_gamma,
    stationary_distribution,
)
from mechcausal.tasks.base import cumulative
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
        self._levels = [
            torch.tensor(level, device=self._device).T for level in _levels(tasks, self._length)
        ]
        dirichlet = [t.prior.representable for t in tasks if isinstance(t.prior, DirichletPrior)]
        fixed = [t.prior.rows for t in tasks if isinstance(t.prior, FixedTransition)]
        values = torch.tensor(dirichlet or fixed, dtype=torch.float32, device=self._device)
        self._concentration = values if dirichlet else None
        self._fixed = values if fixed else None

    def sample(self, n_sequences: int) -> RunsBatch:
        """Draw that many sequences of every run, as `SingleParentTask.sample` does."""
        runs, vocab, length = len(self._generators), self._vocab, self._length
        transition = self._transitions(n_sequences).view(-1, vocab, vocab)
        # One contiguous column for each threshold: what is looked up lies close together.
        thresholds = cumulative(transition).view(-1, vocab)[:, :-1].T.contiguous()
        stationary = stationary_distribution(transition).to(transition.dtype)
        root_thresholds = cumulative(stationary)[:, :-1].T.contiguous()
        uniform = self._draw(torch.rand, [length * n_sequences] * runs).view(-1, n_sequences)
        tokens = torch.empty(runs * length, n_sequences, dtype=torch.int64, device=self._device)
        sequence = torch.arange(runs * n_sequences, device=self._device).view(runs, -1)
        offsets = sequence * vocab
        for number, (run, position, parent) in enumerate(self._levels):
            table, rows = root_thresholds, sequence.index_select(0, run)
            if number > 0:
                table, rows = thresholds, offsets.index_select(0, run)
                rows += tokens.index_select(0, parent)
            drawn = _token(uniform.index_select(0, position), table, rows)
            tokens.index_copy_(0, position, drawn)
        query = torch.empty(runs, n_sequences, dtype=torch.int64, device=self._device)
        for row, generator in zip(query, self._generators, strict=True):
            torch.randint(vocab, row.shape, generator=generator, out=row)
        tokens = tokens.view(runs, length, n_sequences)
        tokens[:, -1] = query
        target = transition.view(-1, vocab)[query + offsets]
        return RunsBatch(tokens.mT.contiguous(), target)

    def _transitions(self, n_sequences: int) -> Float[Tensor, "run batch vocab vocab"]:
        if self._fixed is not None:
            return self._fixed.unsqueeze(1).repeat(1, n_sequences, 1, 1)
        return self._log_gamma(n_sequences).softmax(-1).clamp_(min=PROBABILITY_FLOOR)

    def _log_gamma(self, n_sequences: int) -> Float[Tensor, "run batch vocab vocab"]:
        """As `sample_log_gamma`, which see, of every run."""
        assert self._concentration is not None
        concentration = self._concentration
        runs, vocab = concentration.shape
        shape = (runs, n_sequences, vocab, vocab)
        size = n_sequences * vocab * vocab
        scale = log_gamma_scale(concentration)
        normal, uniform = (self._draw(draw, [size] * runs) for draw in (torch.randn, torch.rand))
        log_draw, accepted = propose_log_gamma(
            scale.view(runs, 1, 1, vocab), normal.view(shape), uniform.view(shape)
        )
        everywhere = log_draw.view(-1)
        rejected = (~accepted).view(-1).nonzero().squeeze(1)
        while len(rejected):
            run = rejected // size
            counts = run.bincount(minlength=runs).tolist()
            normal, uniform = (self._draw(draw, counts) for draw in (torch.randn, torch.rand))
            proposal, accepted = propose_log_gamma(scale[run, rejected % vocab], normal, uniform)
            everywhere[rejected] = proposal
            rejected = rejected[~accepted]
        below = (concentration < 1).any(1).tolist()
        if any(below):
            # Runs without a concentration below 1 draw nothing here; what stands in counts as 0.
            uniform = self._draw(torch.rand, [size * is_below for is_below in below])
            if not all(below):
                whole = uniform.new_zeros(runs, size)
                whole[torch.tensor(below, device=self._device)] = uniform.view(-1, size)
                uniform = whole
            broadcast = concentration.view(runs, 1, 1, vocab)
            log_draw += log_gamma_correction(broadcast, uniform.view(shape))
        return log_draw

    def _draw(self, draw: Callable[..., Tensor], sizes: Sequence[int]) -> Float[Tensor, "all"]:
        """Draws of each run one after another, from its own generator."""
        buffer = torch.empty(sum(sizes), device=self._device)
        parts = buffer.split(list(sizes))
        for part, size, generator in zip(parts, sizes, self._generators, strict=True):
            if size:
                draw(size, generator=generator, out=part)
        return buffer


def _levels(tasks: Sequence[SingleParentTask], length: int) -> list[list[tuple[int, int, int]]]:
    """By depth in the graph: run, position and parent, counted through all runs."""
    levels: list[list[tuple[int, int, int]]] = []
    for run, task in enumerate(tasks):
        parents = task.graph.parent_array()
        for depth, level in enumerate(task.graph.levels):
            if depth == len(levels):
                levels.append([])
            start = run * length
            levels[depth] += [(run, start + i, start + max(parents[i], 0)) for i in level]
    return levels


def _token(
    uniform: Float[Tensor, "pos batch"],
    thresholds: Float[Tensor, "step row"],
    rows: Int[Tensor, "pos batch"],
) -> Int[Tensor, "pos batch"]:
    """How many thresholds of its row each draw has passed."""
    flat, tokens = rows.view(-1), torch.zeros_like(rows)
    for column in thresholds:
        tokens += uniform >= column.index_select(0, flat).view(rows.shape)
    return tokens
