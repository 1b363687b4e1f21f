"""Families of transition matrices that differ from a model's training prior.

Every family is a plain function `(n, vocab_size, generator) -> [n, vocab, vocab]` that draws on the
generator's device; `MatrixFamily` adds a name and a description. A model that learned the algorithm
instead of the prior infers all of these matrices from the context.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.tasks.dirichlet import sample_dirichlet, sample_log_gamma
from mechcausal.tasks.priors import DirichletPrior, FixedTransition, PriorError

MatrixSampler = Callable[[int, int, torch.Generator], Tensor]
Base = Literal["dirichlet", "permutation"]


def dirichlet_matrices(
    n: int, vocab_size: int, generator: torch.Generator, *, alpha: float
) -> Float[Tensor, "n vocab vocab"]:
    """Rows are independent Dirichlet(alpha, ..., alpha) draws.

    Raises:
        PriorError: alpha is not positive and finite, or fewer than two tokens.
    """
    return DirichletPrior.symmetric(alpha, vocab_size).sample(n, generator=generator)


def permutation_matrices(
    n: int, vocab_size: int, generator: torch.Generator, *, noise: float = 0.01
) -> Float[Tensor, "n vocab vocab"]:
    """`(1 - noise) P + noise/S`, P a uniformly random permutation matrix.

    `mu` is uniform. Without noise, P may have several cycles, so that `mu` is not unique.

    Raises:
        PriorError: the noise is not in (0, 1], or fewer than two tokens.

    Example:
        >>> permutation_matrices(1, 2, torch.Generator().manual_seed(0), noise=0.2)
        tensor([[[0.9000, 0.1000],
                 [0.1000, 0.9000]]])
    """
    _check("noise", noise, vocab_size)
    states = _shuffled_states(n, vocab_size, generator)
    permutation = torch.nn.functional.one_hot(states, vocab_size).float()
    return (1 - noise) * permutation + noise / vocab_size


def near_deterministic_matrices(
    n: int, vocab_size: int, generator: torch.Generator, *, delta: float = 0.05
) -> Float[Tensor, "n vocab vocab"]:
    """Every row has 1 - delta on one random state and delta/(S - 1) on each of the others.

    Several rows may favour the same state, so `mu` is far from uniform.

    Raises:
        PriorError: delta is not in (0, 1], or fewer than two tokens.
    """
    _check("delta", delta, vocab_size)
    shape, device = (n, vocab_size, vocab_size), generator.device
    matrix = torch.full(shape, delta / (vocab_size - 1), device=device)
    favourite = torch.randint(vocab_size, (*shape[:2], 1), generator=generator, device=device)
    return matrix.scatter_(2, favourite, 1 - delta)


def two_block_matrices(
    n: int,
    vocab_size: int,
    generator: torch.Generator,
    *,
    crossing: float = 0.02,
    alpha: float = 0.1,
) -> Float[Tensor, "n vocab vocab"]:
    """Two random halves of the states; each step changes the half with probability `crossing`.

    Rows are Dirichlet(alpha) within a half and uniform across. The halves form a two-state chain
    with eigenvalue `1 - 2 crossing`: a chain of far fewer than 1/crossing tokens usually stays in
    one half, and the query is often in the other.

    Raises:
        PriorError: the crossing probability is not in (0, 1], or fewer than two tokens.
    """
    _check("crossing", crossing, vocab_size)
    first_half = _shuffled_states(n, vocab_size, generator) < (vocab_size + 1) // 2
    same = first_half.unsqueeze(2) == first_half.unsqueeze(1)
    concentration = torch.tensor(alpha, device=generator.device)
    log_gamma = sample_log_gamma(concentration, same.shape, generator=generator)
    within = log_gamma.masked_fill(~same, -torch.inf).softmax(-1)
    across = (~same).float()
    return (1 - crossing) * within + crossing * across / across.sum(-1, keepdim=True)


def lazy_matrices(
    n: int, vocab_size: int, generator: torch.Generator, *, delta: float = 0.1, alpha: float = 0.1
) -> Float[Tensor, "n vocab vocab"]:
    """`(1 - delta) I + delta D`, with the rows of D Dirichlet(alpha): tokens usually repeat.

    Every eigenvalue has a real part of at least 1 - 2 delta.

    Raises:
        PriorError: delta is not in (0, 1], or fewer than two tokens.
    """
    _check("delta", delta, vocab_size)
    eye = torch.eye(vocab_size, device=generator.device)
    return (1 - delta) * eye + delta * dirichlet_matrices(n, vocab_size, generator, alpha=alpha)


def uniform_matrices(
    n: int, vocab_size: int, generator: torch.Generator
) -> Float[Tensor, "n vocab vocab"]:
    """Every entry is 1/S: tokens are independent and uniform."""
    return torch.full((n, vocab_size, vocab_size), 1 / vocab_size, device=generator.device)


def fixed_matrices(
    n: int, vocab_size: int, generator: torch.Generator, *, transition: FixedTransition
) -> Float[Tensor, "n vocab vocab"]:
    """The same matrix n times.

    Raises:
        PriorError: the matrix has a different number of tokens.
    """
    if transition.vocab_size != vocab_size:
        raise PriorError(
            f"the fixed matrix is for {transition.vocab_size} tokens, the model for {vocab_size}"
        )
    return transition.sample(n, generator=generator)


def bounded_matrices(
    n: int,
    vocab_size: int,
    generator: torch.Generator,
    *,
    gamma: float,
    base: Base = "dirichlet",
    alpha: float = 0.1,
) -> Float[Tensor, "n vocab vocab"]:
    """`(1 - gamma) B + gamma/S`: every entry is at least gamma/S, as the theorem requires.

    Args:
        n: number of matrices.
        vocab_size: S.
        generator: source of randomness.
        gamma: share of the uniform distribution in every row.
        base: whether B is a random permutation matrix or has Dirichlet(alpha) rows.
        alpha: concentration of Dirichlet rows.

    Raises:
        PriorError: gamma is not in (0, 1], or fewer than two tokens.
    """
    _check("gamma", gamma, vocab_size)
    if base == "permutation":
        return permutation_matrices(n, vocab_size, generator, noise=gamma)
    rows = sample_dirichlet(
        torch.full((vocab_size,), alpha, device=generator.device),
        (n, vocab_size, vocab_size),
        generator=generator,
    )
    return (1 - gamma) * rows + gamma / vocab_size


@dataclass(frozen=True)
class MatrixFamily:
    """A family of transition matrices with a name.

    Attributes:
        name: short, for tables and figures.
        description: one line.
        sample: `(n, vocab_size, generator) -> [n, vocab, vocab]`.
        alpha: the concentration of a symmetric Dirichlet prior; None for other families.
    """

    name: str
    description: str
    sample: MatrixSampler
    alpha: float | None = None


def dirichlet_family(alpha: float) -> MatrixFamily:
    """Rows are Dirichlet(alpha); the Bayes predictor of the family is known."""
    description = f"rows Dirichlet({alpha:g})"
    sampler = partial(dirichlet_matrices, alpha=alpha)
    return MatrixFamily(f"dirichlet_{alpha:g}", description, sampler, alpha)


def bounded_family(gamma: float, *, base: Base = "dirichlet") -> MatrixFamily:
    """Every entry is at least gamma/S."""
    description = f"{1 - gamma:g} {base} + {gamma:g} uniform: entries at least {gamma:g}/S"
    sampler = partial(bounded_matrices, gamma=gamma, base=base)
    return MatrixFamily(f"bounded_{gamma:g}", description, sampler)


def fixed_family(
    name: str, matrix: Float[Tensor, "vocab vocab"] | Sequence[Sequence[float]]
) -> MatrixFamily:
    """A single matrix with a given name.

    Raises:
        PriorError: not a transition matrix.

    Example:
        >>> fixed_family("coin", [[0.5, 0.5], [0.5, 0.5]]).sample(3, 2, torch.Generator()).shape
        torch.Size([3, 2, 2])
    """
    transition = FixedTransition.from_matrix(matrix)
    return MatrixFamily(name, "one fixed matrix", partial(fixed_matrices, transition=transition))


STANDARD_FAMILIES = (
    *(dirichlet_family(alpha) for alpha in (0.03, 0.1, 0.3, 1.0, 3.0)),
    MatrixFamily(
        "permutation", "0.99 random permutation + 0.01 uniform noise", permutation_matrices
    ),
    MatrixFamily(
        "near_deterministic", "0.95 on one random state of each row", near_deterministic_matrices
    ),
    MatrixFamily("two_blocks", "two halves of the states, crossed w.p. 0.02", two_block_matrices),
    MatrixFamily("lazy", "0.9 identity + 0.1 Dirichlet(0.1)", lazy_matrices),
    MatrixFamily("uniform_rows", "every entry 1/S: nothing to learn", uniform_matrices),
)
"""The default families of `evaluate_ood`."""


def _shuffled_states(n: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """A random permutation of the states for each matrix."""
    return torch.rand(n, vocab_size, generator=generator, device=generator.device).argsort(1)


def _check(name: str, share: float, vocab_size: int) -> None:
    if vocab_size < 2:
        raise PriorError(f"vocab_size is {vocab_size}: at least 2 tokens needed")
    if not 0 < share <= 1:
        raise PriorError(f"{name} is {share}: allowed are numbers above 0, up to 1")
