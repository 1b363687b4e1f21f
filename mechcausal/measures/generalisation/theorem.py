"""The paper's generalisation theorem, as a table of errors against the length of sequences.

A model trained by Algorithm 1 predicts, for EVERY transition matrix with entries of at least
gamma/S, inside the prior or not,

    sup_s' |f(s)_s' - pi(s' | query)|  of order  log T / T^(c gamma)

with high probability. Source: Nichani, Damian, Lee, ICML 2024 (arXiv 2402.14735).

An error that vanishes needs an A2 = beta I that grows with T. A beta that stays weighs a match
e^beta times as much as anything else, whatever T is, and the error stops falling at the bias of
the `counting_limit`. The other end is beta to infinity: no bias, but all of the noise of the
empirical frequencies. Measured with the model of the markov_chain recipe (S = 10, Dirichlet base,
2,000 sequences a cell, T = 20 ... 320): the ideal model's median error falls like T^-0.53 to
T^-0.55; that of the trained model bends towards its bias, with fitted powers of -0.27 at
gamma = 0.1, -0.36 at 0.3 and -0.49 at 0.6 (give or take 0.03). At T = 20 the trained model is the
better one; at T = 320 and gamma = 0.1 the ideal one is, with 0.09 against 0.16.
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
    """The trained model carried over to sequences of another length, of the same kind of graph.

    A2 is copied. Of A1 three numbers are kept, each an average over the trained rows: the log-odds
    of the attention on the parent, which training makes nearly equal in all rows and at all
    lengths (6.4 to 6.9 in chains of T = 20 and T = 80, but for the first row); and how much more a
    root, and the query, attend to themselves than to one other key (in logits,
    `log-odds + log(number of other keys)`). All other keys share evenly; what the trained rows
    preferred among them is averaged away. Carried over to its own length, the model of a chain
    changes its predictions by 0.001 (sup, mean over sequences), that of pairs, where every other
    position is a root, by 0.02.

    Args:
        model: trained; left as it is.
        graph_of_length: the graph for a number of positions, as the presets take it (the query is
            not counted); for T - 1 positions the graph that the model was trained on.
        length: T of the new model, the query included.

    Raises:
        ValueError: a graph of another length than asked for, or a training graph without edges.
    """
    trained_on = _graph(graph_of_length, model.sequence_length)
    graph = _graph(graph_of_length, length)
    logits = model.A1.double()
    query = model.sequence_length - 1
    alone = _log_odds(logits, [(i, i) for i in trained_on.roots if i > 0])
    root_margin = sum(odds + math.log(i) for i, odds in alone) / max(1, len(alone))
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
    """Mean over edges of `log(a / (1 - a))`, a layer 1's attention on the parent.

    From the logits, so that it stays finite where a rounds to 1.

    Raises:
        ValueError: the graph has no edges, or another length than the model.
    """
    if graph.sequence_length != model.sequence_length or not graph.edges:
        raise ValueError(
            f"needed is a graph with edges and sequences of {model.sequence_length} tokens: found "
            f"{len(graph.edges)} edges and sequences of {graph.sequence_length}"
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
    """What a transplanted model predicts as T grows without end: counts become expectations.

    With a the attention on the parent, rho the share of roots and `m = sum_s mu(s) A2[s, query]`,

        f_s'  ~  (1 - rho) sum_s mu(s) e^(a A2[s, query] + (1 - a) m) pi(s' | s) + rho e^m mu(s'),

    which is pi(s' | query) only for an infinite A2[query, query]: the rest of its distance from
    the row is a bias that no length removes. Holds where the tokens of the parents mix (chains,
    pairs, growing trees), not for a star.

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
    # Roots come last, as one more "copied token" whose successors are mu.
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
        error_median: of the transplanted model.
        error_q90: its 90 % quantile.
        excess_loss: loss minus the oracle's, mean in nats.
        excess_loss_stderr: over sequences, paired.
        floor_median: median error of the `counting_limit`, the bias that stays for T to infinity.
        ideal_median: of the hand-built model with A2 = 50 I. It returns the empirical frequencies
            of what followed the query's token, with one count more where position 0, which has
            only itself to attend to, holds that token.
        ideal_q90: its 90 % quantile.
        ideal_excess_loss: its loss minus the oracle's.
        ideal_excess_loss_stderr: over sequences, paired.
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
    """`error = constant T^slope`, by least squares of logarithms.

    Attributes:
        slope: the power of T; stderr: its standard error, from the scatter around the line alone
            (a curve that bends has a large one, too).
        constant: error at T = 1 on the fitted line.
    """

    slope: float
    stderr: float
    constant: float


@dataclass(frozen=True)
class GeneralisationTable:
    """Rows by gamma and length, and the fitted powers of T of the median errors.

    Attributes:
        rows: in the order of gammas, then lengths.
        fits: of the transplanted model, by gamma.
        ideal_fits: of the ideal model, by gamma.
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

    At each length and gamma both models see the same sequences, of matrices
    `(1 - gamma) base + gamma/S`. Cost: `n_sequences T^2` multiplications for each model and cell.

    Args:
        model: trained by Algorithm 1.
        preset_builder: see `transplant`.
        lengths: T, at least three different ones.
        gammas: each in (0, 1].
        n_sequences: for each cell, at least 2.
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
        # Matrices come from elsewhere: of the task only the graph is used.
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
            of_carried = _figures(carried(batch.tokens), batch.target, epsilon)
            of_ideal = _figures(ideal(batch.tokens), batch.target, epsilon)
            cells[gamma, length] = GeneralisationRow(
                length, gamma, n_sequences, *of_carried, floor, *of_ideal
            )

    def fits(kind: str) -> dict[float, PowerFit]:
        return {
            gamma: fit_power(lengths, [getattr(cells[gamma, t], kind) for t in lengths])
            for gamma in gammas
        }

    rows = tuple(cells[gamma, length] for gamma in gammas for length in lengths)
    return GeneralisationTable(rows, fits("error_median"), fits("ideal_median"))


def fit_power(lengths: Sequence[int], errors: Sequence[float]) -> PowerFit:
    """The power of T that errors follow, by a straight line through their logarithms.

    NaN where an error is 0, which no power of T reaches.

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
