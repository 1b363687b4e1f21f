"""The interface between the training loop and an experiment."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.measures.figures import History
from mechcausal.measures.observation import Observation
from mechcausal.recipes import Recipe

if TYPE_CHECKING:
    from mechcausal.models.adapter import HookedTransformer


Tell = Callable[[str], None]
"""Called with one line on what is being prepared."""


def tell_nobody(_: str) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Generators:
    """Independent sources of randomness, all derived from the run's seed.

    Attributes:
        data: generator for training batches, on the run's device.
        evaluation: generator for evaluation batches, on the run's device.
        theory: generator for averages over priors, on the CPU.
        init: seed of the model's initial weights.
        probes: seed of the sequences that probes draw at every probe step.
    """

    data: torch.Generator
    evaluation: torch.Generator
    theory: torch.Generator
    init: int
    probes: int

    @classmethod
    def from_seed(cls, seed: int, device: torch.device) -> "Generators":
        """Generators for a run with this seed."""
        states = np.random.SeedSequence(seed).generate_state(5).tolist()
        data, evaluation, theory, init, probes = states
        return cls(
            torch.Generator(device=device).manual_seed(data),
            torch.Generator(device=device).manual_seed(evaluation),
            torch.Generator().manual_seed(theory),
            init,
            probes,
        )


class Experiment(ABC):
    """Data, model, probes and pictures of one kind of run.

    Attributes:
        recipe: what it was built from.
        notes: limits of its figures, one line each.
    """

    recipe: Recipe
    notes: Sequence[str] = ()

    @property
    @abstractmethod
    def hooked(self) -> "HookedTransformer":
        """The HookedTransformer that owns all parameters."""

    @abstractmethod
    def parameters(self, names: Sequence[str]) -> list[torch.nn.Parameter]:
        """The parameters with these names; "all" stands for every parameter."""

    @abstractmethod
    def training_only(self, names: tuple[str, ...]) -> AbstractContextManager[None]:
        """Within the block only these parameters take gradients."""

    @abstractmethod
    def training_loss(self, n_sequences: int) -> Tensor:
        """The loss on `n_sequences` fresh sequences, nats."""

    @classmethod
    def training_losses(
        cls, experiments: Sequence["Experiment"], n_sequences: int
    ) -> Float[Tensor, "run"]:
        """`training_loss` of several experiments of equal shape, each on its own sequences."""
        return torch.stack([experiment.training_loss(n_sequences) for experiment in experiments])

    @abstractmethod
    def losses(self) -> dict[str, float]:
        """Evaluation losses only, without probes."""

    @abstractmethod
    def observe(self) -> Observation:
        """Run every probe on the model; changes neither weights nor gradients."""

    @abstractmethod
    def heatmaps(self, matrices: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Pictures of one probe step for W&B, by name."""

    @abstractmethod
    def draw_figures(
        self,
        folder: Path,
        *,
        history: History,
        matrices: Mapping[int, Mapping[str, Tensor]],
        stage_starts: Sequence[int],
    ) -> dict[str, Path]:
        """Draw the run's figures; return the PNG files by their names in W&B."""

    @abstractmethod
    def save_model(self, folder: Path) -> None:
        """Write weights and config; `load_model` reads them."""

    def conclusions(self, history: History) -> dict[str, Any]:
        """Results that need the run's full history, for its summary."""
        return {}

    def reference_matrices(self) -> dict[str, Tensor]:
        """Matrices that those of the probe steps are compared with, such as theory's."""
        return {}
