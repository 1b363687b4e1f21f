"""Graphs to be inferred in context: does a model find them, and the kernel, as Bayes' rule does?"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.measures.context_graphs import (
    candidate_attention,
    copy_figures,
    kernel_errors,
    parent_figures,
)
from mechcausal.measures.figures import History
from mechcausal.measures.observation import Observation
from mechcausal.models.in_context_graphs import InContextGraphTransformer
from mechcausal.models.predicting import parts_of
from mechcausal.recipes import Recipe
from mechcausal.tasks.in_context_graphs import ContextBatch, InContextGraphTask
from mechcausal.theory.context_gradient import first_score_gradient
from mechcausal.training.experiments.any_task import TaskExperiment
from mechcausal.training.experiments.base import Generators

N_FIRST_GRADIENTS = 5
"""Graphs of which the summary says whether the first gradient names their parents."""
_N_ATTENDING = 256  # contexts whose attention is read through hooks
_N_EXAMPLES = 4  # contexts whose attention is kept


class InContextGraphExperiment(TaskExperiment):
    """The tailored or a standard transformer on contexts that each have a graph of their own."""

    kind = "in_context_graphs"

    def __init__(self, recipe: Recipe, generators: Generators) -> None:
        """Draw the kernel, build the model at its start, and draw the evaluation contexts."""
        task = recipe.build_task()
        assert isinstance(task, InContextGraphTask)
        super().__init__(recipe, generators, task=task)
        self._contexts = task
        batch = self.observer.batch
        assert isinstance(batch, ContextBatch)
        assert batch.parents is not None
        self._parents = batch.parents
        self._posterior = task.parent_posterior(batch.tokens)
        self._kernel = torch.tensor(task.kernel.rows, dtype=torch.float64)

    def observe(self) -> Observation:
        """Losses and strategies; attention to candidates against Bayes' rule; kernel and copies.

        The tailored model is read in closed form: its hooked passes would take most of the run.
        """
        model = self.model
        if isinstance(model, InContextGraphTransformer):
            return self._observe_tailored(model)
        observation = super().observe()
        tokens = self.observer.batch.tokens[:_N_ATTENDING]
        attention = candidate_attention(model, tokens, self._contexts.n_positions)
        figures, matrices = self._of_parents(attention)
        return replace(
            observation,
            figures=observation.figures | figures,
            matrices=observation.matrices | matrices,
        )

    @torch.no_grad()
    def _observe_tailored(self, model: InContextGraphTransformer) -> Observation:
        prediction = self.observer.predict()
        parts = parts_of(self.observer.batch, model)
        # Row h of the model's attention predicts position h + 1.
        attention = torch.cat([model.parent_attention(part.tokens) for part in parts])[:, :-1]
        attention = torch.cat([torch.zeros_like(attention[:, :1]), attention], dim=1)
        figures, matrices = self._of_parents(attention)
        comparison = model.comparison().cpu()
        figures |= kernel_errors(comparison, self._kernel) | copy_figures(model)
        matrices |= {
            "copies/examples": model.attention_to_examples().cpu(),
            "copies/columns": model.attention_to_columns().mean(0).cpu(),
            "kernel/by_column": comparison.softmax(0),
        }
        return Observation(self.observer.figures_of(prediction) | figures, matrices, prediction)

    def _of_parents(
        self, attention: Float[Tensor, "batch position key"]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        n = len(attention)
        figures = parent_figures(attention, self._posterior[:n], self._parents[:n])
        return figures, {"attention/candidates": attention[:_N_EXAMPLES].float().cpu()}

    def conclusions(self, history: History) -> dict[str, Any]:
        """Whether the first gradient on scores names the parents of random graphs, and its χ²."""
        generator = torch.Generator().manual_seed(self.generators.probes)
        graphs = self._contexts.draw_parents(N_FIRST_GRADIENTS, generator=generator)
        first = [
            first_score_gradient(self._contexts, parents, generator=generator)
            for parents in graphs.tolist()
        ]
        named = [hit for each in first for hit in each.named.values()]
        correlations = [r for each in first for r in each.chi2_correlations.values()]
        conclusions = {}
        if named:
            conclusions["parents/first_gradient_named"] = sum(named) / len(named)
        if correlations:
            conclusions["parents/first_gradient_chi2"] = sum(correlations) / len(correlations)
        return conclusions

    def reference_matrices(self) -> dict[str, Tensor]:
        """The posterior in the contexts whose attention is kept, and the kernel by columns."""
        return {
            "theory/posterior": self._posterior[:_N_EXAMPLES].float().cpu(),
            "theory/kernel_by_column": self._kernel.log().softmax(0).float(),
        }
