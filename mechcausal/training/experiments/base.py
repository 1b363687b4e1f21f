"""What the training loop asks of an experiment."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mechcausal.recipes import Recipe
from mechcausal.records.run_folder import History

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


Tell = Callable[[str], None]
"""Told what an experiment is doing while it is built."""


def tell_nobody(_: str) -> None:
    """For who does not want to know."""


@dataclass(frozen=True)
class Generators:
    """Independent sources of randomness, each a function of the run's seed alone.

    Attributes:
        data: training batches, on the run's device.
        evaluation: evaluation batches, on the run's device.
        theory: averages over priors, on the CPU.
        init: seed of the model's initial weights.
        probes: seed of the sequences that probes draw at every look.
    """

    data: torch.Generator
    evaluation: torch.Generator
    theory: torch.Generator
    init: int
    probes: int

    @classmethod
    def from_seed(cls, seed: int, device: torch.device) -> "Generators":
        """Generators for a run."""
        states = np.random.SeedSequence(seed).generate_state(5).tolist()
        data, evaluation, theory, init, probes = states
        return cls(
            torch.Generator(device=device).manual_seed(data),
            torch.Generator(device=device).manual_seed(evaluation),
            torch.Generator().manual_seed(theory),
            init,
            probes,
        )


@dataclass(frozen=True)
class Observation:
    """Figures and matrices of one probe step.

    Attributes:
        figures: by the names of the W&B charts; NaN where a figure is not defined.
        matrices: what was seen in full, by name, on the CPU.
        prediction: the model's output on the evaluation batch, where it is compared with others.
    """

    figures: dict[str, float]
    matrices: dict[str, Tensor]
    prediction: Tensor | None = field(default=None, repr=False)


class Experiment(ABC):
    """Data, model, probes and pictures of one kind of run.

    Attributes:
        recipe: what it was built from.
        notes: what a reader of its figures should know, a line each.
    """

    recipe: Recipe
    notes: Sequence[str] = ()

    @property
    @abstractmethod
    def hooked(self) -> "HookedTransformer":
        """The model, owner of all parameters."""

    @abstractmethod
    def parameters(self, names: Sequence[str]) -> list[torch.nn.Parameter]:
        """The parameters that a stage's names stand for; "all" stands for every one."""

    @abstractmethod
    def training_only(self, names: tuple[str, ...]) -> AbstractContextManager[None]:
        """Within the block only these take gradients."""

    @abstractmethod
    def training_loss(self, n_sequences: int) -> Tensor:
        """The loss on that many fresh sequences, nats."""

    @abstractmethod
    def losses(self) -> dict[str, float]:
        """Evaluation losses alone, without probes."""

    @abstractmethod
    def observe(self) -> Observation:
        """Look at the model with every probe attached; changes nothing."""

    @abstractmethod
    def heatmaps(self, matrices: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """W&B pictures of one probe step."""

    @abstractmethod
    def draw_figures(
        self,
        folder: Path,
        *,
        history: History,
        matrices: Mapping[int, Mapping[str, Tensor]],
        stage_starts: Sequence[int],
    ) -> dict[str, Path]:
        """Draw the run's figures as PNG files, by the names under which W&B shows them."""

    @abstractmethod
    def save_model(self, folder: Path) -> None:
        """Write weights and config, readable by `load_model`."""

    def conclusions(self, history: History) -> dict[str, Any]:
        """What the run's whole history shows, for its summary."""
        return {}

    def reference_matrices(self) -> dict[str, Tensor]:
        """What the matrices of the probe steps are compared with."""
        return {}
