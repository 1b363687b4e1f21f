"""The kinds of clamps: which weights of an attention pattern are held, and at what."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from probes.intervening.attention_edits import knock_out
from probes.reading.errors import ProbeError


class Clamp(ABC):
    """An edit of attention that can be checked against a model.

    Attributes:
        head: the head that it holds; None for all.
    """

    head: int | None

    @abstractmethod
    def __call__(
        self, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """The pattern with some of its weights held."""

    @abstractmethod
    def n_positions(self) -> int:
        """The length of the shortest sequence that has all its positions."""

    def looks_ahead(self) -> tuple[int, int] | None:
        """A (query, key) with the key after the query; None if there is none."""
        return None

    def check(self, layer: int, n_heads: int, n_positions: int) -> None:
        """Check heads and positions.

        Raises:
            ValueError: the layer lacks the head, or the model's context a position.
        """
        if self.head is not None and not 0 <= self.head < n_heads:
            raise ValueError(
                f"head {self.head} does not exist: layer {layer} has {n_heads} heads, "
                f"0 to {n_heads - 1}"
            )
        if self.n_positions() > n_positions:
            raise ValueError(
                f"the clamp of layer {layer} has position {self.n_positions() - 1}, "
                f"the model's context 0 to {n_positions - 1}"
            )


class Fixed(Clamp):
    """Rows held at `weights` [head or 1, query, key]; rows of zeros are free."""

    def __init__(self, weights: Float[Tensor, "head query key"], head: int | None) -> None:
        self.weights = weights
        self.head = head

    def __call__(
        self, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """The pattern with the rows of `weights`; ProbeError if they do not fit."""
        length, size = _length(pattern), self.weights.shape[-1]
        weights = self.weights[:, :length]
        if weights[..., length:].any():
            raise ProbeError(
                f"the clamp's rows attend beyond the {length} positions of this pass, to up to "
                f"{size}"
            )
        missing = max(length - size, 0)
        return _held(pattern, F.pad(weights[..., :length], (0, missing, 0, missing)), self.head)

    def n_positions(self) -> int:
        """The side of `weights`."""
        return self.weights.shape[-1]

    def looks_ahead(self) -> tuple[int, int] | None:
        """The first weight on a key after its query."""
        ahead = self.weights.sum(0).triu(1).nonzero()
        return None if not len(ahead) else (int(ahead[0, 0]), int(ahead[0, 1]))

    def check(self, layer: int, n_heads: int, n_positions: int) -> None:
        """As `Clamp.check`, and the number of heads."""
        super().check(layer, n_heads, n_positions)
        if len(self.weights) > n_heads:
            raise ValueError(
                f"the clamp of layer {layer} has patterns for {len(self.weights)} heads, the layer "
                f"{n_heads}"
            )


class Previous(Clamp):
    """Rows held at the key before."""

    def __init__(self, head: int | None) -> None:
        self.head = head

    def __call__(
        self, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """The pattern with every row but the first one-hot on the key before."""
        ones = torch.ones(_length(pattern) - 1, device=pattern.device)
        return _held(pattern, ones.diag(-1).unsqueeze(0), self.head)

    def n_positions(self) -> int:
        """0: it fits every length."""
        return 0


class Forbidden(Clamp):
    """Pairs (query, key) held at 0."""

    def __init__(self, pairs: Sequence[tuple[int, int]], head: int | None) -> None:
        knock_out(pairs, head)  # checks their order
        for query in sorted({query for query, _ in pairs}):
            if len({key for row, key in pairs if row == query}) > query:
                raise ValueError(f"every key of query {query} is forbidden: one has to stay")
        self.pairs = tuple(pairs)
        self.head = head

    def __call__(
        self, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """The pattern without the pairs that are in it."""
        length = _length(pattern)
        pairs = [pair for pair in self.pairs if pair[0] < length]
        return knock_out(pairs, self.head)(pattern)

    def n_positions(self) -> int:
        """One more than the last query."""
        return 1 + max((query for query, _ in self.pairs), default=-1)


def _held(
    pattern: Float[Tensor, "batch head query key"],
    weights: Float[Tensor, "held_head query key"],
    head: int | None,
) -> Float[Tensor, "batch head query key"]:
    """The pattern with the rows of `weights` that are not all 0, in one head or all."""
    n_heads = pattern.shape[1]
    if len(weights) > n_heads:
        raise ProbeError(
            f"a clamp with patterns for {len(weights)} heads meets one of {n_heads} heads"
        )
    if len(weights) > 1:  # further heads are free
        weights = F.pad(weights, (0, 0, 0, 0, 0, n_heads - len(weights)))
    weights = weights.to(pattern)
    is_held = weights.any(-1, keepdim=True)
    if head is not None:
        heads = torch.arange(n_heads, device=pattern.device)
        is_held = is_held & (heads == head).view(-1, 1, 1)
    return torch.where(is_held, weights, pattern)


def _length(pattern: Tensor) -> int:
    n_queries, n_keys = pattern.shape[-2:]
    if n_queries != n_keys:
        raise ProbeError(
            f"a pass of {n_queries} queries over {n_keys} keys: clamps need whole sequences, "
            "without a cache of keys"
        )
    return n_keys
