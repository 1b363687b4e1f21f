"""Priors over transition matrices `pi`, and the stationary distribution `mu` of each matrix."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Dirichlet rows of a tiny concentration underflow to exact zeros, which would make chains
# reducible. Probabilities are kept above this floor: far below anything that can be sampled, and
# far enough above the smallest float32 for products of a few of them.
PROBABILITY_FLOOR = 1e-30

# Totals of Dirichlet parameters outside these cannot be told from them by any draw: rows have one
# token, or are the mean to all digits. Within, float32 holds every step of the arithmetic.
_SMALLEST_TOTAL, _LARGEST_TOTAL = 1e-12, 1e30
_SMALLEST_CONCENTRATION = 1e-36


class PriorError(ValueError):
    """A prior or matrix that makes no sense; the message is one line for the user."""


def stationary_distribution(
    transition: Float[Tensor, "batch vocab vocab"],
) -> Float[Tensor, "batch vocab"]:
    """The distribution `mu` with `mu pi = mu`, by Grassmann-Taksar-Heyman elimination in float64.

    The elimination subtracts nothing, so it stays accurate to rounding where solving the linear
    system fails (sparse rows, nearly reducible chains). A reducible chain gets the stationary
    distribution of the chain with `PROBABILITY_FLOOR` added to every entry.

    Args:
        transition: rows sum to 1.

    Returns:
        float64, rows sum to 1.

    Example:
        >>> pi = torch.tensor([[[0.9, 0.1], [0.3, 0.7]]])
        >>> [round(p, 6) for p in stationary_distribution(pi)[0].tolist()]
        [0.75, 0.25]
    """
    vocab = transition.shape[-1]
    # The batch goes last: every operation below then runs over contiguous memory.
    reduced = transition.permute(1, 2, 0).to(torch.float64, copy=True).contiguous()
    reduced.clamp_(min=PROBABILITY_FLOOR)
    for state in range(vocab - 1, 0, -1):
        reduced[:state, state] /= reduced[state, :state].sum(0)
        reduced[:state, :state].addcmul_(
            reduced[:state, state].unsqueeze(1), reduced[state, :state].unsqueeze(0)
        )
    mu = torch.ones(vocab, transition.shape[0], dtype=torch.float64, device=transition.device)
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


def sample_log_gamma(
    concentration: Float[Tensor, "*any"], shape: Sequence[int], *, generator: torch.Generator
) -> Float[Tensor, "*shape"]:
    """Logarithms of independent Gamma(concentration, 1) draws, safe for any concentration > 0.

    Marsaglia and Tsang (2000), vectorised; below 1 through Gamma(a) = Gamma(a + 1) U^(1/a), whose
    logarithm cannot underflow. (torch's own gamma sampler has no public generator argument, works
    on one thread, and returns 0 for small concentrations.)

    Args:
        concentration: broadcast to `shape`, on the generator's device.
        shape: of the draws.
        generator: source of randomness.
    """

    def propose(scale: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        options: Any = {"generator": generator, "dtype": scale.dtype, "device": generator.device}
        normal = torch.randn(shape, **options)
        return propose_log_gamma(scale, normal, torch.rand(shape, **options))

    scale = log_gamma_scale(concentration)
    log_draw, accepted = propose(scale, shape)
    rejected = (~accepted).nonzero(as_tuple=True)
    everywhere = scale.expand(shape)
    while len(rejected[0]):  # one proposal in twenty at first
        proposal, accepted = propose(everywhere[rejected], rejected[0].shape)
        log_draw[rejected] = proposal
        rejected = tuple(index[~accepted] for index in rejected)
    if bool((concentration < 1).any()):
        uniform = torch.rand(
            shape, generator=generator, dtype=concentration.dtype, device=generator.device
        )
        log_draw += log_gamma_correction(concentration, uniform)
    return log_draw


def log_gamma_scale(concentration: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """What `propose_log_gamma` needs for a concentration."""
    return torch.where(concentration < 1, concentration + 1, concentration) - 1 / 3


def propose_log_gamma(
    scale: Float[Tensor, "*any"], normal: Float[Tensor, "*shape"], uniform: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """Candidates for log Gamma(scale + 1/3), and which of them are accepted.

    Args:
        scale: broadcast to the draws.
        normal: standard normal draws, overwritten.
        uniform: draws from [0, 1), overwritten.
    """
    root = (normal / (9 * scale).sqrt()).add_(1)
    log_cube = root.log().mul_(3)  # NaN where the root is negative: no comparison accepts that
    bound = root.pow_(3).neg_().add_(log_cube).add_(1).mul_(scale)
    bound += normal.square_().mul_(0.5)
    accepted = _log_of_complement(uniform) < bound
    return log_cube.add_(scale.log()), accepted


def log_gamma_correction(
    concentration: Float[Tensor, "*any"], uniform: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """What takes log Gamma(a + 1) to log Gamma(a): `log(U) / a` for a < 1, else 0; finite.

    Args:
        concentration: a, broadcast to the draws.
        uniform: draws from [0, 1), overwritten.
    """
    inverse = torch.where(concentration < 1, 1 / concentration, 0.0)
    inverse.clamp_(max=torch.finfo(inverse.dtype).max / 128)  # no log(U) of floats is below -128
    return _log_of_complement(uniform).mul_(inverse)


def _log_of_complement(uniform: Tensor) -> Tensor:
    """The logarithm of uniform draws from (0, 1]: finite."""
    return uniform.neg_().add_(1).log_()


def sample_dirichlet(
    concentration: Float[Tensor, "*any vocab"], shape: Sequence[int], *, generator: torch.Generator
) -> Float[Tensor, "*shape vocab"]:
    """Independent Dirichlet draws along the last axis, no entry below `PROBABILITY_FLOOR`.

    Args:
        concentration: broadcast to `shape`, on the generator's device.
        shape: of the draws, the last axis the tokens.
        generator: source of randomness.
    """
    log_gamma = sample_log_gamma(concentration, shape, generator=generator)
    return log_gamma.softmax(-1).clamp_(min=PROBABILITY_FLOOR)


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
        alpha = torch.tensor(self.representable, dtype=dtype, device=generator.device)
        shape = (n_samples, self.vocab_size, self.vocab_size)
        return sample_dirichlet(alpha, shape, generator=generator)

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
        matrix = torch.tensor(self.rows, dtype=dtype, device=generator.device)
        return matrix.expand(n_samples, -1, -1)


Prior = DirichletPrior | FixedTransition
