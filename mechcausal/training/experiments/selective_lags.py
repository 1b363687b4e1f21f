"""Markov chains of an unknown lag: does the last layer select the right one?"""

from dataclasses import replace

import torch

from mechcausal.measures.observation import Observation
from mechcausal.recipes import Recipe
from mechcausal.tasks.selective_lags import LagBatch, SelectiveLagTask
from mechcausal.training.experiments.any_task import TaskExperiment
from mechcausal.training.experiments.base import Generators
from probes import AttentionPattern, attach

_N_ATTENDING = 256  # sequences whose attention is read one by one


class LagExperiment(TaskExperiment):
    """A standard transformer on sequences that each have a lag of their own."""

    kind = "selective_lags"

    def __init__(self, recipe: Recipe, generators: Generators) -> None:
        """Draw the matrix, build the model at its start, and draw the evaluation sequences."""
        task = recipe.build_task()
        assert isinstance(task, SelectiveLagTask)
        super().__init__(recipe, generators, task=task)
        self._lags = task
        batch = self.observer.batch[:_N_ATTENDING]
        assert isinstance(batch, LagBatch)
        assert batch.lag is not None
        self._batch, self._lag = batch, batch.lag
        lags = torch.tensor(task.lags, device=batch.tokens.device)
        self._true = self._lag.unsqueeze(1) == lags
        posterior = task.lag_posterior(batch.tokens)[:, task.length // 2 :]
        of_truth = posterior.masked_select(self._true.unsqueeze(1).expand_as(posterior))
        self._posterior = of_truth.mean().item()

    def observe(self) -> Observation:
        """Losses, the divergence from every strategy, and attention on the true lag."""
        observation = super().observe()
        shares = {"lags/true_share": self._true_share(), "lags/posterior": self._posterior}
        return replace(observation, figures=observation.figures | shares)

    @torch.no_grad()
    def _true_share(self) -> float:
        last, task = len(self.model.heads) - 1, self._lags
        pattern = AttentionPattern(last)
        with self.model.frozen(), attach(self.hooked, pattern):
            self.hooked(self._batch.tokens, return_type=None)
        attention = pattern.reading().sel(layer=last).values.double().sum(1)  # over heads
        queries = torch.arange(task.length // 2, task.length, device=attention.device)
        by_lag = torch.stack([attention[:, queries, queries + 1 - lag] for lag in task.lags], -1)
        on_true = (by_lag * self._true.unsqueeze(1)).sum(-1)
        return (on_true / by_lag.sum(-1)).mean().item()
