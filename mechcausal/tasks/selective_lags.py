"""Markov chains whose lag is drawn anew for every sequence, and the mixture that infers it.

Which earlier token is the parent has to be read off the sequence: the task of selective induction
heads. Source: D'Angelo, Croce and Flammarion, ICLR 2025.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.tasks.base import Batch
from mechcausal.tasks.priors import FixedTransition, stationary_distribution
from mechcausal.tasks.sequences import draw_rows


@dataclass(frozen=True)
class LagBatch(Batch):
    """Sequences with the lag of each.

    Attributes:
        lag: the lag of every sequence, in tokens.
    """

    lag: Int[Tensor, "batch"] | None = None


@dataclass(frozen=True)
class SelectiveLagTask:
    """Sequences of one matrix P at a lag k that each sequence draws uniformly from `lags`.

    The first `max(lags)` tokens are drawn from the stationary distribution, every later one from
    `P(. | x[t - k])`. Each position predicts the next token; the label is the true distribution,
    and the positions before the last of the first `max(lags)` tokens are not scored.

    Attributes:
        matrix: P.
        lags: distinct lags, each at least 1.
        length: tokens of a sequence.

    Raises:
        ValueError: lags that are not distinct and positive, or as long as the sequence.

    Example:
        >>> task = SelectiveLagTask(FixedTransition(((0.9, 0.1), (0.2, 0.8))), (1, 2), length=8)
        >>> batch = task.sample(3, generator=torch.Generator().manual_seed(0))
        >>> batch.tokens.shape, batch.scored[0].tolist()
        (torch.Size([3, 8]), [False, True, True, True, True, True, True, True])
    """

    matrix: FixedTransition
    lags: tuple[int, ...]
    length: int

    def __post_init__(self) -> None:
        if not self.lags or min(self.lags) < 1 or len(set(self.lags)) != len(self.lags):
            raise ValueError(f"lags are {list(self.lags)}; allowed: distinct numbers from 1 on")
        if max(self.lags) >= self.length:
            raise ValueError(
                f"the longest lag is {max(self.lags)}; a sequence of {self.length} tokens allows "
                f"at most {self.length - 1}"
            )

    @property
    def vocab_size(self) -> int:
        """Number of tokens S."""
        return self.matrix.vocab_size

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence, T."""
        return self.length

    def sample(self, n_sequences: int, *, generator: torch.Generator) -> LagBatch:
        """Fresh sequences on the generator's device."""
        device, first = generator.device, max(self.lags)
        matrix = self._rows(device).float()
        choices = torch.tensor(self.lags, device=device)
        drawn = torch.randint(len(choices), (n_sequences,), generator=generator, device=device)
        lag = choices[drawn]
        tokens = torch.empty(n_sequences, self.length, dtype=torch.int64, device=device)
        start = self._stationary(device).float().expand(n_sequences * first, -1)
        tokens[:, :first] = draw_rows(start, generator).view(n_sequences, first)
        for position in range(first, self.length):
            parent = tokens.gather(1, (position - lag).unsqueeze(1)).squeeze(1)
            tokens[:, position] = draw_rows(matrix[parent], generator)
        # Position t predicts token t + 1, whose parent is at t + 1 - lag.
        keys = torch.arange(1, self.length + 1, device=device) - lag.unsqueeze(1)
        scored = torch.arange(self.length, device=device) >= first - 1
        return LagBatch(
            tokens,
            matrix[tokens.gather(1, keys.clamp(min=0))],
            scored=scored.expand(n_sequences, -1),
            lag=lag,
        )

    def lag_posterior(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos candidate"]:
        """The probability of each lag of `lags`, given the tokens up to each position.

        `w_k ∝ Π_j P(x_j | x_{j-k})` over the tokens after the first `max(lags)`, which do not tell
        lags apart.
        """
        first = max(self.lags)
        log_rows = self._rows(tokens.device).log()
        evidence = torch.zeros(
            *tokens.shape, len(self.lags), dtype=torch.float64, device=tokens.device
        )
        for number, lag in enumerate(self.lags):
            keys = tokens[:, first - lag : self.length - lag]
            evidence[:, first:, number] = log_rows[keys, tokens[:, first:]]
        return evidence.cumsum(1).softmax(-1)

    def predictions(self, batch: Batch) -> dict[str, Float[Tensor, "batch pos vocab"]]:
        """The strategies "stationary", "equal_lags" (all lags alike) and "bayes", in float64.

        "bayes" averages `P(. | x[t+1-k])` over the posterior of the lag, `lag_posterior`.
        """
        tokens, device = batch.tokens, batch.tokens.device
        matrix = self._rows(device)
        positions = torch.arange(1, self.length + 1, device=device)
        keys = [tokens[:, (positions - lag).clamp(min=0)] for lag in self.lags]
        by_lag = torch.stack([matrix[key] for key in keys], 2)
        weights = self.lag_posterior(tokens)
        stationary = self._stationary(device)
        return {
            "stationary": stationary.expand(*tokens.shape, -1),
            "equal_lags": by_lag.mean(2),
            "bayes": (weights.unsqueeze(-1) * by_lag).sum(2),
        }

    def _rows(self, device: torch.device) -> Float[Tensor, "vocab vocab"]:
        return torch.tensor(self.matrix.rows, dtype=torch.float64, device=device)

    def _stationary(self, device: torch.device) -> Float[Tensor, "vocab"]:
        return stationary_distribution(self._rows(device).unsqueeze(0))[0]
