"""The paper's experiment: the simplified transformer learns the causal graph of its data."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechcausal import report
from mechcausal.experiments.base import Experiment, Generators, History, Observation
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.observer import Observer
from mechcausal.recipes import Recipe
from mechcausal.tasks import SingleParentTask, soft_cross_entropy
from mechcausal.theory import pairwise_theory


class CausalGraphExperiment(Experiment):
    """Single-parent task, simplified transformer on its closed form, hooks on the hooked model.

    Attributes:
        task: graph and prior.
        theory: what information theory predicts for them.
        model: the simplified transformer.
        observer: looks at it on a fixed evaluation batch.
    """

    def __init__(self, recipe: Recipe, generators: Generators) -> None:
        """Build the task, its theory, the model at Algorithm 1's start, and the observer."""
        training, evaluation = recipe.training, recipe.evaluation
        self.recipe = recipe
        self.task = SingleParentTask(recipe.build_graph(), recipe.build_prior())
        self.theory = pairwise_theory(
            self.task.graph,
            self.task.prior,
            n_priors=evaluation.theory_priors,
            generator=generators.theory,
            beta0=training.beta0,
        )
        self.model = SimplifiedTransformer(
            self.task.vocab_size, self.task.sequence_length, device=generators.data.device
        )
        self.model.initialise(beta0=training.beta0)
        self.observer = Observer(
            self.model,
            self.task,
            self.theory,
            n_sequences=evaluation.n_sequences,
            epsilon=training.epsilon,
            bayes_draws=evaluation.bayes_draws,
            generator=generators.evaluation,
        )
        self._data = generators.data

    @property
    def hooked(self) -> HookedTransformer:
        """The HookedTransformer that owns A1 and A2."""
        return self.model.hooked

    def parameters(self, names: Sequence[str]) -> list[torch.nn.Parameter]:
        """The parameters that hold A1, A2."""
        return [self.model.parameters_by_name[name] for name in names]

    def training_only(self, names: tuple[str, ...]) -> AbstractContextManager[None]:
        """Within the block only these of A1, A2 take gradients."""
        return self.model.training_only(names)

    def training_loss(self) -> Tensor:
        """Cross entropy of the closed form on a fresh batch."""
        batch = self.task.sample(self.recipe.training.batch_size, generator=self._data)
        prediction = self.model(batch.tokens)
        return soft_cross_entropy(prediction, batch.target, epsilon=self.recipe.training.epsilon)

    def losses(self) -> dict[str, float]:
        """Evaluation loss, Bayes loss and gap."""
        return self.observer.losses()

    def observe(self) -> Observation:
        """All probes in one forward and backward pass of the hooked model."""
        return self.observer.observe()

    def heatmaps(self, matrices: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Attention beside the graph, gradients beside the prediction."""
        return report.heatmaps(matrices, self.theory)

    def draw_figures(
        self,
        folder: Path,
        *,
        history: History,
        matrices: Mapping[int, Mapping[str, Tensor]],
        stage_starts: Sequence[int],
    ) -> dict[str, Path]:
        """attention.png, gradient.png, curves.png."""
        return report.draw_figures(
            folder,
            recipe=self.recipe,
            theory=self.theory,
            history=history,
            matrices=matrices,
            stage_starts=stage_starts,
        )

    def save_model(self, folder: Path) -> None:
        """Readable by `SimplifiedTransformer.load` too."""
        self.model.save(folder)

    def reference_matrices(self) -> dict[str, Tensor]:
        """Information and predicted gradient."""
        return {
            "theory/chi2": self.theory.chi2,
            "theory/shannon": self.theory.shannon,
            "theory/g": self.theory.g,
            "theory/gradient": self.theory.predicted_gradient,
        }
