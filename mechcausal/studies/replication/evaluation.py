"""Compare trained models with Bayes on fresh sequences."""

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.studies.replication.runs import Run
from mechcausal.tasks import Batch, GraphTask, SingleParentTask, cross_entropies
from mechcausal.tasks.predictors import bayes_prediction, bigram_prediction
from mechcausal.tasks.priors import DirichletPrior

SEED = 20_240_221  # for evaluation; no run uses it
_CHUNK = 2048


def fresh_batch(run: Run, factor: int) -> Batch:
    """Sequences of the run's task that were used neither in training nor at probe steps.

    Args:
        run: the run.
        factor: number of sequences, in evaluation batches of the run.
    """
    return _fresh_batch(run.task, factor * run.recipe.evaluation.n_sequences, run.recipe.device)


def precise(quick: bool) -> int:
    """The `factor` of `fresh_batch` for losses that are compared with Bayes."""
    return 4 if quick else 16


@torch.no_grad()
def losses(run: Run, factor: int) -> dict[str, Float[Tensor, "batch"]]:
    """Cross entropy in nats of every sequence of `fresh_batch`, by predictor: "model" and "bayes".

    A single-parent task adds "miscounted", the authors' Bayes predictor, and "counted", the same
    predictor with correctly counted roots (`bigram_prediction`).
    """
    recipe, batch = run.recipe, fresh_batch(run, factor)
    prediction = torch.cat([run.model(part) for part in batch.tokens.split(_CHUNK)])
    model = cross_entropies(prediction, batch.target, epsilon=recipe.training.epsilon)
    draws, device = recipe.evaluation.bayes_draws, recipe.device
    return {"model": model, **_references(run.task, len(batch), draws, device)}


def mean_attention(run: Run) -> Float[Tensor, "head query key"]:
    """Layer 1's attention, averaged over fresh sequences."""
    return run.model.layer1_attention(fresh_batch(run, 1).tokens).mean(0)


@lru_cache(maxsize=8)
def _fresh_batch(task: GraphTask, n_sequences: int, device: str) -> Batch:
    generator = torch.Generator(device=device).manual_seed(SEED)
    return task.sample(n_sequences, generator=generator)


@lru_cache(maxsize=32)  # runs on the same graph share these
def _references(task: GraphTask, n_sequences: int, n_draws: int, device: str) -> dict[str, Tensor]:
    batch = _fresh_batch(task, n_sequences, device)
    generator = torch.Generator(device=device).manual_seed(SEED + 1)
    predictions = {
        "bayes": bayes_prediction(task, batch.tokens, generator=generator, n_draws=n_draws)
    }
    if isinstance(task, SingleParentTask) and isinstance(task.prior, DirichletPrior):
        predictions["miscounted"] = miscounted_prediction(task, batch.tokens)
        predictions["counted"] = bigram_prediction(task, batch.tokens)
    return {name: cross_entropies(p, batch.target) for name, p in predictions.items()}


def miscounted_prediction(
    task: SingleParentTask, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch vocab"]:
    """The Bayes predictor with the counting error of the authors' code.

    It adds alpha to the counts of the query token's successors, but treats the parent index -1 of
    a root as the last position of the graph, so each root counts as a successor of that position.
    The loss that the paper plots as Bayes is therefore above the true Bayes loss.
    """
    context = tokens[:, :-1]
    parents = torch.tensor(task.graph.parent_array(), device=tokens.device)
    same = context[:, parents] == tokens[:, -1:]  # index -1 selects the last position
    counts = torch.zeros(len(tokens), task.vocab_size, device=tokens.device)
    counts.scatter_add_(1, context, same.to(counts.dtype))
    assert isinstance(task.prior, DirichletPrior)  # `_references` checks it
    weights = counts + torch.tensor(task.prior.representable, device=tokens.device)
    return weights / weights.sum(-1, keepdim=True)
