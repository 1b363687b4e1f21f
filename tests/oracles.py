"""Slow and obvious ways to the numbers that the laboratory computes fast, and what tests share."""

import math
from fractions import Fraction
from itertools import product

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.tasks import SeveralParentsTask, SingleParentTask
from mechcausal.tasks.priors import DirichletPrior

MIXED = CausalGraph(((), (0,), (0, 1), (0, 1), (2,), (1, 3)), (2, 5))
"""One and two parents."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric_task(graph: CausalGraph, alpha: float, vocab_size: int) -> SeveralParentsTask:
    return SeveralParentsTask(graph, DirichletPrior.symmetric(alpha, vocab_size))


def z_score(values: Tensor, expected: float) -> float:
    """How many standard errors the mean lies from what is expected."""
    return float((values.mean() - expected) / (values.std() / len(values) ** 0.5))


def random_patterns(n_heads: int, length: int, seed: int) -> Tensor:
    scores = 3 * torch.randn(n_heads, length, length, generator=seeded(seed))
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def forest(*parents: int) -> CausalGraph:
    """From the parent of every position, -1 for a root."""
    return CausalGraph.from_parents(parents)


@st.composite
def parent_lists(draw: st.DrawFn, most: int) -> list[int]:
    # Graphs are built by the test: beartype uses the global random state, which strategies may not.
    n = draw(st.integers(1, most))
    return [draw(st.integers(-1, child - 1)) for child in range(n)]


@st.composite
def transition_rows(draw: st.DrawFn, largest: int = 3) -> tuple[tuple[float, ...], ...]:
    """Irreducible matrices, zeros included: every state leads to the next one in a cycle."""
    size = draw(st.integers(2, largest))
    rows = []
    for state in range(size):
        weights = draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
        weights[(state + 1) % size] += 1
        rows.append(tuple(weight / sum(weights) for weight in weights))
    return tuple(rows)


def exact_stationary(matrix: Tensor, floor: float = 0.0) -> list[Fraction]:
    """The stationary distribution in rational arithmetic: no rounding at all.

    `mu Q = 0` with the generator Q, whose diagonal makes rows sum to 0, and `sum mu = 1`.
    """
    size = matrix.shape[0]
    rates = [[Fraction(max(p, floor)) for p in row] for row in matrix.double().tolist()]
    for state in range(size):
        others = (rates[state][s] for s in range(size) if s != state)
        rates[state][state] = -sum(others, Fraction(0))
    # Unknowns mu; one balance equation is redundant and gives way to the normalisation.
    system = [[rates[s][state] for s in range(size)] + [Fraction(0)] for state in range(size - 1)]
    system.append([Fraction(1)] * (size + 1))
    for column in range(size):
        pivot = next(row for row in range(column, size) if system[row][column] != 0)
        system[column], system[pivot] = system[pivot], system[column]
        scale = system[column][column]
        system[column] = [x / scale for x in system[column]]
        for row in range(size):
            factor = system[row][column]
            if row != column and factor != 0:
                terms = zip(system[row], system[column], strict=True)
                system[row] = [x - factor * y for x, y in terms]
    return [row[-1] for row in system]


def joint_distribution(graph: CausalGraph, pi: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """The probability of every sequence of graph positions, `[s_0, ..., s_{n-1}]`."""
    parents = graph.parent_array()
    joint = np.empty((len(mu),) * len(parents))
    for tokens in product(range(len(mu)), repeat=len(parents)):
        probability = 1.0
        for token, parent in zip(tokens, parents, strict=True):
            probability *= mu[token] if parent < 0 else pi[tokens[parent], token]
        joint[tokens] = probability
    return joint


def urn_counts(
    task: SeveralParentsTask, tokens: tuple[int, ...]
) -> dict[tuple[int, ...], list[int]]:
    """How often each token followed each context, position by position."""
    counts: dict[tuple[int, ...], list[int]] = {}
    for token, parents in zip(tokens, task.graph.parents, strict=True):
        if parents:
            context = tuple(tokens[parent] for parent in parents)
            counts.setdefault(context, [0] * task.vocab_size)[token] += 1
    return counts


def integrated_probability(task: SeveralParentsTask, tokens: tuple[int, ...]) -> float:
    """The probability of a sequence over all transition tensors: Dirichlet-multinomial rows."""
    alpha = task.prior.concentration
    log_probability = -len(task.graph.roots) * math.log(task.vocab_size)
    for row in urn_counts(task, tokens).values():
        log_probability += math.lgamma(sum(alpha)) - math.lgamma(sum(alpha) + sum(row))
        for a, count in zip(alpha, row, strict=True):
            log_probability += math.lgamma(a + count) - math.lgamma(a)
    return math.exp(log_probability)


def tensor_distribution(graph: CausalGraph, tensors: dict[int, np.ndarray]) -> np.ndarray:
    """The probability of every sequence and the token predicted, `[s_0, ..., s_{n-1}, target]`."""
    size = tensors[len(graph.query_parents or ())].shape[-1]
    rows = (*graph.parents, graph.query_parents or ())
    joint = np.empty((size,) * len(rows))
    for tokens in product(range(size), repeat=len(rows)):
        probability = 1.0
        for token, parents in zip(tokens, rows, strict=True):
            context = tuple(tokens[parent] for parent in parents)
            probability *= tensors[len(parents)][(*context, token)] if parents else 1 / size
        joint[tokens] = probability
    return joint


def pair_distribution(joint: np.ndarray, i: int, j: int) -> np.ndarray:
    """`P(s_i, s_j)`, the diagonal of the marginal for i = j."""
    if i == j:
        others = tuple(axis for axis in range(joint.ndim) if axis != i)
        return np.asarray(np.diag(joint.sum(others)))
    pair = joint.sum(tuple(axis for axis in range(joint.ndim) if axis not in (i, j)))
    return np.asarray(pair if i < j else pair.T)


def pattern_gradient(
    task: SingleParentTask, n_sequences: int, *, beta0: float, epsilon: float, seed: int
) -> tuple[Tensor, Tensor]:
    """`-dL/dpattern` of layer 1 at A1 = 0, A2 = beta0 I: its mean and standard error.

    One gradient for each sequence, centred by row over keys j <= i, over the graph's positions.
    Written from the model's formula, without the model.
    """
    batch = task.sample(n_sequences, generator=seeded(seed))
    tokens, length = batch.tokens, task.sequence_length
    visible = torch.ones(length, length).tril()
    uniform = visible / visible.sum(1, keepdim=True)
    pattern = uniform.expand(n_sequences, -1, -1).clone().requires_grad_()
    matches = beta0 * (tokens == tokens[:, -1:]).float()
    attention = torch.einsum("bij,bj->bi", pattern, matches).softmax(-1)
    one_hot = torch.nn.functional.one_hot(tokens, task.vocab_size).float()
    f = torch.einsum("bi,bis->bs", attention, one_hot)
    (batch.target * (f + epsilon).log()).sum().backward()
    assert pattern.grad is not None
    gradient = pattern.grad.double() * visible
    gradient = (gradient - gradient.sum(2, keepdim=True) / visible.sum(1, keepdim=True)) * visible
    gradient = gradient[:, :-1, :-1]
    return gradient.mean(0), gradient.std(0) / n_sequences**0.5
