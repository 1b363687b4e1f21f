"""Priors over transition matrices `pi`, and the stationary distribution `mu` of each matrix."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Dirichlet rows of a tiny concentration underflow to exact zeros, which would make chains
# reducible. Probabilities are kept above this floor: far below anything that can be sampled, and
# far enough above the smallest float32 for products of a few of them.
PROBABILITY_FLOOR = 1e-30
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


def sample_log_gamma(
    concentration: Float[Tensor, "*any"],
    shape: Sequence[int],
    *,
    generator: torch.Generator | Sequence[torch.Generator],
) -> Float[Tensor, "*shape"]:
    """Logarithms of independent Gamma(concentration, 1) draws, safe for any concentration > 0.

    Marsaglia and Tsang (2000), vectorised; below 1 through Gamma(a) = Gamma(a + 1) U^(1/a), whose
    logarithm cannot underflow. (torch's own gamma sampler takes twice as long, on one thread, and
    returns 0 for small concentrations.)

    Args:
        concentration: broadcast to `shape`, on the generators' device.
        shape: of the draws.
        generator: source of randomness; of several, each draws its equal share along the first
            axis, and nothing that it draws depends on the others.
    """
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    share = math.prod(shape) // len(generators)
    dtype = concentration.dtype
    normal, uniform = (
        draw_for_each(generators, draw, [share] * len(generators), dtype=dtype).view(*shape)
        for draw in (torch.randn, torch.rand)
    )
    log_draw, accepted = _propose_log_gamma(concentration, normal, uniform)
    flat = log_draw.view(-1)
    rejected = accepted.logical_not_().view(-1).nonzero().squeeze(1)  # one in twenty
    concentration = _entries(concentration, shape, rejected).view(-1, 1)
    n_tries = 1
    while len(rejected):
        counts = [len(rejected)]
        if len(generators) > 1:
            counts = (rejected // share).bincount(minlength=len(generators)).tolist()
        normal, uniform = (
            draw_for_each(generators, draw, [n_tries * n for n in counts], dtype=dtype)
            for draw in (torch.randn, torch.rand)
        )
        proposals, accepted = _propose_log_gamma(
            concentration, normal.view(-1, n_tries), uniform.view(-1, n_tries)
        )
        is_accepted, first = accepted.max(1)
        flat[rejected] = proposals.gather(1, first.unsqueeze(1)).squeeze(1)
        rejected, concentration = rejected[~is_accepted], concentration[~is_accepted]
        n_tries = _RETRIES
    return log_draw


# Proposals at a time for the few draws rejected twice: nearly always one of them will do.
_RETRIES = 4


def _entries(values: Tensor, shape: Sequence[int], index: Tensor) -> Tensor:
    """Entries of `values` broadcast to a shape, by their numbers there."""
    values = values.contiguous()
    offset, size = torch.zeros_like(index), 1
    for length, stride in zip(shape[::-1], values.expand(tuple(shape)).stride()[::-1], strict=True):
        if stride:
            offset += (index // size if size > 1 else index) % length * stride
        size *= length
    return values.view(-1)[offset]


def draw_for_each(
    generators: Sequence[torch.Generator],
    draw: Callable[..., Tensor],
    counts: Sequence[int],
    *,
    dtype: torch.dtype,
) -> Float[Tensor, "all"]:
    """Draws of each generator one after another, as many as each is to give.

    Args:
        generators: on one device.
        draw: torch.rand, torch.randn.
        counts: of each generator.
        dtype: of the draws.
    """
    drawn = torch.empty(sum(counts), dtype=dtype, device=generators[0].device)
    for part, count, generator in zip(drawn.split(list(counts)), counts, generators, strict=True):
        if count:
            draw(count, generator=generator, out=part)
    return drawn


def _propose_log_gamma(
    concentration: Float[Tensor, "*any"],
    normal: Float[Tensor, "*shape"],
    uniform: Float[Tensor, "*shape"],
) -> tuple[Float[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """Candidates for log Gamma(concentration), and which of them are accepted.

    Args:
        concentration: broadcast to the draws.
        normal: standard normal draws, overwritten.
        uniform: draws from [0, 1), overwritten.
    """
    is_small = concentration < 1
    scale = torch.where(is_small, concentration + 1, concentration) - 1 / 3
    root = (normal * (9 * scale).rsqrt()).add_(1)
    cube = root.square().mul_(root)
    log_draw = root.log_().mul_(3)  # NaN where the root is negative: no comparison accepts that
    log_chance = normal.square_().mul_(0.5).add_((log_draw - cube).add_(1).mul_(scale))
    log_uniform = uniform.neg_().add_(1).log_()  # of (0, 1]: finite
    accepted = log_uniform < log_chance
    log_draw.add_(scale.log())
    if bool(is_small.any()):
        # Where U was accepted against a chance c, U / min(c, 1) is uniform and says nothing of the
        # draw: it serves as the U of Gamma(a + 1) U^(1/a).
        inverse = torch.where(is_small, 1 / concentration, 0.0)
        inverse.clamp_(
            max=torch.finfo(inverse.dtype).max / 128
        )  # no log(U) of floats is below -128
        log_draw.add_(log_uniform.sub_(log_chance.clamp_(max=0)).mul_(inverse))
    return log_draw, accepted


def normalised_exponentials(
    log_weights: Float[Tensor, "*any vocab"],
) -> Float[Tensor, "*any vocab"]:
    """The softmax along the last axis, no entry below `PROBABILITY_FLOOR`; overwrites its argument.

    torch's own takes many times as long for axes of a few entries.
    """
    weights = log_weights.sub_(log_weights.amax(-1, keepdim=True)).exp_()
    return weights.div_(weights.sum(-1, keepdim=True)).clamp_(min=PROBABILITY_FLOOR)


def sample_dirichlet(
    concentration: Float[Tensor, "*any vocab"],
    shape: Sequence[int],
    *,
    generator: torch.Generator | Sequence[torch.Generator],
) -> Float[Tensor, "*shape vocab"]:
    """Independent Dirichlet draws along the last axis, no entry below `PROBABILITY_FLOOR`.

    Args:
        concentration: broadcast to `shape`, on the generators' device.
        shape: of the draws, the last axis the tokens.
        generator: source of randomness, or several, see `sample_log_gamma`.
    """
    return normalised_exponentials(sample_log_gamma(concentration, shape, generator=generator))


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
