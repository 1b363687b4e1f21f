"""Simplified models of equal size, trained as one: their closed form along a leading run axis.

With the matches `m_kb = A2[x_kb, q_b]`, `a = softmax(A1)`, `z = a m`, `p = softmax(z)` over
positions and the prediction `f_sb = sum_k p_kb [x_kb = s]`, the loss
`L = -mean_b sum_s y_sb log(f_sb + epsilon)` has the gradients

    w_sb  = dL/df_sb = -y_sb / (B (f_sb + epsilon))
    dz_kb = dL/dz_kb = p_kb (w[x_kb, b] - sum_s f_sb w_sb)
    dL/da_ik = sum_b dz_ib m_kb,       dL/dA1 = a (dL/da - its mean over the row under a)
    dL/dA2_xq = sum_b [q_b = q] sum_k [x_kb = x] sum_i a_ik dz_ib

which cost two products of T x T with T x B and three look-ups, for every run at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.models.simplified import SimplifiedTransformer
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

    prediction: Float[Tensor, "run vocab batch"]
    loss: Float[Tensor, "run"]
    attention1: Float[Tensor, "run query key"]
    attention2: Float[Tensor, "run pos batch"]
    matches: Float[Tensor, "run pos batch"]
    gradient: Float[Tensor, "run pos batch"]


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
        >>> batch = RunsBatch(tokens.T.repeat(2, 1, 1), torch.full((2, 3, 1), 1 / 3))
        >>> together = batched.closed_form(batch, epsilon=torch.zeros(2)).prediction
        >>> bool(torch.allclose(together[1].T, models[1](tokens)))
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
    def closed_form(self, batch: RunsBatch, *, epsilon: Float[Tensor, "run"]) -> ClosedForm:
        """Prediction, loss and the gradient at layer 2's scores, of every run."""
        tokens, target = batch.tokens, batch.target
        runs, _, n_sequences = tokens.shape
        smoothing = epsilon.view(runs, 1, 1)
        attention1 = self.attention1()
        matches = self._matches(tokens)
        attention2 = (attention1 @ matches).softmax(1)
        prediction = attention2.new_zeros(runs, self._vocab, n_sequences)
        prediction.scatter_add_(1, tokens, attention2)
        smoothed = prediction + smoothing
        loss = torch.log1p(self._vocab * epsilon) - (target * smoothed.log()).sum(1).mean(1)
        by_token = (target / smoothed).mul_(-1 / n_sequences)
        mean = (prediction * by_token).sum(1, keepdim=True)
        gradient = by_token.gather(1, tokens).sub_(mean).mul_(attention2)
        return ClosedForm(prediction, loss, attention1, attention2, matches, gradient)

    @torch.no_grad()
    def add_gradients(
        self, found: ClosedForm, batch: RunsBatch, names: Sequence[str], *, share: float = 1.0
    ) -> None:
        """Add the gradients of these parameters to those of the models, times `share`."""
        if "A1" in names:
            pattern = found.attention1
            upstream = found.gradient @ found.matches.mT
            centred = upstream - (upstream * pattern).sum(-1, keepdim=True)
            block = self._position_block(self._gradients["A1"])
            block.add_(pattern * centred, alpha=share)
        if "A2" in names:
            tokens, query = batch.tokens, batch.tokens[:, -1]
            reached = found.attention1.mT @ found.gradient
            by_copy = torch.zeros_like(found.prediction).scatter_add_(1, tokens, reached)
            vocab = torch.arange(self._vocab, device=tokens.device).view(-1, 1)
            asked = (query.unsqueeze(1) == vocab).to(by_copy.dtype)
            block = self._token_block(self._gradients["A2"])
            block.add_(by_copy @ asked.mT, alpha=share)

    def zero_gradients(self) -> None:
        """Set the gradients of all models to 0."""
        for gradient in self._gradients.values():
            gradient.zero_()

    def gradients_are_finite(self) -> bool:
        """Whether no gradient of any model is NaN or infinite."""
        return all(bool(gradient.isfinite().all()) for gradient in self._gradients.values())

    def attention1(self) -> Float[Tensor, "run query key"]:
        """Layer 1's attention patterns, the same for every sequence of a run."""
        return self.A1.masked_fill(self._future, -math.inf).softmax(-1)

    def layer2_attention(
        self, tokens: Int[Tensor, "run batch pos"]
    ) -> Float[Tensor, "run batch query key"]:
        """Layer 2's patterns of every query, on sequences that may be shorter."""
        length = tokens.shape[2]
        one_hot = torch.nn.functional.one_hot(tokens, self._vocab).to(self.A1.dtype)
        future = self._future[:length, :length]
        first = self.A1[:, :length, :length].masked_fill(future, -math.inf).softmax(-1)
        copied = first.unsqueeze(1) @ one_hot
        scores = one_hot @ self.A2.mT.unsqueeze(1) @ copied.mT
        return scores.masked_fill(future, -math.inf).softmax(-1)

    def _matches(self, tokens: Int[Tensor, "run pos batch"]) -> Float[Tensor, "run pos batch"]:
        query = tokens[:, -1:].expand(-1, self._vocab, -1)
        return self.A2.gather(2, query).gather(1, tokens)

    def _position_block(self, weight: Tensor) -> Tensor:
        s, t = self._vocab, self._length
        return weight[:, 0, s : s + t, :t]

    def _token_block(self, weight: Tensor) -> Tensor:
        s = self._vocab
        return weight[:, 0, :s, :s].mT
