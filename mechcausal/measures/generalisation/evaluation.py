"""Compare a model with Bayes and with an oracle on families of transition matrices.

There are three reference predictors. The posterior mean under the TRAINING prior is what a
perfectly trained model predicts; on other matrices it is not optimal, so a model can beat it. The
posterior mean under the family is optimal if the family is known. The oracle knows the matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.measures.generalisation.families import STANDARD_FAMILIES, MatrixFamily
from mechcausal.models.base import GraphModel
from mechcausal.support.statistics import sequence_mean
from mechcausal.tasks import Batch, SingleParentTask, cross_entropies, predictors
from mechcausal.tasks.priors import DirichletPrior


@dataclass(frozen=True)
class OODRow:
    """A model on one family of transition matrices; losses and gaps are means in nats.

    Attributes:
        family: the family's name.
        description: one line.
        n_sequences: sequences, each with its own matrix.
        loss: the model's cross entropy against the true row, smoothed by epsilon.
        bayes_loss: loss of the posterior mean under the TRAINING prior.
        own_bayes_loss: loss of the posterior mean under the family; None unless it is a Dirichlet
            prior.
        oracle_loss: loss if pi is known, the entropy of the row.
        gap_to_bayes: loss - bayes_loss; negative if the model beats the wrong prior.
        gap_to_bayes_stderr: standard error, paired over sequences.
        gap_to_oracle: loss - oracle_loss.
        gap_to_oracle_stderr: standard error, paired over sequences.
        total_variation: mean of half the sum over s' of `abs(f_s' - pi(s' | query))`.
        sup_error_mean: mean of the largest `abs(f_s' - pi(s' | query))`.
        sup_error_median: median of the same.
    """

    family: str
    description: str
    n_sequences: int
    loss: float
    bayes_loss: float
    own_bayes_loss: float | None
    oracle_loss: float
    gap_to_bayes: float
    gap_to_bayes_stderr: float
    gap_to_oracle: float
    gap_to_oracle_stderr: float
    total_variation: float
    sup_error_mean: float
    sup_error_median: float


@torch.no_grad()
def evaluate_ood(
    model: GraphModel,
    task: SingleParentTask,
    *,
    families: Sequence[MatrixFamily] = STANDARD_FAMILIES,
    n_sequences: int,
    generator: torch.Generator,
    epsilon: float,
    bayes_draws: int = 128,
) -> list[OODRow]:
    """Compare a model with Bayes and an oracle on each family, on fresh sequences of the task.

    Args:
        model: trained on the task.
        task: the graph and the TRAINING prior.
        families: families of transition matrices.
        n_sequences: for each family, at least 2.
        generator: source of randomness, on the model's device.
        epsilon: smoothing of the model's predictions in the loss, as in training; the errors use
            the predictions without smoothing.
        bayes_draws: `n_draws` of `predictors.bayes_prediction`, which takes most of the time.

    Raises:
        ValueError: fewer than 2 sequences, or the sizes of model and task differ.
        PriorError: the size of a fixed matrix differs.
    """
    check_n_sequences(n_sequences)
    sizes = (model.vocab_size, model.sequence_length)
    needed = (task.vocab_size, task.sequence_length)
    if sizes != needed:
        raise ValueError(f"the model has (S, T) = {sizes}, the task {needed}: they must be equal")
    rows = []
    for family in families:
        transition = family.sample(n_sequences, task.vocab_size, generator)
        batch = task.sample_given(transition, generator=generator)
        prediction = model(batch.tokens)
        loss = cross_entropies(prediction, batch.target, epsilon=epsilon)
        oracle = cross_entropies(batch.target, batch.target)
        bayes = _bayes_losses(task, batch, generator, bayes_draws)
        own = None
        if family.alpha is not None:
            prior = DirichletPrior.symmetric(family.alpha, task.vocab_size)
            family_task = SingleParentTask(task.graph, prior)
            own = _bayes_losses(family_task, batch, generator, bayes_draws).mean().item()
        gap_to_bayes, bayes_stderr = sequence_mean(loss - bayes)
        gap_to_oracle, oracle_stderr = sequence_mean(loss - oracle)
        errors = sup_errors(prediction, batch.target)
        rows.append(
            OODRow(
                family=family.name,
                description=family.description,
                n_sequences=n_sequences,
                loss=loss.mean().item(),
                bayes_loss=bayes.mean().item(),
                own_bayes_loss=own,
                oracle_loss=oracle.mean().item(),
                gap_to_bayes=gap_to_bayes,
                gap_to_bayes_stderr=bayes_stderr,
                gap_to_oracle=gap_to_oracle,
                gap_to_oracle_stderr=oracle_stderr,
                total_variation=0.5 * (prediction - batch.target).abs().sum(1).mean().item(),
                sup_error_mean=errors.mean().item(),
                sup_error_median=errors.quantile(0.5).item(),
            )
        )
    return rows


def sup_errors(
    prediction: Float[Tensor, "batch vocab"], target: Float[Tensor, "batch vocab"]
) -> Float[Tensor, "batch"]:
    """`sup_s' |f_s' - pi(s' | query)|` of each sequence."""
    return (prediction - target).abs().amax(1)


def check_n_sequences(n_sequences: int) -> None:
    """Raise ValueError for too few sequences for a standard error."""
    if n_sequences < 2:
        raise ValueError(f"n_sequences is {n_sequences}: a standard error needs at least 2")


def _bayes_losses(
    task: SingleParentTask, batch: Batch, generator: torch.Generator, n_draws: int
) -> Tensor:
    prediction = predictors.bayes_prediction(
        task, batch.tokens, generator=generator, n_draws=n_draws
    )
    return cross_entropies(prediction, batch.target)
