"""Check the batches of a task and the matrices of a prior, those of the user's own above all."""

import torch

from mechcausal.tasks.base import Batch
from mechcausal.tasks.priors import PriorError
from mechcausal.tasks.protocol import Prior, Task


class TaskError(ValueError):
    """A task whose batches make no sense; the message is one line for the user."""


def check_batch(task: Task, batch: Batch, n_sequences: int) -> None:
    """Check that a batch is what its task promises.

    Args:
        task: it drew the batch.
        batch: without a run axis.
        n_sequences: asked for.

    Raises:
        TaskError: wrong shapes, tokens out of range, or labels that are no distributions.

    Example:
        >>> from mechcausal.tasks import Batch
        >>> class Coin:
        ...     vocab_size, sequence_length = 2, 4
        ...     def sample(self, n_sequences, *, generator):
        ...         tokens = torch.randint(3, (n_sequences, 4), generator=generator)
        ...         return Batch(tokens, torch.full((n_sequences, 2), 0.5))
        >>> coin = Coin()
        >>> check_batch(coin, coin.sample(9, generator=torch.Generator().manual_seed(0)), 9)
        Traceback (most recent call last):
        mechcausal.tasks.checking.TaskError: Coin: tokens from 0 to 2, allowed are 0 to 1 (its ...
    """
    name, most, vocab = type(task).__name__, task.sequence_length, task.vocab_size
    if not isinstance(batch, Batch):
        raise TaskError(f"{name}: sample gave a {type(batch).__name__}, needed is a Batch")
    tokens, target, scored = batch.tokens, batch.target, batch.scored
    shape = tuple(tokens.shape)
    if len(shape) != 2 or shape[0] != n_sequences or not 1 <= shape[1] <= most:
        raise TaskError(
            f"{name}: tokens of shape {shape}, needed is ({n_sequences}, 1 to {most}), "
            "sequences by positions"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise TaskError(
            f"{name}: tokens from {low} to {high}, allowed are 0 to {vocab - 1} (its vocab_size)"
        )
    allowed = ((n_sequences, vocab), (*shape, vocab))
    if tuple(target.shape) not in allowed:
        raise TaskError(
            f"{name}: target of shape {tuple(target.shape)}, needed is {allowed[0]}, or "
            f"{allowed[1]} for labels at every position"
        )
    if scored is not None and (not batch.labels_positions or scored.shape != tokens.shape):
        raise TaskError(
            f"{name}: scored of shape {tuple(scored.shape)}: it goes with labels at every "
            f"position, and has the shape of the tokens, {shape}"
        )
    counted = target if scored is None else target[scored]
    if not len(counted):
        raise TaskError(f"{name}: no position is scored")
    total = counted.detach().double().sum(-1)
    if bool((counted < 0).any()) or not bool(((total - 1).abs() < 1e-4).all()):
        raise TaskError(f"{name}: a label is no distribution: not positive, or not of sum 1")


def check_prior(prior: object, vocab_size: int) -> None:
    """Check a prior of the user's own.

    Raises:
        PriorError: it is none, its matrices are no transition matrices, or of another vocabulary.

    Example:
        >>> from mechcausal.tasks.priors import DirichletPrior
        >>> check_prior(DirichletPrior.symmetric(0.1, vocab_size=3), 4)
        Traceback (most recent call last):
        mechcausal.tasks.priors.PriorError: DirichletPrior: of 3 tokens, but task.vocab_size is 4
    """
    name = type(prior).__name__
    if not isinstance(prior, Prior):
        raise PriorError(f"prior: a {name} has no vocab_size and sample")
    if prior.vocab_size != vocab_size:
        raise PriorError(
            f"{name}: of {prior.vocab_size} tokens, but task.vocab_size is {vocab_size}"
        )
    try:
        hash(prior)
    except TypeError:
        raise PriorError(f"{name}: not hashable; a frozen dataclass is") from None
    drawn = prior.sample(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if tuple(drawn.shape) != (3, vocab_size, vocab_size):
        raise PriorError(
            f"{name}: sample(3) has the shape {tuple(drawn.shape)}, "
            f"needed is {(3, vocab_size, vocab_size)}"
        )
    if drawn.dtype != torch.float64:
        raise PriorError(f"{name}: sample gave {drawn.dtype}, asked for torch.float64")
    if bool((drawn < 0).any()) or not bool(((drawn.sum(-1) - 1).abs() < 1e-5).all()):
        raise PriorError(f"{name}: a row of a drawn matrix is no distribution")
