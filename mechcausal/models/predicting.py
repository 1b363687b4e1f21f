"""What a model predicts of a batch, whichever of the tokens the batch labels."""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from mechcausal.models.adapter import HookedTransformer
from mechcausal.models.base import GraphModel, ModelError
from mechcausal.models.standard import StandardTransformer
from mechcausal.tasks import Batch, Task

# Limit on attention entries, or activations, of one pass.
_MAX_ENTRIES = 4_000_000


def graph_model(model: GraphModel | HookedTransformer, task: Task) -> GraphModel:
    """The model itself, or a HookedTransformer as a `StandardTransformer` of the same weights.

    Raises:
        ModelError: it is neither, or too small for the task's tokens or sequences.

    Example:
        >>> from mechcausal.graphs import chain
        >>> from mechcausal.models.simplified import SimplifiedTransformer
        >>> from mechcausal.tasks import SingleParentTask
        >>> from mechcausal.tasks.priors import DirichletPrior
        >>> task = SingleParentTask(chain(7), DirichletPrior.symmetric(0.1, vocab_size=3))
        >>> graph_model(SimplifiedTransformer(3, 4), task)
        Traceback (most recent call last):
        mechcausal.models.base.ModelError: the model reads 4 positions, ... sequences of 8
    """
    if isinstance(model, HookedTransformer):
        model = StandardTransformer.around(model)
    if not isinstance(model, GraphModel):
        raise ModelError(
            f"model: a {type(model).__name__}; needed is a HookedTransformer or a GraphModel"
        )
    if model.sequence_length < task.sequence_length:
        raise ModelError(
            f"the model reads {model.sequence_length} positions, the task has sequences of "
            f"{task.sequence_length}"
        )
    if model.vocab_size < task.vocab_size:
        raise ModelError(
            f"the model knows {model.vocab_size} tokens, the task has {task.vocab_size}"
        )
    return model


def rows_of_a_pass(model: GraphModel) -> int:
    """How many sequences the model can read in one pass without much memory; at least 1."""
    config = model.hooked.cfg
    entries = max(config.n_ctx * config.n_heads, config.d_model) * config.n_ctx
    return max(1, _MAX_ENTRIES // entries)


def parts_of(batch: Batch, model: GraphModel) -> Iterator[Batch]:
    """The batch in parts that the model can read in one pass each without much memory."""
    size = rows_of_a_pass(model)
    return (batch[start : start + size] for start in range(0, len(batch), size))


def predict(model: GraphModel, batch: Batch) -> Float[Tensor, "batch *pos vocab"]:
    """The distributions that a model predicts, shaped like the batch's target.

    Raises:
        ModelError: it cannot predict at every position, or its vocabulary is not the task's.

    Example:
        >>> import torch
        >>> from mechcausal.models.standard import standard_config
        >>> model = StandardTransformer(standard_config(3, 6, d_model=8), seed=0)
        >>> tokens = torch.zeros(2, 6, dtype=torch.int64)
        >>> [tuple(predict(model, Batch(tokens, torch.ones(shape))).shape)
        ...  for shape in ((2, 3), (2, 6, 3))]
        [(2, 3), (2, 6, 3)]
    """
    if batch.labels_positions:
        return _checked(model.predict_positions(batch.tokens), batch)
    return _checked(model(batch.tokens), batch)


def predict_hooked(model: GraphModel, batch: Batch) -> Float[Tensor, "batch *pos vocab"]:
    """The same from the HookedTransformer, so that hooks see the pass; errors as in `predict`."""
    output = model.hooked(batch.tokens)
    if batch.labels_positions:
        return _checked(model.probabilities_by_position(output), batch)
    return _checked(model.probabilities(output), batch)


def _checked(
    prediction: Float[Tensor, "batch *any"], batch: Batch
) -> Float[Tensor, "batch *pos vocab"]:
    if prediction.shape != batch.target.shape:
        raise ModelError(
            f"the model predicts a tensor of shape {tuple(prediction.shape)}, the task's target "
            f"has {tuple(batch.target.shape)}"
        )
    return prediction
