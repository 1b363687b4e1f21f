"""Observe a simplified model in closed form: the readings of the hooks, several times faster.

Layer 1's pattern is a, m_bk is the match of the token at k with the query of sequence b, and layer
2's scores in the query's row are `z = m a^T`. With the gradient dz of the loss, sequence b has at
layer 1's pattern the gradient `G_ik = dz_bi m_bk`. So its sums over sequences are products of
matrices, and so are those of the squares of the centred `dz_bi (m_bk - mean over j <= i of m_bj)`.
What passes through layer 1's softmax is computed for each sequence, in the hooked model's precision
and order of operations: where attention has saturated these gradients are differences of almost
equal numbers, and their ranks would show every other rounding. On long sequences that takes
minutes, and all of it is summed in float64 instead.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mechcausal.measures.metrics import induction_keys
from mechcausal.measures.observation import Observation
from mechcausal.measures.observer import Observer, ProbeReadings
from mechcausal.models.simplified import SimplifiedTransformer, causal_softmax
from mechcausal.tasks import soft_cross_entropy
from probes import prefix_matching_score
from probes.heads.scores import mean_weights

# Limit on the entries of a per-sequence gradient; larger evaluation batches are split.
_MAX_ENTRIES = 4_000_000
# Attention entries of the whole evaluation batch; where there are more, sequences are summed.
_MOST_ENTRIES = 200_000_000


class ClosedFormObserver(Observer):
    """An `Observer` of a simplified model that attaches no hooks and gives the same figures.

    Figures agree to 1e-6, except ranks of values that are equal up to rounding.
    """

    model: SimplifiedTransformer

    def __init__(self, model: SimplifiedTransformer, *args: Any, **options: Any) -> None:
        """Take the arguments of `Observer`."""
        super().__init__(model, *args, **options)
        area = model.sequence_length**2
        self._at_once = max(1, _MAX_ENTRIES // area)
        self._is_long = len(self.batch) * area > _MOST_ENTRIES
        # With these the query's attention adds up to the induction score; NaN: it has none.
        keys = induction_keys(self.batch.tokens, self.task.graph)
        self._weights = mean_weights(keys.unsqueeze(1)).squeeze(1)

    @torch.no_grad()
    def observe(self) -> Observation:
        """Compute all readings in closed form; those of a clamped model through hooks."""
        if self.model.is_clamped:
            with torch.enable_grad():
                return super().observe()
        model, total = self.model, len(self.batch)
        attention1 = model.attention1()
        rows = max(self._at_once, 128) if self._is_long else self._at_once
        predictions, induction, sums = [], [], _Sums(attention1, by_sequence=not self._is_long)
        for start in range(0, total, rows):
            part = self.batch[start : start + rows]
            scores = self._query_scores(attention1, part.tokens).requires_grad_()
            with torch.enable_grad():
                attention2 = scores.softmax(-1)
                zeros = attention2.new_zeros(len(part), model.vocab_size)
                prediction = zeros.scatter_add(1, part.tokens, attention2)
                loss = soft_cross_entropy(prediction, part.target, epsilon=self.epsilon)
                (gradient,) = torch.autograd.grad(loss * (len(part) / total), scores)
            attention2, prediction = attention2.detach(), prediction.detach()
            sums.add(gradient, self._by_query(part.tokens).gather(1, part.tokens))
            predictions.append(prediction)
            induction.append((attention2 * self._weights[start : start + rows]).sum(-1))
        scores, pattern, stderr = sums.gradients()
        matching = [
            prefix_matching_score(self._attention2(tokens).unsqueeze(1), tokens)
            for tokens in self.repeated.split(self._at_once)
        ]
        readings = ProbeReadings(
            attention=attention1.unsqueeze(0).cpu(),
            scores=-scores.unsqueeze(0).cpu(),
            pattern=-pattern.unsqueeze(0).cpu(),
            pattern_stderr=stderr.unsqueeze(0).cpu(),
            induction=torch.cat(induction).nanmean().view(1),
            matching=torch.cat(matching).nanmean(0),
            examples=self._query_scores(attention1, self.examples).softmax(-1).unsqueeze(1).cpu(),
            prediction=torch.cat(predictions),
        )
        return self.figures_of(readings)

    def _by_query(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch vocab"]:
        """The match of each copied token with the query."""
        return self.model.A2.T[tokens[:, -1]]

    def _query_scores(
        self, attention1: Float[Tensor, "query key"], tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos"]:
        """Layer 2's scores in the last row, computed from keys and queries as the hooked model."""
        if self._is_long:
            return self._by_query(tokens).gather(1, tokens) @ attention1.T
        vocab, length = self.model.vocab_size, self.model.sequence_length
        padding = (0, max(length - vocab, 0))  # d_head
        copied = attention1 @ F.one_hot(tokens, vocab).to(attention1.dtype)
        queries = F.pad(self._by_query(tokens), padding).unsqueeze(1).expand(-1, length, -1)
        return (queries @ F.pad(copied, padding).mT)[:, -1]

    def _attention2(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch query key"]:
        """Layer 2's full patterns, also for sequences shorter than the model's."""
        length = tokens.shape[1]
        one_hot = F.one_hot(tokens, self.model.vocab_size).to(self.model.A1.dtype)
        first = causal_softmax(self.model.A1[:length, :length])
        return causal_softmax(one_hot @ self.model.A2.T @ (first @ one_hot).mT)


class _Sums:
    """Sums over sequences of the gradients on layer 1, in float64 like those of the probes."""

    def __init__(self, attention1: Float[Tensor, "query key"], *, by_sequence: bool) -> None:
        self._attention1 = attention1
        self._by_sequence = by_sequence
        length = len(attention1)
        self._n_sequences = 0
        self._n_keys = torch.arange(1, length + 1, device=attention1.device)
        zeros = attention1.new_zeros(length, length, dtype=torch.float64)
        self._scores, self._pattern, self._squares = zeros, zeros, zeros

    def add(
        self, gradient: Float[Tensor, "batch pos"], matches: Float[Tensor, "batch pos"]
    ) -> None:
        """Take in sequences: dz and m."""
        if self._by_sequence:
            upstream = gradient.unsqueeze(2) * matches.unsqueeze(1)
            through = _through_softmax(upstream, self._attention1).sum(0, dtype=torch.float64)
        else:
            upstream = gradient.double().T @ matches.double()
            through = _through_softmax(upstream, self._attention1.double())
        self._scores = self._scores + through
        self._n_sequences += len(gradient)
        gradient, matches = gradient.double(), matches.double()
        mean = matches.cumsum(1) / self._n_keys  # over the keys that query i sees
        centre = (gradient * mean).sum(0).unsqueeze(1)
        self._pattern = self._pattern + gradient.T @ matches - centre
        square = gradient.square()
        centre = (square * mean.square()).sum(0).unsqueeze(1)
        cross = square.T @ matches.square() - 2 * (square * mean).T @ matches
        self._squares = self._squares + cross + centre

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients on the scores and on the centred pattern, and the latter's standard error."""
        pattern, squares = self._pattern.tril(), self._squares.tril()
        spread = (self._n_sequences * squares - pattern.square()).clamp(min=0)
        stderr = (spread / (self._n_sequences - 1)).sqrt()
        dtype = self._attention1.dtype
        return self._scores.to(dtype), pattern.to(dtype), stderr.to(dtype)


def _through_softmax(
    gradient: Float[Tensor, "*batch query key"], pattern: Float[Tensor, "query key"]
) -> Float[Tensor, "*batch query key"]:
    """The gradient on the scores from that on the pattern, as `AttentionGradient` computes it."""
    weighted = pattern * gradient
    return weighted - pattern * weighted.sum(-1, keepdim=True)
