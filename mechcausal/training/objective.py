"""What one step minimises: the loss of a model on fresh sequences of a task."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.models.base import GraphModel, ModelError
from mechcausal.models.predicting import predict
from mechcausal.tasks import Batch, Task, batch_loss, check_batch
from mechcausal.tasks.ahead import BatchesAhead


class Objective:
    """The loss of a model on fresh sequences of a task, and its trained parameters by name.

    Attributes:
        model: the trained model.
        task: draws the sequences.
    """

    def __init__(
        self,
        model: GraphModel,
        task: Task,
        *,
        generator: torch.Generator,
        epsilon: float = 0.0,
        relabel: Callable[[Batch], Batch] | None = None,
    ) -> None:
        """Begin to draw when the first loss is asked for.

        Args:
            model: the trained model.
            task: draws the sequences.
            generator: source of the sequences; its state is the one after the last batch used.
            epsilon: added to predicted probabilities inside the logarithm.
            relabel: gives a drawn batch other labels.
        """
        self.model = model
        self.task = task
        self._epsilon = epsilon
        self._relabel = relabel
        self._batches = BatchesAhead(task, generator)
        self._is_checked = False

    def training_loss(self, n_sequences: int) -> Tensor:
        """Cross entropy on fresh sequences, nats.

        Raises:
            TaskError: the first batch has wrong shapes, or labels that are no distributions.
            ModelError: the model does not predict what the task labels.
        """
        batch = self._batches.sample(n_sequences)
        if not self._is_checked:
            check_batch(self.task, batch, n_sequences)
            self._is_checked = True
        if self._relabel is not None:
            batch = self._relabel(batch)
        return batch_loss(predict(self.model, batch), batch, epsilon=self._epsilon)

    @classmethod
    def training_losses(
        cls, experiments: Sequence["Objective"], n_sequences: int
    ) -> Float[Tensor, "run"]:
        """`training_loss` of several, each on its own sequences."""
        return torch.stack([each.training_loss(n_sequences) for each in experiments])

    def parameters(self, names: Sequence[str]) -> list[torch.nn.Parameter]:
        """The parameters with these names; "all" stands for every parameter.

        Raises:
            ModelError: a name that the model does not have.
        """
        named = self.model.parameters_by_name
        return [named[name] for name in self._expanded(names)]

    def training_only(self, names: tuple[str, ...]) -> AbstractContextManager[None]:
        """Within the block only these parameters take gradients."""
        return self.model.training_only(self._expanded(names))

    def _expanded(self, names: Sequence[str]) -> tuple[str, ...]:
        named = self.model.parameters_by_name
        if "all" in names:
            return tuple(named)
        if unknown := [name for name in names if name not in named]:
            raise ModelError(
                f"no parameter {unknown[0]} in this model, but all, or {', '.join(list(named)[:6])}"
            )
        return tuple(names)
