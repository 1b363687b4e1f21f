"""Simplified models of equal size, trained as one: their closed form along a leading run axis.

With the matches `m_bk = A2[x_bk, q_b]`, `a = softmax(A1)`, `z = m a^T`, `p = softmax(z)` and the
prediction `f_bs = sum_k p_bk [x_bk = s]`, the loss `L = -mean_b sum_s y_bs log(f_bs + epsilon)` has
the gradients

    w_bs  = dL/df_bs = -y_bs / (B (f_bs + epsilon)),  0 where y_bs = 0
    dz_bk = dL/dz_bk = p_bk (w[b, x_bk] - sum_j p_bj w[b, x_bj])
    dL/da = dz^T m,     dL/dA1 = a (dL/da - its mean over the row under a)
    dL/dA2_xq = sum_bk [x_bk = x] [q_b = q] (dz a)_bk

The operations are those of `SimplifiedTransformer` and of its backward pass: every run gets the
gradients that it would get alone, up to the rounding of matrix products of another size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.tasks.base import to_score
from mechcausal.tasks.batched import RunsBatch


@dataclass(frozen=True)
class ClosedForm:
    """What one pass of the closed form computes, by the names of this module's equations.

    Attributes:
        prediction: f.
        loss: of every run, mean over its sequences, nats; normalised as `soft_cross_entropy`.
        attention1: a, layer 1's pattern.
        attention2: p, the pattern of the query in layer 2.
        matches: m.
        gradient: dz, with respect to layer 2's scores of the query.
    """

    prediction: Float[Tensor, "run batch vocab"]
    loss: Float[Tensor, "run"]
    attention1: Float[Tensor, "run query key"]
    attention2: Float[Tensor, "run batch pos"]
    matches: Float[Tensor, "run batch pos"]
    gradient: Float[Tensor, "run batch pos"]


class BatchedSimplified:
    """Simplified models whose parameters lie in one block of memory, one run after another.

    Each model goes on owning its parameters: they become views of the block, so that hooks,
    optimizers and files see what is trained here.

    Example:
        >>> models = [SimplifiedTransformer(3, 6) for _ in range(2)]
        >>> for number, model in enumerate(models):
        ...     model.initialise(beta0=1.0 + number)
        >>> batched = BatchedSimplified(models)
        >>> tokens = torch.tensor([[0, 1, 2, 0, 1, 0]])
        >>> batch = RunsBatch(tokens.repeat(2, 1, 1), torch.full((2, 1, 3), 1 / 3))
        >>> together = batched.closed_form(batch, epsilon=torch.zeros(2)).prediction
        >>> torch.equal(together[1], models[1](tokens))
        True
    """

    def __init__(self, models: Sequence[SimplifiedTransformer]) -> None:
        """Gather the parameters of the models, which must be of equal size and on one device."""
        first = models[0]
        self._vocab, self._length = first.vocab_size, first.sequence_length
        self._weights: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        for name in first.parameters_by_name:
            parameters = [model.parameters_by_name[name] for model in models]
            block = torch.stack([parameter.detach() for parameter in parameters])
            gradients = torch.zeros_like(block)
            for parameter, weight, gradient in zip(parameters, block, gradients, strict=True):
                parameter.data, parameter.grad = weight, gradient
            self._weights[name], self._gradients[name] = block, gradients
        size, device = (self._length, self._length), self._weights["A1"].device
        self._future = torch.ones(size, dtype=torch.bool, device=device).triu(1)

    @property
    def A1(self) -> Float[Tensor, "run query key"]:
        """Layer 1's blocks, a view."""
        return self._position_block(self._weights["A1"])

    @property
    def A2(self) -> Float[Tensor, "run vocab vocab"]:
        """Layer 2's blocks, a view: [copied token, query token]."""
        return self._token_block(self._weights["A2"])

    @torch.no_grad()
    def closed_form(
        self, batch: RunsBatch, *, epsilon: Float[Tensor, "run"], share: float = 1.0
    ) -> ClosedForm:
        """Prediction, loss and the gradient at layer 2's scores, of every run.

        Args:
            batch: of all runs.
            epsilon: of each run.
            share: factor of the gradient.
        """
        tokens, target = batch.tokens, batch.target
        runs, n_sequences, _ = tokens.shape
        attention1, matches = self.attention1(), self._matches(tokens)
        attention2 = (matches @ attention1.mT).softmax(-1)
        prediction = attention2.new_zeros(runs, n_sequences, self._vocab)
        prediction.scatter_add_(2, tokens, attention2)
        smoothed = to_score(prediction, target, epsilon.view(runs, 1, 1))
        loss = torch.log1p(self._vocab * epsilon) - (target * smoothed.log()).sum(-1).mean(-1)
        by_token = target * -(epsilon.new_tensor(share) / n_sequences) / smoothed
        gradient = through_softmax(by_token.gather(2, tokens), attention2)
        return ClosedForm(prediction, loss, attention1, attention2, matches, gradient)

    @torch.no_grad()
    def add_gradients(self, found: ClosedForm, batch: RunsBatch, names: Sequence[str]) -> None:
        """Add the gradients of these parameters to those of the models."""
        if "A1" in names:
            upstream = found.gradient.mT @ found.matches
            block = self._position_block(self._gradients["A1"])
            block.add_(through_softmax(upstream, found.attention1))
        if "A2" in names:
            upstream = found.gradient @ found.attention1
            runs, vocab = len(upstream), self._vocab
            cells = (batch.tokens * vocab + batch.tokens[:, :, -1:]).view(runs, -1)
            total = upstream.new_zeros(runs, vocab**2)
            total.scatter_add_(1, cells, upstream.view(runs, -1))
            block = self._token_block(self._gradients["A2"])
            block.add_(total.view(runs, vocab, vocab))

    def zero_gradients(self) -> None:
        """Set the gradients of all models to 0."""
        for gradient in self._gradients.values():
            gradient.zero_()

    def gradients_are_finite(self) -> bool:
        """Whether no gradient of any model is NaN or infinite."""
        return all(bool(gradient.isfinite().all()) for gradient in self._gradients.values())

    @torch.no_grad()
    def descend(
        self,
        names: Sequence[str],
        *,
        rates: Float[Tensor, "run"],
        weight_decay: Float[Tensor, "run"],
    ) -> None:
        """A step of gradient descent, as `torch.optim.SGD` takes it for each model."""
        shape = (-1, 1, 1, 1)
        for name in names:
            weights, gradients = self._weights[name], self._gradients[name]
            if bool(weight_decay.any()):
                gradients = gradients.addcmul(weights, weight_decay.view(shape))
            weights.addcmul_(gradients, -rates.view(shape))

    def attention1(self) -> Float[Tensor, "run query key"]:
        """Layer 1's attention patterns, the same for every sequence of a run."""
        return self.A1.masked_fill(self._future, -math.inf).softmax(-1)

    def _matches(self, tokens: Int[Tensor, "run batch pos"]) -> Float[Tensor, "run batch pos"]:
        runs = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
        by_copy = self.A2.mT[runs, tokens[:, :, -1]]
        return by_copy.gather(2, tokens)

    def _position_block(self, weight: Tensor) -> Tensor:
        s, t = self._vocab, self._length
        return weight[:, 0, s : s + t, :t]

    def _token_block(self, weight: Tensor) -> Tensor:
        s = self._vocab
        return weight[:, 0, :s, :s].mT


def through_softmax(gradient: Tensor, pattern: Tensor) -> Tensor:
    """The gradient before a softmax over the last axis, from that after it."""
    backward: Any = torch.ops.aten._softmax_backward_data
    before: Tensor = backward(gradient, pattern, -1, pattern.dtype)
    return before
