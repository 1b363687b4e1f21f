"""What a task and a prior are: any object with these members, also one of your own."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.tasks.base import Batch

BAYES = "bayes"
"""Name of the best possible predictor of a task."""


@runtime_checkable
class Task(Protocol):
    """What a model learns: anything that draws batches of sequences with labels.

    `mechcausal.fit`, `observe` and `TaskExperiment` take any object with these three members; it
    need not derive from this class. Its labels may be for the token after the last one, or for
    every position, see `Batch`.
    """

    @property
    def vocab_size(self) -> int:
        """Number of tokens S; a token that only masks others counts, with probability 0."""

    @property
    def sequence_length(self) -> int:
        """Most tokens of a sequence, T."""

    def sample(self, n_sequences: int, *, generator: torch.Generator) -> Batch:
        """Fresh sequences on the generator's device, from the generator alone."""


@runtime_checkable
class PredictableTask(Task, Protocol):
    """A task with predictors that a model is compared with."""

    def predictions(self, batch: Batch) -> Mapping[str, Tensor]:
        """What each predictor says of a batch, shaped like its target, the best one last.

        "bayes" is the best possible: its loss becomes `loss/bayes`, and `loss/gap` is the model's
        distance to it. Each of the others gives `strategy/kl_<name>`.
        """


@runtime_checkable
class Prior(Protocol):
    """What the transition matrix of a sequence is drawn from; any object with these two members.

    One of your own has to be hashable, such as a frozen dataclass.
    """

    @property
    def vocab_size(self) -> int:
        """Number of tokens S."""

    def sample(
        self, n_samples: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "batch vocab vocab"]:
        """Matrices on the generator's device, of positive rows that sum to 1."""


@runtime_checkable
class PriorWithPosterior(Prior, Protocol):
    """A prior that knows what a sequence says of its matrix.

    With it a run records the Bayes loss and how close the model is to the bigram strategy.
    """

    def posterior_mean(
        self, transitions: Float[Tensor, "batch vocab vocab"], roots: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab vocab"]:
        """The mean of the matrix given a sequence.

        Args:
            transitions: how often each transition occurs along the edges of the graph.
            roots: how often each token occurs at a root; roots are drawn from `mu`.
        """
