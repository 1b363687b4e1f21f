"""The closed form of several simplified models of equal size, with a leading run axis.

With the matches `m_bk = A2[x_bk, q_b]`, `a = softmax(A1)`, `z = m a^T`, `p = softmax(z)` and the
prediction `f_bs = sum_k p_bk [x_bk = s]`, the loss `L = -mean_b sum_s y_bs log(f_bs + epsilon)` has
the gradients

    w_bs  = dL/df_bs = -y_bs / (B (f_bs + epsilon)),  0 where y_bs = 0
    dz_bk = dL/dz_bk = p_bk (w[b, x_bk] - sum_j p_bj w[b, x_bj])
    dL/da = dz^T m,     dL/dA1 = a (dL/da - its mean over the row under a)
    dL/dA2_xq = sum_bk [x_bk = x] [q_b = q] (dz a)_bk

The operations are those of `SimplifiedTransformer` and its backward pass, so every run gets the
same gradients as on its own, up to rounding.
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
    """The results of one pass of the closed form; symbols as in the module's equations.

    Attributes:
        prediction: f.
        loss: `soft_cross_entropy` of every run, in nats.
        attention1: a, layer 1's pattern.
        attention2: p, the query's row of layer 2's pattern.
        matches: m.
        gradient: dz, the gradient of the loss on the query's row of layer 2's scores.
    """

    prediction: Float[Tensor, "run batch vocab"]
    loss: Float[Tensor, "run"]
    attention1: Float[Tensor, "run query key"]
    attention2: Float[Tensor, "run batch pos"]
    matches: Float[Tensor, "run batch pos"]
    gradient: Float[Tensor, "run batch pos"]


class BatchedSimplified:
    """Simplified models whose parameters share one tensor with a leading run axis.

    Each model keeps its parameters, which become views of the shared tensor: hooks, optimizers and
    `save` see the weights trained here.

    Example:
        >>> models = [SimplifiedTransformer(3, 6) for _ in range(2)]
        >>> for number, model in enumerate(models):
        ...     model.initialise(beta0=1.0 + number)
        >>> batched = BatchedSimplified(models)
        >>> tokens = torch.tensor([[0, 1, 2, 0, 1, 0]])
        >>> batch = RunsBatch(tokens.repeat(2, 1, 1), torch.full((2, 1, 3), 1 / 3))
        >>> predictions = batched.closed_form(batch, epsilon=torch.zeros(2)).prediction
        >>> torch.equal(predictions[1], models[1](tokens))
        True
    """

    def __init__(self, models: Sequence[SimplifiedTransformer]) -> None:
        """Join the parameters of the models, which must have equal sizes and share a device."""
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
        """A1 of every run, a view."""
        return self._position_block(self._weights["A1"])

    @property
    def A2(self) -> Float[Tensor, "run vocab vocab"]:
        """A2 of every run, a view: [copied token, query token]."""
        return self._token_block(self._weights["A2"])

    @torch.no_grad()
    def closed_form(
        self, batch: RunsBatch, *, epsilon: Float[Tensor, "run"], share: float = 1.0
    ) -> ClosedForm:
        """Prediction, loss and the gradient on layer 2's scores, for every run.

        Args:
            batch: the sequences of all runs.
            epsilon: smoothing of predictions, for each run.
            share: factor applied to the gradient.
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
    def add_gradients(self, result: ClosedForm, batch: RunsBatch, names: Sequence[str]) -> None:
        """Accumulate the gradients of the named parameters in the models' `.grad`."""
        if "A1" in names:
            upstream = result.gradient.mT @ result.matches
            block = self._position_block(self._gradients["A1"])
            block.add_(through_softmax(upstream, result.attention1))
        if "A2" in names:
            upstream = result.gradient @ result.attention1
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
        """One step of gradient descent, equal to `torch.optim.SGD` for each model."""
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
    """Backpropagate a gradient through a softmax over the last axis, given the softmax's output."""
    backward: Any = torch.ops.aten._softmax_backward_data
    input_gradient: Tensor = backward(gradient, pattern, -1, pattern.dtype)
    return input_gradient
