"""Sequences that a random grammar writes down a binary tree, and exact inference on that tree.

A symbol at an inner node chooses the ordered pair of its children's symbols, level by level; the
leaves are the tokens. A *filter* at level k keeps the correlations below that level only: the 2^k
nodes there are independent given the root. Filter 0 is the full tree, filter `depth` leaves tokens
that are independent given the root. Belief propagation gives every posterior exactly.

Source: Garnier-Brun, Mezard, Moscato and Saglietti, ICML 2025 (arXiv 2408.15138).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.tasks.sequences import draw_rows

MAX_LEAVES = 1024


class HierarchyError(ValueError):
    """A grammar or a tree that makes no sense; the message is one line for the user."""


@dataclass(frozen=True, eq=False)
class Grammar:
    """Rules that replace a symbol by an ordered pair of symbols.

    Attributes:
        rules: `M[a, b, c]`, the probability that a symbol a has the children b and c.

    Raises:
        HierarchyError: not q x q x q with q >= 2, or a symbol's rules do not sum to 1.

    Example:
        >>> grammar = Grammar.random(4, generator=torch.Generator().manual_seed(0))
        >>> (grammar.rules > 0).sum((1, 2)).tolist()
        [4, 4, 4, 4]
    """

    rules: Float[Tensor, "symbol left right"]

    def __post_init__(self) -> None:
        shape = tuple(self.rules.shape)
        if len(shape) != 3 or len(set(shape)) != 1 or shape[0] < 2:
            raise HierarchyError(f"rules have the shape {shape}; needed: q x q x q, q at least 2")
        sums = self.rules.sum((1, 2))
        if bool((self.rules < 0).any()) or not torch.allclose(sums, torch.ones_like(sums)):
            raise HierarchyError(f"the rules of each symbol must sum to 1, found {sums.tolist()}")

    @classmethod
    def random(cls, n_symbols: int, *, generator: torch.Generator, sigma: float = 1.0) -> "Grammar":
        """A random grammar in which a pair of children names its parent.

        The q² ordered pairs are dealt at random, q to each symbol; the probabilities of a symbol's
        pairs are the softmax of `sigma` times standard normal numbers.

        Args:
            n_symbols: q.
            generator: on the CPU.
            sigma: spread of the logits; 0 makes all pairs of a symbol equally likely.
        """
        q = n_symbols
        if q < 2:
            raise HierarchyError(f"a grammar needs at least 2 symbols, found {q}")
        if not 0 <= sigma < float("inf"):
            raise HierarchyError(f"sigma is {sigma}; allowed: 0 or more")
        pairs = torch.randperm(q * q, generator=generator).view(q, q)
        logits = sigma * torch.randn(q, q, generator=generator, dtype=torch.float64)
        rules = torch.zeros(q, q * q, dtype=torch.float64)
        rules.scatter_(1, pairs, logits.softmax(1))
        return cls(rules.view(q, q, q))

    @property
    def n_symbols(self) -> int:
        """Number of symbols q."""
        return len(self.rules)

    def descent(self, level: int) -> Float[Tensor, "node symbol symbol"]:
        """`P_j[a, b]`: the probability of symbol b at node j of a level, given the root's symbol a.

        It is the product of left and right steps on the path from the root, where
        `M_L[a, b] = Σ_c M[a, b, c]` and `M_R[a, c] = Σ_b M[a, b, c]`.
        """
        steps = torch.stack([self.rules.sum(2), self.rules.sum(1)])
        paths = torch.eye(self.n_symbols, dtype=self.rules.dtype).unsqueeze(0)
        for _ in range(level):
            paths = (paths.unsqueeze(1) @ steps).flatten(0, 1)
        return paths


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Trees of a grammar, all of one depth and one filter.

    Attributes:
        grammar: the rules.
        depth: levels below the root; a sequence has `2**depth` tokens.
        filter: the level whose nodes are independent given the root: 0 for the full tree.

    Raises:
        HierarchyError: a depth below 1 or above 10, or a filter outside of 0 ... depth.
    """

    grammar: Grammar
    depth: int
    filter: int = 0

    def __post_init__(self) -> None:
        if self.depth < 1 or 2**self.depth > MAX_LEAVES:
            raise HierarchyError(
                f"depth is {self.depth}; allowed: 1 to {MAX_LEAVES.bit_length() - 1}, "
                f"at most {MAX_LEAVES:,} leaves"
            )
        if not 0 <= self.filter <= self.depth:
            raise HierarchyError(f"filter is {self.filter}; allowed: 0 to the depth, {self.depth}")

    @property
    def n_leaves(self) -> int:
        """Tokens of a sequence."""
        return int(2**self.depth)

    def sample(
        self, n_sequences: int, *, generator: torch.Generator
    ) -> tuple[Int[Tensor, "batch leaf"], Int[Tensor, "batch"]]:
        """Draw trees; return their leaves and their roots, which are uniform.

        Args:
            n_sequences: number of trees.
            generator: on the device of the result.
        """
        q, device = self.grammar.n_symbols, generator.device
        root = torch.randint(q, (n_sequences,), generator=generator, device=device)
        laws = self.grammar.descent(self.filter).to(device)
        nodes = torch.stack([draw_rows(law[root], generator) for law in laws], 1)
        rules = self.grammar.rules.flatten(1).to(device)
        for _ in range(self.depth - self.filter):
            pairs = draw_rows(rules[nodes.flatten()], generator).view(nodes.shape)
            nodes = torch.stack([pairs // q, pairs % q], -1).flatten(1)
        return nodes, root

    def infer(self, evidence: Float[Tensor, "batch leaf symbol"]) -> "Posteriors":
        """Belief propagation: one sweep up the tree and one down again.

        Up, `β_v(a) = Σ_bc M[a,b,c] β_l(b) β_r(c)`; down, `α_l(b) = Σ_ac α(a) M[a,b,c] β_r(c)` and
        alike for the right child. Above the filtered level, with `u_j(a) = Σ_b P_j[a,b] β_j(b)`,
        the root's posterior is `Π_j u_j(a)` and `α_j(b) = Σ_a Π_{i≠j} u_i(a) P_j[a,b]`. Messages
        are normalised.

        Args:
            evidence: likelihood of each leaf's symbol: a one-hot row for a token that is seen, ones
                for a hidden one; see `evidence_of`.

        Returns:
            Posteriors in float64; NaN where the evidence is impossible.

        Raises:
            HierarchyError: evidence of another shape.
        """
        shape = (self.n_leaves, self.grammar.n_symbols)
        if evidence.ndim != 3 or tuple(evidence.shape[1:]) != shape:
            raise HierarchyError(
                f"evidence has the shape {tuple(evidence.shape)}; needed: batch x "
                f"{shape[0]} leaves x {shape[1]} symbols"
            )
        rules = self.grammar.rules.to(evidence.device, torch.float64)
        laws = self.grammar.descent(self.filter).to(evidence.device, torch.float64)
        up = [_normalised(evidence.double())]
        for _ in range(self.depth - self.filter):
            left, right = up[-1][:, 0::2], up[-1][:, 1::2]
            up.append(_normalised(torch.einsum("abc,nvb,nvc->nva", rules, left, right)))
        to_root = _normalised(torch.einsum("jab,njb->nja", laws, up[-1]))
        root, others = _products(to_root)
        down = _normalised(torch.einsum("nja,jab->njb", others, laws))
        for children in reversed(up[:-1]):
            left, right = children[:, 0::2], children[:, 1::2]
            to_left = torch.einsum("nva,abc,nvc->nvb", down, rules, right)
            to_right = torch.einsum("nva,abc,nvb->nvc", down, rules, left)
            down = _normalised(torch.stack([to_left, to_right], 2).flatten(1, 2))
        return Posteriors(root=root, leaves=down)


@dataclass(frozen=True, eq=False)
class Posteriors:
    """What the leaves tell.

    Attributes:
        root: the distribution of the root's symbol, given all leaves.
        leaves: that of each leaf, given all the others.
    """

    root: Float[Tensor, "batch symbol"]
    leaves: Float[Tensor, "batch leaf symbol"]


def evidence_of(
    tokens: Int[Tensor, "batch leaf"], n_symbols: int
) -> Float[Tensor, "batch leaf symbol"]:
    """One-hot rows for tokens below `n_symbols`, ones for any other token, which hides a symbol."""
    seen = tokens.unsqueeze(-1) == torch.arange(n_symbols, device=tokens.device)
    hidden = (tokens < 0) | (tokens >= n_symbols)
    return (seen | hidden.unsqueeze(-1)).double()


def _normalised(messages: Tensor) -> Tensor:
    return messages / messages.sum(-1, keepdim=True)


def _products(
    factors: Float[Tensor, "batch node symbol"],
) -> tuple[Float[Tensor, "batch symbol"], Float[Tensor, "batch node symbol"]]:
    """Over nodes: the product of all factors, and of all but each one; both normalised.

    Running products from both ends need no division, so factors may be 0.
    """
    before, after = torch.ones_like(factors), torch.ones_like(factors)
    for node in range(1, factors.shape[1]):
        before[:, node] = _normalised(before[:, node - 1] * factors[:, node - 1])
        after[:, -1 - node] = _normalised(after[:, -node] * factors[:, -node])
    return _normalised(after[:, 0] * factors[:, 0]), _normalised(before * after)
