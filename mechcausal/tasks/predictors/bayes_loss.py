"""The Bayes loss of some sequences, with as many draws as its standard error calls for.

Too few draws make the Bayes predictor noisy, and its loss too high by an excess that falls like the
inverse of their number. The sequences limit what can be known anyway: draws are added until the
excess is small against the standard error that comes of the sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mechcausal.tasks import Batch, GraphTask, SeveralParentsTask, cross_entropies
from mechcausal.tasks.predictors.several_parents import context_prediction
from mechcausal.tasks.predictors.single_parent import RootWeights, bigram_prediction
from mechcausal.tasks.priors import DirichletPrior

# Draws of the first half; every further one takes as many as there have been.
_FIRST = 8
# The excess that is left to the draws, in standard errors.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class BayesLoss:
    """The cross entropy of the Bayes predictor.

    Attributes:
        mean: over the sequences, nats.
        stderr: of that mean, from the sequences.
        n_draws: for each sequence; 0 where the predictor is exact.
        excess: about how much too high the mean is, because the draws are finitely many.
    """

    mean: float
    stderr: float
    n_draws: int = 0
    excess: float = 0.0


def bayes_loss(
    task: GraphTask,
    batch: Batch,
    *,
    generator: torch.Generator,
    max_draws: int = 128,
    max_seconds: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> BayesLoss:
    """The loss of `bayes_prediction`, from no more draws than it takes.

    For a prior of the user's own: of its `posterior_mean`.

    Args:
        task: graph and prior.
        batch: sequences, on the generator's device.
        generator: source of the draws.
        max_draws: the most for each sequence.
        max_seconds: takes fewer draws if `max_draws` would take longer; counted in operations, not
            timed.
        on_progress: told how many sequences are done, and of how many, in every round of draws.

    Raises:
        PriorError: the prior has no `posterior_mean`.

    Example:
        >>> from mechcausal.graphs import chain
        >>> from mechcausal.tasks import SingleParentTask
        >>> task = SingleParentTask(chain(9), DirichletPrior.symmetric(0.5, vocab_size=3))
        >>> generator = torch.Generator().manual_seed(0)
        >>> bayes = bayes_loss(task, task.sample(256, generator=generator), generator=generator)
        >>> bayes.n_draws < 128, bayes.excess < bayes.stderr / 10
        (True, True)
    """

    def loss(prediction: Tensor) -> Tensor:
        return cross_entropies(prediction, batch.target)

    def exact(prediction: Tensor) -> BayesLoss:
        losses = loss(prediction)
        return BayesLoss(losses.mean().item(), _stderr(losses))

    if isinstance(task, SeveralParentsTask):
        return exact(context_prediction(task, batch.tokens, n_nearest=len(task.query_parents)))
    if not isinstance(task.prior, DirichletPrior) or not len(batch):
        return exact(bigram_prediction(task, batch.tokens))
    weights = RootWeights(task, batch.tokens)
    if max_seconds is not None:
        allowed = int(max_seconds / (weights.seconds_per_draw * len(batch)))
        max_draws = min(max_draws, max(2 * _FIRST, allowed))
    before = weights.draw(min(_FIRST, max_draws), generator, on_progress)
    n_draws, excess = min(_FIRST, max_draws), 0.0
    losses = loss(weights.prediction(before))
    while n_draws < max_draws:
        n_more = min(n_draws, max_draws - n_draws)
        more = weights.draw(n_more, generator, on_progress)
        halves = (losses + loss(weights.prediction(more))) / 2
        before = before.logaddexp(more)
        n_draws += n_more
        losses = loss(weights.prediction(before))
        excess = (halves - losses).mean().item()
        if excess <= _TOLERANCE * _stderr(losses):
            break
    return BayesLoss(losses.mean().item(), _stderr(losses), n_draws, max(excess, 0.0))


def _stderr(losses: Tensor) -> float:
    return losses.std().item() / len(losses) ** 0.5 if len(losses) > 1 else 0.0
