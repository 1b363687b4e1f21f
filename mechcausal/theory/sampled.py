"""Information in a graph with several parents by Monte Carlo, given its transition tensors.

For graphs whose frontier is too wide for elimination. With x_j the one-hot token of position j and
r_i = pi_k(. | tokens of i's parents), `P(s_j, s_i) = E[x_j r_i^T]` for j < i, so one Gram matrix
holds all pairs; using r_i instead of the token of i reduces the noise. Information is convex in the
table, so noise biases it upwards (for example by (S-1)^2 / 2N for the Shannon information of
independent tokens in N sequences); a jackknife over groups of sequences removes the bias of order
1/N.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.tasks import SeveralParentsTask
from mechcausal.theory.elimination import table_information

N_GROUPS = 8
"""Number of groups of sequences for the jackknife."""


def sampled_information(
    task: SeveralParentsTask,
    tensors: dict[int, Float[Tensor, "1 ... vocab"]],
    n_sequences: int,
    *,
    generator: torch.Generator,
) -> dict[str, Float[Tensor, "1 ..."]]:
    """Information of every pair of positions, and of every position with all of its parents.

    Args:
        task: graph and prior; the token to be predicted is position n.
        tensors: one set, as `task.sample_tensors` returns it, float64.
        n_sequences: drawn from the set, rounded down to a multiple of `N_GROUPS`.
        generator: source of the sequences.

    Returns:
        Estimates of the quantities of `elimination.exact_information`.
    """
    per_group = n_sequences // N_GROUPS
    n, vocab = task.sequence_length, task.vocab_size
    shared = {k: t.expand(N_GROUPS * per_group, *t.shape[1:]) for k, t in tensors.items()}
    batch = task.sample_given(shared, generator=generator)
    laws = _laws(task, batch.tokens, tensors).view(N_GROUPS, per_group, n + 1, vocab)
    one_hot = torch.nn.functional.one_hot(batch.tokens, vocab).to(laws.dtype)
    one_hot = one_hot.view(N_GROUPS, per_group, n * vocab)
    gram = (one_hot.mT @ laws.flatten(2)).view(N_GROUPS, n, vocab, n + 1, vocab)
    parts = [
        gram.transpose(2, 3),
        laws.sum(1),
        laws.square().sum(1),
        torch.xlogy(laws, laws).sum((1, 3)),
    ]
    totals = [part.sum(0, keepdim=True) for part in parts]
    full_sample = _information(totals, N_GROUPS * per_group)
    left_out = [total - part for total, part in zip(totals, parts, strict=True)]
    without_group = _information(left_out, (N_GROUPS - 1) * per_group)
    return {
        name: N_GROUPS * value - (N_GROUPS - 1) * without_group[name].mean(0, keepdim=True)
        for name, value in full_sample.items()
    }


def _laws(
    task: SeveralParentsTask, tokens: Tensor, tensors: dict[int, Tensor]
) -> Float[Tensor, "batch pos vocab"]:
    """The distribution that each token was drawn from; the token to be predicted comes last."""
    first = next(iter(tensors.values()))
    uniform = first.new_full((tokens.shape[0], task.vocab_size), 1 / task.vocab_size)
    columns = tokens.T
    laws = [
        tensors[len(parents)][0][tuple(columns[list(parents)])] if parents else uniform
        for parents in (*task.graph.parents, task.query_parents)
    ]
    return torch.stack(laws, 1)


def _information(sums: list[Tensor], count: int) -> dict[str, Float[Tensor, "group ..."]]:
    """All quantities from the sums over `count` sequences of each group."""
    pairs, marginal, square, log_law = (part / count for part in sums)
    groups, n, _, vocab, _ = pairs.shape
    tables = pairs.new_zeros(groups, n + 1, n + 1, vocab, vocab)
    tables[:, :n] = pairs
    diagonal = torch.arange(n + 1, device=pairs.device)
    tables[:, diagonal, diagonal] = torch.diag_embed(marginal)
    information = {}
    for name, values in zip(("chi2", "shannon"), table_information(tables), strict=True):
        # The Gram matrix used the later position's distribution: only [j, i] with j <= i is valid.
        upper = values.triu()
        information[name] = upper + upper.triu(1).mT
    # Given its parents' tokens, a position's distribution is known: no table of S^k contexts.
    tiny = torch.finfo(marginal.dtype).tiny
    information["set_chi2"] = (square / marginal.clamp(min=tiny)).sum(2) - 1
    information["set_shannon"] = log_law - torch.xlogy(marginal, marginal).sum(2)
    return information
