"""Looks at many simplified models at once, in closed form: the readings that hooks would give.

Each run's own `Observer` drew its evaluation sequences and makes the figures; only the passes
through the hooked model are replaced. With m, a, p and dz of `batched_simplified`, sequence b has at
layer 1's pattern the gradient `G_ik = dz_ib m_kb`, so its sums over sequences are products of
matrices; the sums are taken in float64, as the probes take them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.experiments import Observation
from mechcausal.metrics import induction_mask
from mechcausal.models.batched_simplified import BatchedSimplified, ClosedForm
from mechcausal.observer import Look, Observer
from mechcausal.tasks.batched import RunsBatch
from probes import prefix_matching_score
from probes.scores import mean_weights


class BatchedObserver:
    """Looks at the same sequences of every run again and again."""

    def __init__(self, model: BatchedSimplified, observers: Sequence[Observer]) -> None:
        """Gather the evaluation sequences.

        Args:
            model: looked at, never changed.
            observers: of its runs, with equally many sequences.
        """
        self._model = model
        self._observers = list(observers)
        tokens = torch.stack([o.batch.tokens for o in observers])
        target = torch.stack([o.batch.target for o in observers])
        self._batch = RunsBatch(tokens.mT.contiguous(), target.mT.contiguous())
        self._repeated = torch.stack([o.repeated for o in observers])
        self._epsilon = torch.tensor([o.epsilon for o in observers], device=tokens.device)
        self._weights = torch.stack([_last_row_weights(observer) for observer in observers])

    @torch.no_grad()
    def observe(self) -> list[Observation]:
        """One look at every run, as `Observer.observe`."""
        found = self._model.closed_form(self._batch, epsilon=self._epsilon)
        scores, pattern, stderr = _gradients(found)
        induction = (found.attention2 * self._weights).sum(1).nanmean(-1)
        attention = self._model.layer2_attention(self._repeated)
        looks = zip(
            self._observers,
            found.attention1.cpu(),
            scores.cpu(),
            pattern.cpu(),
            stderr.cpu(),
            induction,
            attention,
            found.prediction,
            strict=True,
        )
        observations = []
        for observer, first, by_scores, by_pattern, spread, score, second, prediction in looks:
            matching = prefix_matching_score(second.unsqueeze(1), observer.repeated).nanmean(0)
            look = Look(
                attention=first.unsqueeze(0),
                scores=-by_scores.unsqueeze(0),
                pattern=-by_pattern.unsqueeze(0),
                pattern_stderr=spread.unsqueeze(0),
                induction=score.unsqueeze(0),
                matching=matching,
                prediction=prediction.T.contiguous(),
            )
            observations.append(observer.figures_of(look))
        return observations


def _gradients(found: ClosedForm) -> tuple[Tensor, Tensor, Tensor]:
    """At layer 1, by run, query and key: of the scores, of the centred pattern, its error.

    The centred gradient of a sequence is `dz_ib (m_kb - its mean over k <= i)`; its square is a
    sum of three products, of which each is again one of matrices.
    """
    gradient, matches = found.gradient.double(), found.matches.double()
    attention = found.attention1.double()
    n_sequences, length = matches.shape[2], matches.shape[1]
    n_keys = torch.arange(1, length + 1, device=matches.device).unsqueeze(1)
    mean = matches.cumsum(1) / n_keys  # of the keys that query i sees
    total = gradient @ matches.mT
    visible = torch.ones_like(total).tril()
    scores = attention * (total - (total * attention).sum(-1, keepdim=True))
    pattern = (total - (gradient * mean).sum(-1, keepdim=True)) * visible
    square = gradient.square()
    squares = square @ matches.square().mT - 2 * (square * mean) @ matches.mT
    squares = (squares + (square * mean.square()).sum(-1, keepdim=True)) * visible
    spread = (n_sequences * squares - pattern.square()).clamp(min=0) / (n_sequences - 1)
    dtype = found.gradient.dtype
    return scores.to(dtype), pattern.to(dtype), spread.sqrt().to(dtype)


def _last_row_weights(observer: Observer) -> Float[Tensor, "pos batch"]:
    """With which weights the query's attention adds up to the induction score; NaN: it has none."""
    mask = induction_mask(observer.batch.tokens, observer.task.graph)
    return mean_weights(mask)[:, -1].T
