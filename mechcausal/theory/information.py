"""Information between the positions of a graph with several parents, averaged over the prior.

For given transition tensors it is exact if elimination is feasible, otherwise estimated from
sequences. For the single-parent task, `pairwise.pairwise_theory` has closed forms.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.support.statistics import mean_of_moments
from mechcausal.tasks import SeveralParentsTask
from mechcausal.tasks.priors import FixedTransition
from mechcausal.theory.budget import (
    PRODUCTS_PER_SECOND,
    TABLE_ENTRIES_PER_SECOND,
    Report,
    affordable,
)
from mechcausal.theory.elimination import elimination_width, exact_information
from mechcausal.theory.pairwise import PairwiseTheory
from mechcausal.theory.sampled import N_GROUPS, sampled_information

# Approximate limit on the entries of transition tensors and tables held at a time.
_MAX_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class ParentInformation:
    """Information between positions, and of each position with all of its parents.

    Positions 0 ... n-1 are those of the graph; the token to be predicted, drawn from the target,
    is position n. All averages over the prior come with their standard error (0 for a fixed matrix
    and the exact method); for the Monte Carlo method it includes the noise of the sequences.

    Attributes:
        graph: the causal graph.
        method: for given transition tensors, "exact" or "monte carlo".
        n_priors: sets of transition tensors averaged over.
        n_wanted: sets asked for; more than `n_priors` if time was limited.
        n_sequences: sequences for each of them; 0 for the exact method.
        chi2: chi-squared information of each pair of positions, symmetric; the diagonal is the
            number of tokens with positive probability minus one: S - 1 under a Dirichlet prior.
        chi2_stderr: its standard error.
        shannon: Shannon information in nats, symmetric; the diagonal is the entropy.
        shannon_stderr: its standard error.
        set_chi2: chi-squared information of each position with all of its parents; 0 for roots.
        set_chi2_stderr: its standard error.
        set_shannon: Shannon information of each position with all of its parents, nats.
        set_shannon_stderr: its standard error.
    """

    graph: CausalGraph
    method: Literal["exact", "monte carlo"]
    n_priors: int
    n_wanted: int
    n_sequences: int
    chi2: Float[Tensor, "pos pos"]
    chi2_stderr: Float[Tensor, "pos pos"]
    shannon: Float[Tensor, "pos pos"]
    shannon_stderr: Float[Tensor, "pos pos"]
    set_chi2: Float[Tensor, "pos"]
    set_chi2_stderr: Float[Tensor, "pos"]
    set_shannon: Float[Tensor, "pos"]
    set_shannon_stderr: Float[Tensor, "pos"]

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """All (parent, child) pairs, ordered by child; the token to be predicted is child n.

        `chi2[child, parent]` is the information of an edge.
        """
        n = self.graph.n_positions
        return (*self.graph.edges, *((parent, n) for parent in self.graph.query_parents or ()))


Information = PairwiseTheory | ParentInformation
"""Theory for either task; both have `graph`, `chi2`, `shannon` and their standard errors."""

MAX_STATES = 20_000
"""Entries of the largest joint table above which information is sampled."""


def parent_information(
    task: SeveralParentsTask,
    *,
    n_priors: int = 200,
    generator: torch.Generator | None = None,
    n_sequences: int = 4096,
    max_states: int = MAX_STATES,
    max_seconds: float | None = None,
    on_progress: Report | None = None,
) -> ParentInformation:
    """Average the information between positions over the prior.

    Args:
        task: graph and prior.
        n_priors: sets of transition tensors to average over. For a fixed matrix: ignored by the
            exact method, the number of repetitions for the Monte Carlo method.
        generator: source of tensors and sequences.
        n_sequences: for each set of tensors, if the method is Monte Carlo.
        max_states: the largest joint table, S^`elimination_width`, for the exact method.
        max_seconds: averages over fewer sets if more would take longer; counted in operations, not
            timed. No limit when absent.
        on_progress: called now and then with the number of sets done and their total.

    Raises:
        PriorError: the transition tensors are too large.
        ValueError: fewer than 2 priors for a Dirichlet prior or the Monte Carlo method, or fewer
            than 16 sequences for the latter.

    Example:
        >>> from mechcausal.graphs import k_gram
        >>> sticky = FixedTransition(((0.9, 0.1), (0.1, 0.9)))
        >>> info = parent_information(SeveralParentsTask(k_gram(3, 1), sticky))
        >>> info.method, [round(x, 4) for x in info.chi2[3].tolist()]  # 0.8^6, 0.8^4, 0.8^2, S-1
        ('exact', [0.2621, 0.4096, 0.64, 1.0])
    """
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    states = task.vocab_size ** elimination_width(task.graph)
    exact = states <= max_states
    if exact and isinstance(task.prior, FixedTransition):
        n_priors = 1
    elif n_priors < 2:
        raise ValueError(f"n_priors is {n_priors}: at least 2 are needed for a standard error")
    if not exact and n_sequences < 2 * N_GROUPS:
        raise ValueError(f"n_sequences is {n_sequences}: at least {2 * N_GROUPS} are needed")
    n_sequences = 0 if exact else n_sequences - n_sequences % N_GROUPS
    n_wanted = n_priors
    if n_priors > 1:
        seconds = _seconds_each(task, states if exact else None, n_sequences)
        n_priors = affordable(n_priors, max_seconds=max_seconds, seconds_each=seconds)
    chunk = 1
    if exact:
        chunk = max(1, _MAX_ELEMENTS // max(states, task.sequence_length * task.vocab_size**2))
    totals: dict[str, Tensor] = {}
    for start in range(0, n_priors, chunk):
        size = min(chunk, n_priors - start)
        tensors = task.sample_tensors(size, generator=generator, dtype=torch.float64)
        if exact:
            values = exact_information(task.graph, tensors)
        else:
            values = sampled_information(task, tensors, n_sequences, generator=generator)
        for name, value in values.items():
            moments = torch.stack([value.sum(0), value.square().sum(0)]).cpu()
            totals[name] = totals.get(name, torch.zeros_like(moments)) + moments
        if on_progress is not None:
            on_progress(start + size, n_priors)
    fields = {}
    for name, total in totals.items():
        fields[name], fields[f"{name}_stderr"] = mean_of_moments(total, n_priors)
    method: Literal["exact", "monte carlo"] = "exact" if exact else "monte carlo"
    return ParentInformation(task.graph, method, n_priors, n_wanted, n_sequences, **fields)


def theory_notes(theory: Information, remedy: str) -> list[str]:
    """A note that theory was averaged over fewer draws than asked for; empty if it was not.

    Args:
        theory: of a graph.
        remedy: the setting that allows more draws.
    """
    if theory.n_priors >= theory.n_wanted:
        return []
    note = (
        f"theory was averaged over {theory.n_priors:,} draws of the prior in place of "
        f"{theory.n_wanted:,}, which would take too long (raise {remedy} for more)"
    )
    if theory.graph.edges:
        errors = theory.chi2_stderr
        parent, child = max(theory.graph.edges, key=lambda edge: float(errors[edge[1], edge[0]]))
        note += (
            f": the largest standard error of an edge's χ²-information is "
            f"{errors[child, parent]:.2g} ({parent} → {child}: {theory.chi2[child, parent]:.4g})"
        )
    return [note]


def _seconds_each(task: SeveralParentsTask, states: int | None, n_sequences: int) -> float:
    """Estimate of the seconds that one set of tensors takes on a busy core.

    Args:
        task: graph and prior.
        states: entries of the largest joint table; None for the Monte Carlo method.
        n_sequences: sequences drawn by the Monte Carlo method.
    """
    n, size = task.sequence_length + 1, task.vocab_size
    if states is not None:  # mostly sums, a tenth of the work of a logarithm
        return n * n / 2 * states / (10 * TABLE_ENTRIES_PER_SECOND)
    products = (n * size) ** 2 * n_sequences
    entries = (N_GROUPS + 1) * (n * size) ** 2 + n_sequences * n * size
    return products / PRODUCTS_PER_SECOND + entries / TABLE_ENTRIES_PER_SECOND
