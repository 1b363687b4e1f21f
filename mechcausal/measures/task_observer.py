"""Measure a model on any task: its loss, and how close it is to what the task can say."""

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.measures.observation import Observation
from mechcausal.measures.strategies import strategy_figures
from mechcausal.models.base import GraphModel
from mechcausal.models.predicting import parts_of, predict, predict_hooked
from mechcausal.tasks import (
    PredictableTask,
    Task,
    TaskError,
    batch_loss,
    check_batch,
    cross_entropies,
    scored_rows,
)
from mechcausal.tasks.protocol import BAYES
from probes import AttentionPattern, attach


class TaskObserver:
    """Measures a model on fixed sequences of a task, as often as `observe` is called.

    Attributes:
        batch: the evaluation sequences.
        predictions: what the task's own predictors say of them, by name; empty if it has none.
        bayes: the loss of the predictor "bayes"; None without one.
    """

    def __init__(
        self,
        model: GraphModel,
        task: Task,
        *,
        n_sequences: int,
        epsilon: float,
        generator: torch.Generator,
    ) -> None:
        """Draw the evaluation batch and ask the task for its predictions.

        Args:
            model: the model to observe; never changed.
            task: any task; one with `predictions` gives more figures.
            n_sequences: size of the evaluation batch.
            epsilon: smoothing of predictions, as in training.
            generator: of the evaluation alone.

        Raises:
            TaskError: the batch, or a prediction, has a wrong shape or no distributions.
        """
        self.model = model
        self.task = task
        self.epsilon = epsilon
        self.batch = task.sample(n_sequences, generator=generator)
        check_batch(task, self.batch, n_sequences)
        self.predictions: dict[str, Float[Tensor, "row vocab"]] = {}
        if isinstance(task, PredictableTask):
            for name, prediction in task.predictions(self.batch).items():
                if prediction.shape != self.batch.target.shape:
                    raise TaskError(
                        f"{type(task).__name__}: prediction {name} of shape "
                        f"{tuple(prediction.shape)}, its target has "
                        f"{tuple(self.batch.target.shape)}"
                    )
                self.predictions[name] = scored_rows(prediction, self.batch)
        self.bayes: float | None = None
        if BAYES in self.predictions:
            target = scored_rows(self.batch.target, self.batch)
            self.bayes = cross_entropies(self.predictions[BAYES], target).mean().item()

    @torch.no_grad()
    def predict(self) -> Float[Tensor, "batch *pos vocab"]:
        """What the model predicts of the evaluation sequences, without hooks."""
        parts = parts_of(self.batch, self.model)
        return torch.cat([predict(self.model, part) for part in parts])

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """The model's loss on the evaluation sequences, that of Bayes, and their difference."""
        return self._losses(self.predict())

    def figures_of(self, prediction: Float[Tensor, "batch *pos vocab"]) -> dict[str, float]:
        """Losses of a prediction, and its divergence from every prediction of the task."""
        return self._losses(prediction) | strategy_figures(
            scored_rows(prediction, self.batch), self.predictions, epsilon=self.epsilon
        )

    @torch.no_grad()
    def observe(self) -> Observation:
        """Losses, the divergence from every prediction, and the attention of every layer.

        The matrices are `attention/layer0`, `attention/layer1`, ..., each [head, query, key] and a
        mean over sequences.
        """
        pattern = AttentionPattern(reduce="mean")
        with self.model.frozen(), attach(self.model.hooked, pattern):
            parts = parts_of(self.batch, self.model)
            prediction = torch.cat([predict_hooked(self.model, part) for part in parts])
        figures = self.figures_of(prediction)
        reading = pattern.reading()
        matrices = {
            f"attention/layer{layer}": reading.sel(layer=layer).values[:heads].cpu()
            for layer, heads in enumerate(self.model.heads)
        }
        return Observation(figures, matrices, prediction)

    def _losses(self, prediction: Float[Tensor, "batch *pos vocab"]) -> dict[str, float]:
        loss = batch_loss(prediction, self.batch, epsilon=self.epsilon).item()
        losses = {"loss/eval": loss}
        if self.bayes is not None:
            losses |= {"loss/bayes": self.bayes, "loss/gap": loss - self.bayes}
        return losses
