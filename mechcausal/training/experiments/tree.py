"""Leaves of random trees: does a model find belief propagation, and in which order of scales?"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechcausal.measures.figures import STEP, History
from mechcausal.measures.observation import Observation
from mechcausal.measures.strategies import divergence
from mechcausal.measures.tree_residuals import residuals_by_height
from mechcausal.models.base import GraphModel
from mechcausal.models.predicting import rows_of_a_pass
from mechcausal.recipes import Recipe
from mechcausal.tasks.base import scored_rows
from mechcausal.tasks.hierarchy import Hierarchy, evidence_of
from mechcausal.tasks.hierarchy_tasks import MaskedLeafTask, use_of_scales
from mechcausal.tasks.protocol import BAYES
from mechcausal.training.experiments.any_task import TaskExperiment
from mechcausal.training.experiments.base import Generators
from probes import attention_by_class

_MASKED_ROWS = 4096  # sequences that residual information is read from, one for each hidden leaf
_FEWEST_TREES = 64  # no residual information from fewer
FORMED = 0.5
"""A scale counts as used from the first probe step at which its coefficient reaches this."""


class TreeExperiment(TaskExperiment):
    """A bidirectional transformer on the leaves of trees, compared with belief propagation."""

    kind = "tree"

    def __init__(self, recipe: Recipe, generators: Generators) -> None:
        """Draw the grammar, build the model at its start, and draw the evaluation trees."""
        super().__init__(recipe, generators, task=recipe.build_task())
        self._residuals = None
        if isinstance(self.task, MaskedLeafTask):
            n_trees = _MASKED_ROWS // self.task.sequence_length
            if n_trees >= _FEWEST_TREES:
                generator = torch.Generator(device=generators.data.device)
                self._residuals = _Masked(
                    self.task.tree, n_trees, generator.manual_seed(generators.probes)
                )

    def observe(self) -> Observation:
        """Losses, KL to belief propagation, the use of each scale, and attention by height."""
        observation = super().observe()
        assert observation.prediction is not None
        predicted = scored_rows(observation.prediction, self.observer.batch).double()
        by_filter = self.observer.predictions
        figures = observation.figures | {
            f"tree/kl_{name}": divergence(exact, predicted).item()
            for name, exact in by_filter.items()
        }
        for height, used in use_of_scales(predicted, by_filter).items():
            figures[f"tree/use_of_scale_{height}"] = used
        same = predicted.argmax(-1) == by_filter[BAYES].argmax(-1)
        figures["tree/agreement"] = same.double().mean().item()
        figures |= attention_by_height(observation.matrices)
        if self._residuals is not None:
            figures |= self._residuals.figures(self.model)
        return replace(observation, figures=figures)

    def conclusions(self, history: History) -> dict[str, Any]:
        """The first probe step at which each scale was used by half, by height."""
        steps = {}
        depth = self.recipe.task.depth or 0
        for height in range(1, depth - self.recipe.task.filter + 1):
            key = f"tree/use_of_scale_{height}"
            used = [row[STEP] for row in history if (row.get(key) or 0.0) >= FORMED]
            steps[f"tree/step_of_scale_{height}"] = used[0] if used else None
        return steps


class _Masked:
    """Trees with each leaf hidden in turn, and what is left of a leaf's siblings to learn."""

    def __init__(self, tree: Hierarchy, n_trees: int, generator: torch.Generator) -> None:
        q, n_leaves = tree.grammar.n_symbols, tree.n_leaves
        self._leaves, _ = tree.sample(n_trees, generator=generator)
        self._exact = tree.infer(evidence_of(self._leaves, q)).leaves
        hidden = torch.eye(n_leaves, dtype=torch.bool, device=self._leaves.device)
        each = self._leaves.unsqueeze(1).expand(-1, n_leaves, -1)
        self._tokens = each.masked_fill(hidden, q).flatten(0, 1)  # by tree, then by hidden leaf

    @torch.no_grad()
    def figures(self, model: GraphModel) -> dict[str, float]:
        """`tree/residual_block_h` and `tree/residual_pair_h`, see `residuals_by_height`."""
        n_leaves = self._leaves.shape[1]
        predicted = []
        for rows in torch.arange(len(self._tokens)).split(rows_of_a_pass(model)):
            output = model.probabilities_by_position(model.hooked(self._tokens[rows]))
            predicted.append(output[torch.arange(len(rows)), rows % n_leaves, :-1])
        by_leaf = torch.cat(predicted).unflatten(0, (-1, n_leaves))
        residuals = residuals_by_height(self._leaves, self._exact, by_leaf)
        return {
            f"tree/residual_{name}_{height}": value
            for height, residual in residuals.items()
            for name, value in residual._asdict().items()
        }


def attention_by_height(matrices: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean attention by the height of the leaves' common ancestor, relative to uniform attention.

    Args:
        matrices: `attention/layerN` for every layer, [head, query, key].
    """
    figures = {}
    for name, attention in matrices.items():
        layer = name.removeprefix("attention/layer")
        heights = common_heights(attention.shape[-1])
        by_height = attention_by_class(attention.unsqueeze(0), heights, causal=False)
        ratios = by_height.ratio[0].mean(0).tolist()  # over heads
        for height, ratio in zip(by_height.classes, ratios, strict=True):
            figures[f"tree/attention_L{layer}_height_{height}"] = ratio
    return figures


def common_heights(n_leaves: int) -> Int[Tensor, "leaf leaf"]:
    """The height of every two leaves' lowest common ancestor: 0 for a leaf and itself.

    Example:
        >>> common_heights(4).tolist()
        [[0, 1, 2, 2], [1, 0, 2, 2], [2, 2, 0, 1], [2, 2, 1, 0]]
    """
    leaves = range(n_leaves)
    return torch.tensor([[(a ^ b).bit_length() for b in leaves] for a in leaves])
