"""A prior of finitely many transition matrices: a model may learn them by heart.

Source: Park, Lubana, Pres and Tanaka 2024 (arXiv 2412.01003), whose models pass between retrieving
one of the training matrices and inferring a new one.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.tasks.dirichlet import PROBABILITY_FLOOR
from mechcausal.tasks.priors import DirichletPrior, PriorError, stationary_distribution

MAX_ENTRIES = 20_000_000


@dataclass(frozen=True)
class FinitePrior:
    """N transition matrices, drawn once; every sequence takes one of them.

    Attributes:
        base: what the matrices are drawn from.
        n_matrices: N.
        seed: of that draw, on the CPU.

    Raises:
        PriorError: no matrix, or more entries than `MAX_ENTRIES`.

    Example:
        >>> prior = FinitePrior(DirichletPrior.symmetric(1.0, vocab_size=3), 4, seed=0)
        >>> drawn = prior.sample(100, generator=torch.Generator().manual_seed(0))
        >>> len(drawn.unique(dim=0))
        4
    """

    base: DirichletPrior
    n_matrices: int
    seed: int = 0

    def __post_init__(self) -> None:
        most = MAX_ENTRIES // self.base.vocab_size**2
        if not 1 <= self.n_matrices <= most:
            raise PriorError(
                f"a finite prior of {self.n_matrices:,} matrices; allowed with "
                f"{self.base.vocab_size} tokens: 1 to {most:,}"
            )

    @property
    def vocab_size(self) -> int:
        """Number of tokens S."""
        return self.base.vocab_size

    @cached_property
    def matrices(self) -> Float[Tensor, "matrix vocab vocab"]:
        """The matrices, float64 on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        return self.base.sample(self.n_matrices, generator=generator, dtype=torch.float64)

    def sample(
        self, n_samples: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "batch vocab vocab"]:
        """Take matrices at random, on the generator's device."""
        device = generator.device
        chosen = torch.randint(self.n_matrices, (n_samples,), generator=generator, device=device)
        return self.matrices.to(device, dtype)[chosen]

    def posterior(
        self, transitions: Float[Tensor, "batch vocab vocab"], roots: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch matrix"]:
        """The probability of each matrix given a sequence.

        `P(n | sequence) ∝ Π_ab π_n(b | a)^N(a, b) Π_a μ_n(a)^R(a)`, where N counts transitions
        along the edges and R the roots' tokens.
        """
        pi = self.matrices.to(transitions.device).clamp(min=PROBABILITY_FLOOR)
        mu = stationary_distribution(pi).clamp(min=PROBABILITY_FLOOR)
        evidence = transitions.double().flatten(1) @ pi.log().flatten(1).T
        return (evidence + roots.double() @ mu.log().T).softmax(-1)

    def posterior_mean(
        self, transitions: Float[Tensor, "batch vocab vocab"], roots: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab vocab"]:
        """The Bayes predictor's matrix, `Σ_n P(n | sequence) π_n`."""
        weights = self.posterior(transitions, roots)
        pi = self.matrices.to(transitions.device)
        return torch.einsum("bn,nij->bij", weights, pi).to(transitions.dtype)
