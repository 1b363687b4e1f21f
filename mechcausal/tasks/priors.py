"""Priors over transition matrices `pi`, and the stationary distribution `mu` of each matrix."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.tasks.dirichlet import PROBABILITY_FLOOR, sample_dirichlet
from mechcausal.tasks.protocol import Prior

# Entries of the matrices that are eliminated together.
_CACHED_ENTRIES = 150_000
_CUDA_ENTRIES = 20_000_000

# Totals of Dirichlet parameters outside these cannot be told from them by any draw: rows have one
# token, or are the mean to all digits. Within, float32 holds every step of the arithmetic.
_SMALLEST_TOTAL, _LARGEST_TOTAL = 1e-12, 1e30
_SMALLEST_CONCENTRATION = 1e-36


class PriorError(ValueError):
    """A prior or matrix that makes no sense; the message is one line for the user."""


def stationary_distribution(
    transition: Float[Tensor, "batch vocab vocab"], *, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "batch vocab"]:
    """The distribution `mu` with `mu pi = mu`, by Grassmann-Taksar-Heyman elimination.

    The elimination subtracts nothing, so it stays accurate to rounding where solving the linear
    system fails (sparse rows, nearly reducible chains). A reducible chain gets the stationary
    distribution of the chain with `PROBABILITY_FLOOR` added to every entry.

    Args:
        transition: rows sum to 1.
        dtype: to compute in. float32 keeps six digits of entries that are not below the floor.

    Returns:
        Of that dtype, rows sum to 1.

    Example:
        >>> pi = torch.tensor([[[0.9, 0.1], [0.3, 0.7]]])
        >>> [round(p, 6) for p in stationary_distribution(pi)[0].tolist()]
        [0.75, 0.25]
    """
    parts = [_stationary(part, dtype) for part in transition.split(_at_once(transition))]
    return torch.cat(parts) if parts else transition.new_zeros(transition.shape[:2], dtype=dtype)


def _at_once(transition: Tensor) -> int:
    """How many matrices are eliminated together: as many as a processor's cache holds."""
    most = _CUDA_ENTRIES if transition.is_cuda else _CACHED_ENTRIES
    return max(128, most // transition.shape[-1] ** 2)


def _stationary(
    transition: Float[Tensor, "batch vocab vocab"], dtype: torch.dtype
) -> Float[Tensor, "batch vocab"]:
    vocab = transition.shape[-1]
    # The batch goes last: every operation below then runs over contiguous memory.
    reduced = transition.permute(1, 2, 0).to(dtype, copy=True).contiguous()
    reduced.clamp_(min=PROBABILITY_FLOOR)
    for state in range(vocab - 1, 0, -1):
        reduced[:state, state] /= reduced[state, :state].sum(0)
        reduced[:state, :state].addcmul_(
            reduced[:state, state].unsqueeze(1), reduced[state, :state].unsqueeze(0)
        )
    mu = torch.ones(vocab, transition.shape[0], dtype=dtype, device=transition.device)
    for state in range(1, vocab):
        mu[state] = (mu[:state] * reduced[:state, state]).sum(0)
        # A near-absorbing state outweighs the others by up to 1/floor per level: rescale.
        mu[: state + 1] /= mu[: state + 1].amax(0)
    return (mu / mu.sum(0)).T.contiguous()


def stationary_with_first_row(
    transition: Float[Tensor, "batch vocab vocab"], first_rows: Float[Tensor, "batch variant vocab"]
) -> Float[Tensor, "batch variant vocab"]:
    """Stationary distributions of each matrix with its row 0 replaced by each of several rows.

    As `stationary_distribution`, whose elimination leaves state 0 to the end: all variants share
    the work on the other states.
    """
    size = _at_once(transition)
    pairs = zip(transition.split(size), first_rows.split(size), strict=True)
    return torch.cat([_stationary_with_first_row(*pair) for pair in pairs])


def _stationary_with_first_row(
    transition: Float[Tensor, "batch vocab vocab"], first_rows: Float[Tensor, "batch variant vocab"]
) -> Float[Tensor, "batch variant vocab"]:
    vocab = transition.shape[-1]
    reduced = transition.permute(1, 2, 0).to(torch.float64, copy=True).contiguous()
    variants = first_rows.permute(1, 2, 0).to(torch.float64, copy=True).contiguous()
    reduced.clamp_(min=PROBABILITY_FLOOR)
    variants.clamp_(min=PROBABILITY_FLOOR)
    for state in range(vocab - 1, 0, -1):
        leaving = reduced[state, :state]
        for rows in (reduced[1:state], variants):
            rows[:, state] /= leaving.sum(0)
            rows[:, :state].addcmul_(rows[:, state].unsqueeze(1), leaving.unsqueeze(0))
    mu = torch.ones_like(variants)
    for state in range(1, vocab):
        inflow = mu[:, 0] * variants[:, state]
        mu[:, state] = inflow + (mu[:, 1:state] * reduced[1:state, state]).sum(1)
        mu[:, : state + 1] /= mu[:, : state + 1].amax(1, keepdim=True)
    return (mu / mu.sum(1, keepdim=True)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class DirichletPrior:
    """Transition matrices whose rows are independent Dirichlet(concentration) draws.

    Attributes:
        concentration: one positive number for each token: `(alpha,) * S` is the paper's prior.

    Raises:
        PriorError: fewer than two tokens, or a concentration that is not positive and finite.

    Example:
        >>> prior = DirichletPrior.symmetric(0.1, vocab_size=3)
        >>> prior.sample(5, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([5, 3, 3])
    """

    concentration: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.concentration) < 2:
            raise PriorError(f"vocab_size is {len(self.concentration)}: at least 2 tokens needed")
        for alpha in self.concentration:
            if not (math.isfinite(alpha) and alpha > 0):
                raise PriorError(f"alpha is {alpha}: every concentration must be finite and > 0")

    @classmethod
    def symmetric(cls, alpha: float, vocab_size: int) -> "DirichletPrior":
        """Dirichlet(alpha, ..., alpha) over `vocab_size` tokens."""
        return cls((float(alpha),) * vocab_size)

    @property
    def vocab_size(self) -> int:
        """Number of tokens S."""
        return len(self.concentration)

    @property
    def representable(self) -> tuple[float, ...]:
        """The concentration with a total that float32 can compute with, for the same draws.

        Example:
            >>> DirichletPrior((1e-40, 3e-40)).representable
            (2.5e-13, 7.5e-13)
        """
        largest = max(self.concentration)
        shares = [alpha / largest for alpha in self.concentration]
        total = largest * math.fsum(shares)  # may be infinite
        if _SMALLEST_TOTAL <= total <= _LARGEST_TOTAL:
            scaled = self.concentration
        else:
            total = min(max(total, _SMALLEST_TOTAL), _LARGEST_TOTAL)
            scaled = tuple(total * (share / math.fsum(shares)) for share in shares)
        return tuple(max(alpha, _SMALLEST_CONCENTRATION) for alpha in scaled)

    def sample(
        self, n_samples: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "batch vocab vocab"]:
        """Draw transition matrices on the generator's device."""
        return sample_transitions([self], n_samples, generators=[generator], dtype=dtype)[0]

    def posterior_mean(
        self, transitions: Float[Tensor, "batch vocab vocab"], roots: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab vocab"]:
        """The mean of the matrix given the transitions; what the roots say has no closed form."""
        posterior = self.posterior_concentration(transitions)
        return posterior / posterior.sum(-1, keepdim=True)

    def posterior_concentration(
        self, counts: Float[Tensor, "batch vocab vocab"]
    ) -> Float[Tensor, "batch vocab vocab"]:
        """Dirichlet parameters of every row after the transitions `counts` were seen."""
        return counts + torch.tensor(self.representable, dtype=counts.dtype, device=counts.device)


@dataclass(frozen=True)
class FixedTransition:
    """One transition matrix in place of a prior: for evaluation away from the training prior.

    Attributes:
        rows: the matrix, every row summing to 1.

    Raises:
        PriorError: not square, smaller than 2 x 2, negative, or rows that do not sum to 1.
    """

    rows: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        size = len(self.rows)
        if size < 2 or any(len(row) != size for row in self.rows):
            lengths = sorted({len(row) for row in self.rows})
            raise PriorError(
                f"a transition matrix is square, at least 2 x 2: found {size} rows of {lengths}"
            )
        for number, row in enumerate(self.rows):
            total = math.fsum(row)
            if not all(p >= 0 for p in row) or not abs(total - 1) <= 1e-6:
                raise PriorError(
                    f"row {number} of the transition matrix is not a distribution: "
                    f"sum {total:g}, smallest entry {min(row):g}"
                )

    @classmethod
    def from_matrix(
        cls, matrix: Float[Tensor, "vocab vocab"] | Sequence[Sequence[float]]
    ) -> "FixedTransition":
        """From a tensor or nested sequence."""
        rows = matrix.tolist() if isinstance(matrix, Tensor) else matrix
        return cls(tuple(tuple(float(p) for p in row) for row in rows))

    @property
    def vocab_size(self) -> int:
        """Number of tokens S."""
        return len(self.rows)

    def sample(
        self, n_samples: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "batch vocab vocab"]:
        """The same matrix `n_samples` times, on the generator's device."""
        return sample_transitions([self], n_samples, generators=[generator], dtype=dtype)[0]

    def posterior_mean(
        self, transitions: Float[Tensor, "batch vocab vocab"], roots: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab vocab"]:
        """The matrix, whatever the sequence."""
        matrix = torch.tensor(self.rows, dtype=transitions.dtype, device=transitions.device)
        return matrix.expand_as(transitions)


def sample_transitions(
    priors: Sequence[Prior],
    n_samples: int,
    *,
    generators: Sequence[torch.Generator],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "run batch vocab vocab"]:
    """Draw transition matrices from several priors of one kind and size.

    Args:
        priors: of each run.
        n_samples: matrices for each run.
        generators: of each run, on one device; what a run gets depends on its own alone.
        dtype: of the draws.
    """
    device = generators[0].device
    fixed = [prior.rows for prior in priors if isinstance(prior, FixedTransition)]
    if fixed:
        matrices = torch.tensor(fixed, dtype=dtype, device=device)
        return matrices.unsqueeze(1).expand(-1, n_samples, -1, -1)
    rows = [prior.representable for prior in priors if isinstance(prior, DirichletPrior)]
    if len(rows) < len(priors):
        pairs = zip(priors, generators, strict=True)
        return torch.stack([p.sample(n_samples, generator=g, dtype=dtype) for p, g in pairs])
    alpha = torch.tensor(rows, dtype=dtype, device=device)
    runs, vocab = alpha.shape
    shape = (runs, n_samples, vocab, vocab)
    return sample_dirichlet(alpha.view(runs, 1, 1, vocab), shape, generator=generators)
