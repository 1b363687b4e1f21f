"""The interface between the training loop and an experiment, also one of the user's own."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.measures.figures import History
from mechcausal.measures.observation import Observation
from mechcausal.recipes import Recipe, RecipeError

if TYPE_CHECKING:
    from mechcausal.models.adapter import HookedTransformer
    from mechcausal.models.base import GraphModel
    from mechcausal.training.objective import Objective
    from probes.intervening.clamps import Clamps


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

    One of your own needs `hooked` and `training_loss`; every other method has a default. Its
    constructor takes the recipe and the generators, and passes them on to this one. Whatever is
    drawn at random has to come from the generators: a resumed run restores them.

    Attributes:
        kind: `task.kind` of the recipe; "own" for experiments that no recipe can name.
        recipe: what it was built from.
        generators: the run's sources of randomness.
        notes: limits of its figures, one line each.
    """

    kind: ClassVar[str] = "own"
    recipe: Recipe
    generators: Generators
    notes: Sequence[str] = ()

    def __init__(self, recipe: Recipe, generators: Generators) -> None:
        """Store what the run is made of."""
        self.recipe = recipe
        self.generators = generators

    @classmethod
    def check(cls, recipe: Recipe, **options: Any) -> None:
        """Refuse in one line what cannot be trained, before anything is written.

        Args:
            recipe: the recipe.
            options: the further arguments of the constructor.

        Raises:
            RecipeError, TaskError: it cannot be trained; by default nothing is refused.
        """
        return

    @property
    @abstractmethod
    def hooked(self) -> "HookedTransformer":
        """The HookedTransformer that owns all parameters."""

    @abstractmethod
    def training_loss(self, n_sequences: int) -> Tensor:
        """The loss on `n_sequences` fresh sequences, nats."""

    @classmethod
    def training_losses(
        cls, experiments: Sequence["Experiment"], n_sequences: int
    ) -> Float[Tensor, "run"]:
        """`training_loss` of several experiments of equal shape, each on its own sequences."""
        return torch.stack([experiment.training_loss(n_sequences) for experiment in experiments])

    def losses(self) -> dict[str, float]:
        """Evaluation losses only, without probes; `loss/eval` decides which checkpoint is best."""
        return {}

    def observe(self) -> Observation:
        """Run every probe on the model; changes neither weights nor gradients."""
        return Observation(self.losses(), {})

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """What stages may train, by name."""
        named = self.hooked.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def parameters(self, names: Sequence[str]) -> list[torch.nn.Parameter]:
        """The parameters with these names; "all" stands for every parameter.

        Raises:
            RecipeError: a name that the model does not have.
        """
        named = self.named_parameters()
        return [named[name] for name in self.expanded(names)]

    def expanded(self, names: Sequence[str]) -> tuple[str, ...]:
        """The names, with "all" written out; errors as in `parameters`."""
        named = self.named_parameters()
        if "all" in names:
            return tuple(named)
        if unknown := [name for name in names if name not in named]:
            raise RecipeError(
                f"training.algorithm: {self.recipe.training.algorithm} trains {unknown[0]}, which "
                "this model does not have: choose joint"
            )
        return tuple(names)

    def training_only(self, names: tuple[str, ...]) -> AbstractContextManager[None]:
        """Within the block only these parameters take gradients."""
        trained = {id(parameter) for parameter in self.parameters(names)}
        named = self.named_parameters().values()
        return _frozen([p for p in named if id(p) not in trained])

    def clamped(self, clamps: "Clamps") -> AbstractContextManager[None]:
        """Hold parts of attention fixed inside the block, see `probes.clamp`.

        By default through the hooks of `hooked`, which `training_loss` then has to run.
        """
        from probes import clamp

        return clamp(self.hooked, clamps)

    def evaluation_tokens(self) -> Int[Tensor, "batch pos"]:
        """Fixed sequences without padding, on which a clamp freezes the mean attention.

        Raises:
            RecipeError: the experiment has none.
        """
        raise RecipeError(
            f"clamp.pattern: frozen needs evaluation_tokens, which {type(self).__name__} lacks"
        )

    def heatmaps(self, matrices: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Pictures of one probe step for W&B, by name: of every matrix, blocks side by side."""
        from mechcausal.pictures.static import own_figures

        return own_figures.own_heatmaps(matrices)

    def draw_figures(
        self,
        folder: Path,
        *,
        history: History,
        matrices: Mapping[int, Mapping[str, Tensor]],
        stage_starts: Sequence[int],
    ) -> dict[str, Path]:
        """Draw the run's figures; return the PNG files by their names in W&B.

        By default curves.png: one picture for every group of figures that the run has.
        """
        from mechcausal.pictures.static import own_figures

        return own_figures.draw_own_figures(
            folder, recipe=self.recipe, history=history, stage_starts=stage_starts
        )

    def save_model(self, folder: Path) -> None:
        """Write weights and config; `load_model` reads them."""
        from mechcausal.models.adapter import save_model

        save_model(self.hooked, folder, extra={"kind": self.kind})

    def conclusions(self, history: History) -> dict[str, Any]:
        """Results that need the run's full history, for its summary."""
        return {}

    def reference_matrices(self) -> dict[str, Tensor]:
        """Matrices that those of the probe steps are compared with, such as theory's."""
        return {}


class ModelExperiment(Experiment):
    """An experiment that trains a GraphModel on the labels of a task.

    Attributes:
        model: the trained model.
        objective: its loss on fresh sequences.
    """

    model: "GraphModel"
    objective: "Objective"

    @property
    def hooked(self) -> "HookedTransformer":
        """The HookedTransformer that owns all parameters."""
        return self.model.hooked

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The model's parameters, by its own names (A1, A2, ...)."""
        return self.model.parameters_by_name

    def training_only(self, names: tuple[str, ...]) -> AbstractContextManager[None]:
        """Within the block only these parameters take gradients."""
        return self.model.training_only(self.expanded(names))

    def clamped(self, clamps: "Clamps") -> AbstractContextManager[None]:
        """Hold parts of attention fixed inside the block, in the model's closed form too."""
        return self.model.clamped(clamps)

    def training_loss(self, n_sequences: int) -> Tensor:
        """Cross entropy on fresh sequences, over the labels that count."""
        return self.objective.training_loss(n_sequences)

    def save_model(self, folder: Path) -> None:
        """Write weights and config; `load_model` and the model's own `load` read them."""
        self.model.save(folder)


@contextmanager
def _frozen(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
