"""Draw tokens: along the edges of graphs, for one run or many at once, and from single rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.tasks.base import cumulative
from mechcausal.tasks.priors import stationary_distribution

# Positions of one depth are drawn together, as long as their distributions have no more entries.
_MAX_ENTRIES = 8_000_000


@dataclass(frozen=True)
class Level:
    """The positions of one depth in the graphs of some runs, counted through all runs.

    Attributes:
        run: whose position it is.
        position: run r's position i is number r T + i.
        parent: its parent, counted alike; 0 for roots.
    """

    run: Int[Tensor, "n"]
    position: Int[Tensor, "n"]
    parent: Int[Tensor, "n"]

    def parts(self, size: int) -> list["Level"]:
        """The same positions, at most so many at a time."""
        if len(self.run) <= size:
            return [self]
        columns = (column.split(size) for column in (self.run, self.position, self.parent))
        return [Level(*part) for part in zip(*columns, strict=True)]


@lru_cache(maxsize=64)
def levels_of(graphs: tuple[CausalGraph, ...], device: torch.device) -> list[Level]:
    """The positions of several single-parent graphs of equal length by depth, roots first."""
    levels: list[list[tuple[int, int, int]]] = []
    for run, graph in enumerate(graphs):
        start, parents = run * graph.sequence_length, graph.parent_array()
        levels += [[] for _ in range(len(graph.levels) - len(levels))]
        for level, positions in zip(levels, graph.levels, strict=False):
            level += [(run, start + i, start + max(parents[i], 0)) for i in positions]
    return [Level(*torch.tensor(level, dtype=torch.int64, device=device).T) for level in levels]


def draw_tokens(
    transition: Float[Tensor, "sequence vocab vocab"],
    uniform: Float[Tensor, "position batch"],
    levels: Sequence[Level],
) -> Int[Tensor, "position batch"]:
    """One token for every position: of roots from `mu`, else from the row of the parent's token.

    Args:
        transition: of every sequence, those of a run one after another, as many in each run.
        uniform: one draw from [0, 1) for each position of a run, in each of its sequences.
        levels: by depth, roots first.

    Returns:
        The tokens; positions that are in no level are not set.
    """
    n_sequences, vocab, _ = transition.shape
    batch = uniform.shape[1]
    by_token = cumulative(transition).view(-1, vocab)
    of_roots = cumulative(stationary_distribution(transition, dtype=transition.dtype))
    sequence = torch.arange(n_sequences, device=transition.device).view(-1, batch)
    first_rows = sequence * vocab

    def of_runs(values: Tensor, level: Level) -> Tensor:
        return values if len(values) == 1 else values.index_select(0, level.run)

    tokens = torch.empty(uniform.shape, dtype=torch.int64, device=transition.device)
    at_once = max(1, _MAX_ENTRIES // (batch * vocab))
    for depth, level in enumerate(levels):
        for part in level.parts(at_once):
            if depth == 0:
                table, rows = of_roots, of_runs(sequence, part).expand(len(part.run), -1)
            else:
                table, rows = by_token, tokens.index_select(0, part.parent)
                rows += of_runs(first_rows, part)
            passed = table.index_select(0, rows.reshape(-1))
            drawn = uniform.index_select(0, part.position).view(-1, 1)
            token = torch.searchsorted(passed, drawn, right=True)
            tokens.index_copy_(0, part.position, token.view(rows.shape))
    return tokens


def draw_rows(rows: Float[Tensor, "n outcome"], generator: torch.Generator) -> Int[Tensor, "n"]:
    """One outcome from each distribution, on the generator's device."""
    return torch.multinomial(rows, 1, generator=generator).squeeze(1)
