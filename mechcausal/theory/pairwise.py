"""What information theory predicts: pairwise information, and the attention gradient it implies.

Given `pi`, every pair of positions with nearest common ancestor a at distances m and n has
`P(s_i, s_j) = sum_a mu(a) pi^m(s_i | a) pi^n(s_j | a)`; pairs without a common ancestor are
independent. Everything below is therefore exact given `pi`, and only the average over the prior
needs Monte Carlo.

With `D = diag(mu)`, `M = D^(1/2) pi D^(-1/2)`, `u = sqrt(mu)` and the deflated powers
`C_0 = I - u u^T`, `C_m = (M - u u^T)^m`, the joint of a pair is
`D^(-1/2) P D^(-1/2) - u u^T = C_m^T C_n`, from which (nothing is subtracted after the deflation)

- chi-squared information: `|C_m^T C_n|^2 = <C_m C_m^T, C_n C_n^T>`,
- the paper's `g_ij = E sum_ss' pi(s'|s) / mu(s') P(s_j = s, s_i = s') - 1 = <C_{m+1}, C_n>` for
  a key j at distance m and a query i at distance n from their common ancestor.

All pairs of distances are products of matrices whose rows are the distinct distances, so the work
depends on their number and not on T^2 S^3. Powers below the range of float64 are left out.
Source: Nichani, Damian, Lee, ICML 2024 (arXiv 2402.14735), section 4.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.support.statistics import mean_of_moments
from mechcausal.tasks.priors import FixedTransition, stationary_distribution
from mechcausal.tasks.protocol import Prior
from mechcausal.theory.budget import (
    PRODUCTS_PER_SECOND,
    TABLE_ENTRIES_PER_SECOND,
    Report,
    affordable,
)

# Limit on the entries of an intermediate tensor; sets the chunk size of the average.
_MAX_ELEMENTS = 8_000_000
# Deflated powers with no larger entry count as 0: their products are below the range of float64.
_VANISHED = 1e-160


@dataclass(frozen=True)
class PairDistances:
    """Distances of every pair of positions to their nearest common ancestor.

    Attributes:
        pairs: the distinct distances (m, n), m <= n.
        index: for every pair of positions its row in `pairs`, -1 without a common ancestor.
        up: at [i, j] the distance from i to its common ancestor with j, -1 without one.
    """

    pairs: Int[np.ndarray, "kinds 2"]
    index: Int[np.ndarray, "pos pos"]
    up: Int[np.ndarray, "pos pos"]


def pair_distances(graph: CausalGraph) -> PairDistances:
    """Distances to the nearest common ancestor, for forests of any depth, in O(n^2).

    Raises:
        GraphError: a position with several parents.
    """
    parents = graph.parent_array()
    n = len(parents)
    up = np.full((n, n), -1, dtype=np.int64)
    for i, parent in enumerate(parents):
        up[i, i] = 0
        if parent >= 0:
            # No earlier j descends from i, so i and its parent share their ancestor with j.
            related = np.flatnonzero(up[parent, :i] >= 0)
            up[i, related] = up[parent, related] + 1
            up[related, i] = up[related, parent]
    connected = up >= 0
    low, high = np.minimum(up, up.T), np.maximum(up, up.T)
    keys, inverse = np.unique((low * n + high)[connected], return_inverse=True)
    index = np.full((n, n), -1, dtype=np.int64)
    index[connected] = inverse
    return PairDistances(np.stack([keys // n, keys % n], axis=1), index, up)


@dataclass(frozen=True)
class PairwiseTheory:
    """Information between positions and the attention gradient that follows from it.

    Positions 0 ... n-1 are those of the graph, T = n + 1 includes the query. Averages over the
    prior come with their standard error (0 for a fixed matrix).

    Attributes:
        graph: the causal graph.
        n_priors: transition matrices averaged over.
        n_wanted: transition matrices asked for; more than `n_priors` if time was limited.
        chi2: chi-squared information `E sum P(x,y)^2 / (P(x)P(y)) - 1` over the states that
            occur, symmetric; the diagonal is their number minus one: S - 1, except for a fixed
            matrix with transient states.
        chi2_stderr: its standard error.
        shannon: Shannon information in nats, symmetric; the diagonal is the entropy of `mu`.
        shannon_stderr: its standard error.
        g: the paper's g_ij at [query i, key j], 0 for j > i.
        g_stderr: its standard error.
        bound: upper bound `E sqrt(I_ij I_i,parent(i))` on g_ij (Cauchy-Schwarz); for j < i it is
            at most `E I_i,parent(i)` (data processing). 0 for j > i and in rows of roots.
        predicted_gradient: `-dL/dA1` at A1 = 0, A2 = beta0 I, to leading order in 1/T, rows and
            columns 0 ... T-1; 0 for j > i.
    """

    graph: CausalGraph
    n_priors: int
    n_wanted: int
    chi2: Float[Tensor, "pos pos"]
    chi2_stderr: Float[Tensor, "pos pos"]
    shannon: Float[Tensor, "pos pos"]
    shannon_stderr: Float[Tensor, "pos pos"]
    g: Float[Tensor, "pos pos"]
    g_stderr: Float[Tensor, "pos pos"]
    bound: Float[Tensor, "pos pos"]
    predicted_gradient: Float[Tensor, "query key"]

    def predicted_edges(self, *, z_threshold: float = 4.0) -> tuple[tuple[int, int], ...]:
        """The edges (parent, child) that the predicted gradient names.

        Each row names its key j < i with the largest g, if that g exceeds `z_threshold` standard
        errors (rounding error for a fixed matrix). Rows of roots have g_ij = 0 exactly for every
        j < i, so they name no edge. The row's own key is excluded: its g is `trace(pi) - 1`, which
        is 0 on average over a Dirichlet prior but not for a fixed matrix.
        """
        threshold = z_threshold * self.g_stderr + 1e-12
        edges = []
        for row in range(1, self.g.shape[0]):
            key = int(self.g[row, :row].argmax())
            if self.g[row, key] > threshold[row, key]:
                edges.append((key, row))
        return tuple(edges)


def pairwise_theory(
    graph: CausalGraph,
    prior: Prior,
    *,
    n_priors: int = 1000,
    generator: torch.Generator | None = None,
    beta0: float = 1.0,
    max_seconds: float | None = None,
    on_progress: Report | None = None,
) -> PairwiseTheory:
    """Average the exact information of every pair over the prior.

    Args:
        graph: at most one parent for every position.
        prior: Dirichlet prior, or a fixed matrix (then one evaluation is exact).
        n_priors: transition matrices to average over.
        generator: source of the matrices; not needed for a fixed matrix.
        beta0: initial scale of A2, a factor of the predicted gradient.
        max_seconds: averages over fewer matrices if more would take longer; counted in operations,
            not timed. No limit when absent.
        on_progress: called now and then with the number of matrices done and their total.

    Raises:
        GraphError: a position with several parents.
        ValueError: `n_priors` < 2 for a Dirichlet prior.

    Example:
        >>> from mechcausal.graphs import chain
        >>> sticky = FixedTransition(((0.9, 0.1), (0.1, 0.9)))
        >>> theory = pairwise_theory(chain(3), sticky)
        >>> [round(x, 4) for x in theory.chi2[2].tolist()]  # 0.8^4, 0.8^2, S - 1
        [0.4096, 0.64, 1.0]
        >>> theory.predicted_edges()
        ((0, 1), (1, 2))
    """
    distances = pair_distances(graph)
    if isinstance(prior, FixedTransition):
        n_priors = 1
    elif n_priors < 2:
        raise ValueError(f"n_priors is {n_priors}: at least 2 are needed for a standard error")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    n_wanted = n_priors
    n_powers = int(distances.pairs.max()) + 2
    n_near, n_far = (len(np.unique(column)) for column in distances.pairs.T)
    chunk = max(1, _MAX_ELEMENTS // max(n_powers * prior.vocab_size**2, n_near * n_far))
    totals: dict[str, Tensor] = {}
    done = 0
    while done < n_priors:
        size = min(chunk, n_priors - done)
        transition = prior.sample(size, generator=generator, dtype=torch.float64)
        if isinstance(prior, FixedTransition):
            transition = _visited(transition)
        powers = _Powers(transition, distances.pairs)
        for name, values in powers.quantities().items():
            moments = torch.stack([values.sum(0), values.square().sum(0)])
            totals[name] = totals.get(name, torch.zeros_like(moments)) + moments
        done += size
        if done == size:  # the first
            n_priors = affordable(n_priors, max_seconds=max_seconds, seconds_each=powers.seconds)
            n_priors = max(n_priors, done)
        if on_progress is not None:
            on_progress(done, n_priors)
    spread = {name: mean_of_moments(total, n_priors) for name, total in totals.items()}
    index = torch.from_numpy(distances.index)
    up = torch.from_numpy(distances.up)

    def on_pairs(values: Tensor) -> Tensor:
        return torch.where(index >= 0, values.cpu()[index.clamp(min=0)], 0.0)

    # g depends on which of the two positions is the query: one table for the key at the smaller
    # distance m, one for the key at the larger distance n.
    key_nearer = up.T <= up

    def on_query_key(name: str, part: int) -> Tensor:
        nearer, farther = spread[f"{name}_key_nearer"][part], spread[f"{name}_key_farther"][part]
        return torch.where(key_nearer, on_pairs(nearer), on_pairs(farther)).tril()

    g = on_query_key("g", 0)
    has_parent = torch.tensor([bool(p) for p in graph.parents])
    return PairwiseTheory(
        graph=graph,
        n_priors=n_priors,
        n_wanted=n_wanted,
        chi2=on_pairs(spread["chi2"][0]),
        chi2_stderr=on_pairs(spread["chi2"][1]),
        shannon=on_pairs(spread["shannon"][0]),
        shannon_stderr=on_pairs(spread["shannon"][1]),
        g=g,
        g_stderr=on_query_key("g", 1),
        bound=torch.where(has_parent.unsqueeze(1), on_pairs(spread["bound"][0]).tril(), 0.0),
        predicted_gradient=predicted_gradient(g, prior.vocab_size, beta0=beta0),
    )


def predicted_gradient(
    g: Float[Tensor, "pos pos"], vocab_size: int, *, beta0: float = 1.0
) -> Float[Tensor, "query key"]:
    """Leading-order `-dL/dA1` at A1 = 0 and A2 = beta0 I.

    Row i (counted from 1) is `beta0 / (S T i) (g_ij - mean_{k<=i} g_ik)` for keys j <= i, else 0.
    The row of the query, which is not a position of the graph, is set to 0; to this order, only
    its own key would be different from 0.
    """
    n = g.shape[0]
    length = n + 1
    gradient = g.new_zeros(length, length)
    size = torch.arange(1, n + 1, dtype=g.dtype, device=g.device).unsqueeze(1)
    centred = (g - g.sum(1, keepdim=True) / size).tril()
    gradient[:n, :n] = beta0 / (vocab_size * length * size) * centred
    return gradient


def _visited(transition: Float[Tensor, "1 all all"]) -> Float[Tensor, "1 vocab vocab"]:
    """A fixed matrix without its transient states, for which the information is 0/0."""
    visited = (
        stationary_distribution(transition)[0] > 1e-20
    )  # at most PROBABILITY_FLOOR: never visited
    return transition[:, visited][:, :, visited]


class _Powers:
    """The deflated powers `C_m` of some matrices, and quantities at pairs of distances (m, n).

    Attributes:
        seconds: estimate of the time for one of the matrices on a busy core.
    """

    def __init__(
        self,
        transition: Float[Tensor, "prior vocab vocab"],
        pairs: Int[np.ndarray, "kinds 2"],
    ) -> None:
        """Compute them.

        Args:
            transition: the matrices.
            pairs: distances, m <= n.
        """
        self._mu = stationary_distribution(transition)
        root = self._mu.sqrt()
        eye = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
        top = root.unsqueeze(2) * root.unsqueeze(1)
        deflated = root.unsqueeze(2) * transition / root.unsqueeze(1) - top
        powers = [eye - top]
        n_powers = int(pairs.max()) + 2
        while len(powers) < n_powers:
            powers.append(powers[-1] @ deflated)
            if float(powers[-1].abs().amax()) < _VANISHED:
                powers[-1] = torch.zeros_like(top)
                break
        self._c = torch.stack(powers, dim=1)  # prior power vocab vocab
        last = len(powers) - 1
        near, far = (torch.from_numpy(column).to(root.device) for column in pairs.T)
        # Distances from the last one on share its matrix: it is 0, if there are any.
        self._near, self._far = near.clamp(max=last), far.clamp(max=last)
        self._rows, self._near_row = self._near.unique(return_inverse=True)
        self._columns, self._far_column = self._far.unique(return_inverse=True)
        self._kept = far < n_powers if len(powers) == n_powers else far < last
        n_kept, n_rows, n_columns = int(self._kept.sum()), len(self._rows), len(self._columns)
        size = root.shape[1]
        products = (len(powers) + n_rows + n_columns + n_kept) * size**3
        products += 3 * n_rows * n_columns * size**2
        self.seconds = products / PRODUCTS_PER_SECOND + (
            n_kept * size**2 / TABLE_ENTRIES_PER_SECOND
        )

    def quantities(self) -> dict[str, Float[Tensor, "prior kinds"]]:
        """Every quantity at every pair of distances, for each matrix."""
        c, last = self._c, self._c.shape[1] - 1
        rows, columns = c[:, self._rows], c[:, self._columns]
        chi2 = self._products(rows @ rows.mT, columns @ columns.mT)
        after_rows = c[:, (self._rows + 1).clamp(max=last)]
        after_columns = c[:, (self._columns + 1).clamp(max=last)]
        direct = c[:, min(1, last)].square().sum((1, 2))  # of a position and its parent
        return {
            "chi2": chi2,
            "g_key_nearer": self._products(after_rows, columns),
            "g_key_farther": self._products(rows, after_columns),
            "bound": (chi2 * direct.unsqueeze(1)).clamp(min=0).sqrt(),
            "shannon": self._shannon(),
        }

    def _products(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Inner products of the matrices of each pair, one of `rows` with one of `columns`."""
        return (rows.flatten(2) @ columns.flatten(2).mT)[:, self._near_row, self._far_column]

    def _shannon(self) -> Tensor:
        """`sum P log(P / (P_x P_y))` with `P / sqrt(P_x P_y) = u u^T + C_m^T C_n`."""
        near, far = self._near[self._kept], self._far[self._kept]
        n_priors, size = self._mu.shape
        root = self._mu.sqrt().unsqueeze(1)
        information = self._mu.new_zeros(n_priors, len(self._kept))
        chunk = max(1, _MAX_ELEMENTS // (n_priors * size**2))
        parts = []
        for start in range(0, len(near), chunk):
            part = slice(start, start + chunk)
            deviation = self._c[:, near[part]].mT @ self._c[:, far[part]]
            independent = root.unsqueeze(3) * root.unsqueeze(2)
            # ratio = P / (P_x P_y); deviation / independent is 0/0 only where P itself is 0.
            excess = deviation / independent.clamp(min=1e-300)
            joint = independent * independent * (1 + excess).clamp(min=0)
            parts.append((joint * excess.clamp(min=-1).log1p()).nan_to_num(0.0).sum((2, 3)))
        information[:, self._kept] = torch.cat(parts, dim=1)
        return information
