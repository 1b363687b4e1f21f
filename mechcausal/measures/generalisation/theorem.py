"""The paper's generalisation theorem: errors against the length of sequences.

For EVERY transition matrix with entries of at least gamma/S, a model trained by Algorithm 1 has

    sup_s' |f(s)_s' - pi(s' | query)|  of order  log T / T^(c gamma)

with high probability. Source: Nichani, Damian, Lee, ICML 2024 (arXiv 2402.14735).

The error vanishes only if beta in A2 = beta I grows with T. With a fixed beta, a match has e^beta
times the weight of other keys at every T, and the error stops falling at the bias of the
`counting_limit`. For beta to infinity there is no bias, but the full noise of the empirical
frequencies.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.measures.generalisation.evaluation import (
    check_n_sequences,
    sup_errors,
)
from mechcausal.measures.generalisation.families import Base, bounded_matrices
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.support.statistics import sequence_mean
from mechcausal.tasks import SingleParentTask, cross_entropies
from mechcausal.tasks.priors import DirichletPrior, stationary_distribution

GraphOfLength = Callable[[int], CausalGraph]


@torch.no_grad()
def transplant(
    model: SimplifiedTransformer, graph_of_length: GraphOfLength, length: int
) -> SimplifiedTransformer:
    """Transfer a trained model to sequences of another length, with the same kind of graph.

    A2 is copied. A1 is rebuilt from three averages over the trained rows: the log-odds of the
    attention on the parent, which are nearly equal in all rows and at all lengths, and the margins
    by which roots and the query attend to themselves more than to one other key (in logits,
    `log-odds + log(number of other keys)`). All other keys of a row get equal attention.

    Args:
        model: trained; not changed.
        graph_of_length: maps a number of positions (without the query) to a graph, like the
            presets; for T - 1 positions it returns the training graph.
        length: T of the new model, including the query.

    Raises:
        ValueError: a graph has the wrong length, or the training graph has no edges.
    """
    trained_on = _graph(graph_of_length, model.sequence_length)
    graph = _graph(graph_of_length, length)
    logits = model.A1.double()
    query = model.sequence_length - 1
    root_odds = _log_odds(logits, [(i, i) for i in trained_on.roots if i > 0])
    root_margin = sum(odds + math.log(i) for i, odds in root_odds) / max(1, len(root_odds))
    query_margin = _log_odds(logits, [(query, query)])[0][1] + math.log(query)
    parent_odds = parent_log_odds(model, trained_on)
    carried = SimplifiedTransformer(model.vocab_size, length, device=model.A1.device)
    carried.A2.copy_(model.A2)
    for position in graph.roots:
        carried.A1[position, position] = root_margin
    for parent, child in graph.edges:
        carried.A1[child, parent] = parent_odds + math.log(child)
    carried.A1[length - 1, length - 1] = query_margin
    return carried


def parent_log_odds(model: SimplifiedTransformer, graph: CausalGraph) -> float:
    """Mean over edges of `log(a / (1 - a))`, where a is layer 1's attention on the parent.

    Computed from the logits, so it is finite even if a rounds to 1.

    Raises:
        ValueError: the graph has no edges, or its length differs from the model's.
    """
    if graph.sequence_length != model.sequence_length or not graph.edges:
        raise ValueError(
            f"the graph has {len(graph.edges)} edges and sequences of {graph.sequence_length} "
            f"tokens: needed are edges and sequences of {model.sequence_length}"
        )
    pairs = [(child, parent) for parent, child in graph.edges]
    odds = [value for _, value in _log_odds(model.A1.detach().double(), pairs)]
    return sum(odds) / len(odds)


def counting_limit(
    A2: Float[Tensor, "vocab vocab"],
    transition: Float[Tensor, "batch vocab vocab"],
    query: Int[Tensor, "batch"],
    *,
    parent_attention: float,
    root_share: float,
) -> Float[Tensor, "batch vocab"]:
    """The prediction of a transplanted model for T to infinity: counts become expectations.

    With a the attention on the parent, rho the share of roots and `m = sum_s mu(s) A2[s, query]`,

        f_s'  ~  (1 - rho) sum_s mu(s) e^(a A2[s, query] + (1 - a) m) pi(s' | s) + rho e^m mu(s'),

    which equals pi(s' | query) only for infinite A2[query, query]; otherwise the distance is a bias
    that remains at every length. Valid if the tokens of the parents mix (chains, pairs, growing
    trees), not for a star.

    Args:
        A2: layer 2's block, [copied token, query token].
        transition: the matrices.
        query: last tokens.
        parent_attention: a.
        root_share: rho.
    """
    mu = stationary_distribution(transition)
    scores = A2.double().T[query]
    mean = (mu * scores).sum(1, keepdim=True)
    copied = parent_attention * scores + (1 - parent_attention) * mean
    # Append the roots as one more "copied token" with the successor distribution mu.
    logits = torch.cat([copied, mean], 1)
    share = torch.cat([(1 - root_share) * mu, torch.full_like(mean, root_share)], 1)
    weight = share * (logits - logits.amax(1, keepdim=True)).exp()
    successors = torch.cat([transition.double(), mu.unsqueeze(1)], 1)
    return torch.einsum("bs,bst->bt", weight / weight.sum(1, keepdim=True), successors)


@dataclass(frozen=True)
class GeneralisationRow:
    """The sup error at one length and one gamma, over random matrices, sequences and queries.

    Attributes:
        length: T.
        gamma: every entry of the matrices is at least gamma/S.
        n_sequences: sequences, each with its own matrix.
        error_median: median error of the transplanted model.
        error_q90: its 90 % quantile.
        excess_loss: loss minus the oracle's, mean in nats.
        excess_loss_stderr: standard error, paired over sequences.
        floor_median: median error of the `counting_limit`, the bias for T to infinity.
        ideal_median: median error of the hand-built model with A2 = 50 I. It predicts the empirical
            frequencies of the tokens that follow the query's token. Position 0, which attends to
            itself, adds one count if it holds the query's token.
        ideal_q90: its 90 % quantile.
        ideal_excess_loss: its loss minus the oracle's.
        ideal_excess_loss_stderr: standard error, paired over sequences.
    """

    length: int
    gamma: float
    n_sequences: int
    error_median: float
    error_q90: float
    excess_loss: float
    excess_loss_stderr: float
    floor_median: float
    ideal_median: float
    ideal_q90: float
    ideal_excess_loss: float
    ideal_excess_loss_stderr: float


@dataclass(frozen=True)
class PowerFit:
    """`error = constant T^slope`, fitted by least squares of the logarithms.

    Attributes:
        slope: the power of T.
        stderr: standard error of the slope, from the scatter around the line (curvature
            increases it, too).
        constant: error at T = 1 on the fitted line.
    """

    slope: float
    stderr: float
    constant: float


@dataclass(frozen=True)
class GeneralisationTable:
    """Rows by gamma and length, and the fitted powers of T of the median errors.

    Attributes:
        rows: ordered by gamma, then length.
        fits: fits for the transplanted model, by gamma.
        ideal_fits: fits for the ideal model, by gamma.
    """

    rows: tuple[GeneralisationRow, ...]
    fits: dict[float, PowerFit]
    ideal_fits: dict[float, PowerFit]


@torch.no_grad()
def generalisation_table(
    model: SimplifiedTransformer,
    preset_builder: GraphOfLength,
    lengths: Sequence[int] = (20, 40, 80, 160, 320),
    gammas: Sequence[float] = (0.1, 0.3, 0.6),
    *,
    n_sequences: int,
    generator: torch.Generator,
    base: Base = "dirichlet",
    epsilon: float = 1e-3,
) -> GeneralisationTable:
    """Errors of the transplanted and of the ideal model as sequences grow, and their powers of T.

    At each length and gamma, both models get the same sequences, drawn from matrices
    `(1 - gamma) base + gamma/S`. Cost: `n_sequences T^2` multiplications per model and cell.

    Args:
        model: trained by Algorithm 1.
        preset_builder: `graph_of_length` of `transplant`.
        lengths: values of T, at least three.
        gammas: each in (0, 1].
        n_sequences: per cell, at least 2.
        generator: source of randomness, on the model's device.
        base: see `bounded_matrices`.
        epsilon: smoothing of predictions in the losses.

    Raises:
        ValueError: fewer than 2 sequences or 3 lengths; see also `transplant`.
        PriorError: a gamma outside (0, 1].
    """
    check_n_sequences(n_sequences)
    if len(set(lengths)) < 3:
        raise ValueError(f"a power of T needs at least 3 different lengths, found {list(lengths)}")
    trained_on = _graph(preset_builder, model.sequence_length)
    parent_attention = float(torch.tensor(parent_log_odds(model, trained_on)).sigmoid())
    vocab = model.vocab_size
    cells: dict[tuple[float, int], GeneralisationRow] = {}
    for length in lengths:
        graph = _graph(preset_builder, length)
        carried = transplant(model, preset_builder, length)
        ideal = SimplifiedTransformer(vocab, length, device=model.A1.device)
        ideal.set_ideal(graph)
        # The prior is not used: `sample_given` gets the matrices below.
        task = SingleParentTask(graph, DirichletPrior.symmetric(1.0, vocab))
        for gamma in gammas:
            transition = bounded_matrices(n_sequences, vocab, generator, gamma=gamma, base=base)
            batch = task.sample_given(transition, generator=generator)
            limit = counting_limit(
                model.A2,
                transition,
                batch.query,
                parent_attention=parent_attention,
                root_share=len(graph.roots) / graph.n_positions,
            )
            floor = sup_errors(limit, batch.target.double()).quantile(0.5).item()
            carried_figures = _figures(carried(batch.tokens), batch.target, epsilon)
            ideal_figures = _figures(ideal(batch.tokens), batch.target, epsilon)
            cells[gamma, length] = GeneralisationRow(
                length, gamma, n_sequences, *carried_figures, floor, *ideal_figures
            )

    def fits(kind: str) -> dict[float, PowerFit]:
        return {
            gamma: fit_power(lengths, [getattr(cells[gamma, t], kind) for t in lengths])
            for gamma in gammas
        }

    rows = tuple(cells[gamma, length] for gamma in gammas for length in lengths)
    return GeneralisationTable(rows, fits("error_median"), fits("ideal_median"))


def fit_power(lengths: Sequence[int], errors: Sequence[float]) -> PowerFit:
    """Fit a power of T to errors, as a straight line through their logarithms.

    All fields are NaN if an error is 0.

    Example:
        >>> fit = fit_power([10, 100, 1000], [0.5, 0.05, 0.005])
        >>> round(fit.slope, 6), round(fit.constant, 6)
        (-1.0, 5.0)
    """
    if min(errors) <= 0:
        return PowerFit(math.nan, math.nan, math.nan)
    line = stats.linregress(np.log(lengths), np.log(errors))
    return PowerFit(float(line.slope), float(line.stderr), math.exp(line.intercept))


def _figures(
    prediction: Tensor, target: Tensor, epsilon: float
) -> tuple[float, float, float, float]:
    """Median and 90 % quantile of the sup error, mean and standard error of the excess loss."""
    errors = sup_errors(prediction, target)
    loss = cross_entropies(prediction, target, epsilon=epsilon)
    excess = sequence_mean(loss - cross_entropies(target, target))
    return errors.quantile(0.5).item(), errors.quantile(0.9).item(), *excess


def _graph(graph_of_length: GraphOfLength, length: int) -> CausalGraph:
    graph = graph_of_length(length - 1)
    if graph.sequence_length != length:
        raise ValueError(
            f"graph_of_length({length - 1}) has sequences of {graph.sequence_length} tokens, "
            f"needed are {length}"
        )
    return graph


def _log_odds(logits: Tensor, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, float]]:
    """For each (query, key): the query, and the log-odds of its attention on the key."""
    odds = []
    for query, key in pairs:
        others = torch.cat([logits[query, :key], logits[query, key + 1 : query + 1]])
        odds.append((query, (logits[query, key] - others.logsumexp(0)).item()))
    return odds
