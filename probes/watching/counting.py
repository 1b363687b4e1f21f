"""Count pairs of symbols in sequences: the symbols, the groups, and the tables of counts."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MAX_CELLS = 4_000_000


@dataclass(frozen=True)
class Vocabulary:
    """The symbols told apart: tokens as they are, or the most frequent ones and a bucket.

    Attributes:
        n_symbols: number of symbols.
        bucket_share: share of tokens in the bucket, the last symbol; 0 without one.
        symbol: the symbol of every token, None if tokens are symbols themselves.
    """

    n_symbols: int
    bucket_share: float
    symbol: Int[Tensor, "token"] | None

    @classmethod
    def of(
        cls, tokens: Tensor, real: Tensor, vocab_size: int | None, max_vocab: int
    ) -> "Vocabulary":
        """Choose the symbols by how often the unmasked tokens occur.

        Raises:
            ValueError: every token is masked, or one lies outside the vocabulary.
        """
        seen = tokens[real].long()
        if not len(seen):
            raise ValueError("every token is masked")
        low, high = int(seen.min()), int(seen.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            allowed = "0 or above" if vocab_size is None else f"0 to {vocab_size - 1}"
            raise ValueError(f"tokens run from {low} to {high}; allowed: {allowed}")
        n_tokens = vocab_size or high + 1
        if n_tokens <= max_vocab:
            return cls(n_tokens, 0.0, None)
        counts = seen.bincount(minlength=n_tokens)
        kept = counts.argsort(descending=True, stable=True)[: max_vocab - 1]
        symbol = torch.full_like(counts, max_vocab - 1)
        symbol[kept] = torch.arange(len(kept), device=kept.device)
        return cls(max_vocab, 1 - counts[kept].sum().item() / len(seen), symbol)

    def symbols(self, tokens: Tensor, real: Tensor | None) -> Int[Tensor, "..."]:
        """The symbol of every token; -1 at padding."""
        numbers = tokens.long()
        if self.symbol is not None:
            numbers = self.symbol[numbers.clamp(0, len(self.symbol) - 1)]
        return numbers if real is None else numbers.masked_fill(~real, -1)

    def merged(self, probabilities: Float[Tensor, "*rest token"]) -> Float[Tensor, "*rest symbol"]:
        """Probabilities of symbols from those of tokens."""
        if self.symbol is None:
            return probabilities[..., : self.n_symbols]
        total = probabilities.new_zeros(*probabilities.shape[:-1], self.n_symbols)
        return total.index_add_(-1, self.symbol, probabilities[..., : len(self.symbol)])


@dataclass(frozen=True)
class Groups:
    """Which sequences belong together, and each one's place within its group."""

    number: int
    of_sequence: Int[Tensor, "sequence"]
    sizes: Int[Tensor, "group"]
    rank: Int[Tensor, "sequence"]

    @classmethod
    def of(cls, groups: Tensor | None, n_sequences: int, device: torch.device) -> "Groups":
        """Number the groups from 0; None puts all sequences into one.

        Raises:
            ValueError: not one number for each sequence, or a group of one sequence.
        """
        if groups is None:
            groups = torch.zeros(n_sequences, dtype=torch.long)
        if groups.shape != (n_sequences,):
            raise ValueError(
                f"groups have shape {tuple(groups.shape)}; expected one number for each of "
                f"{n_sequences} sequences"
            )
        labels, numbers = groups.to(device).unique(return_inverse=True)
        sizes = numbers.bincount()
        if int(sizes.min()) < 2:
            smallest = f" in every group; group {labels[sizes.argmin()]} has 1"
            raise ValueError(
                f"information needs at least two sequences{smallest if len(sizes) > 1 else ''}"
            )
        order = numbers.argsort(stable=True)
        rank = torch.empty_like(order)
        start = (sizes.cumsum(0) - sizes)[numbers[order]]
        rank[order] = torch.arange(n_sequences, device=device) - start
        return cls(len(sizes), numbers, sizes, rank)

    def shuffle(self, generator: torch.Generator) -> Int[Tensor, "sequence"]:
        """For every sequence another one of its group: the next one in a random order."""
        noise = torch.rand(len(self.rank), generator=generator, dtype=torch.float64)
        order = (self.of_sequence + noise.to(self.rank.device)).argsort()
        group = self.of_sequence[order]
        start = (self.sizes.cumsum(0) - self.sizes)[group]
        place = torch.arange(len(order), device=order.device) - start
        partner = torch.empty_like(order)
        partner[order] = order[start + (place + 1) % self.sizes[group]]
        return partner


class Counter:
    """Counts how often a query has one symbol and a key another, by group and fold."""

    def __init__(
        self, symbols: Int[Tensor, "sequence pos"], n_symbols: int, groups: Groups, folds: int
    ) -> None:
        self.n_symbols, self.groups = n_symbols, groups
        self.n_folds = min(folds, int(groups.sizes.min()))
        self._symbols = symbols
        self._fold = groups.of_sequence * self.n_folds + groups.rank % self.n_folds

    def rows_at_once(self) -> int:
        """How many rows of pairs `counts` may take at a time, for bounded memory."""
        cells = self.groups.number * self.n_folds * self.n_symbols**2
        return max(1, min(_MAX_CELLS // cells, _MAX_CELLS // len(self._symbols)))

    def counts(
        self, rows: list[Int[Tensor, "_ 2"]], partner: Int[Tensor, "sequence"] | None = None
    ) -> Float[Tensor, "group fold row key_symbol query_symbol"]:
        """Counts for every row of pairs; with a `partner`, keys are those of that sequence."""
        n, cells = len(rows), self.n_symbols**2
        keys = self._symbols if partner is None else self._symbols[partner]
        shape = (self.groups.number, self.n_folds, n, self.n_symbols, self.n_symbols)
        total = torch.zeros(shape, dtype=torch.long, device=keys.device).view(-1)
        row_of_pair = torch.cat([torch.full((len(row),), i) for i, row in enumerate(rows)])
        pairs = torch.cat(rows)
        step = max(1, _MAX_CELLS // len(keys))
        for start in range(0, len(pairs), step):
            part = pairs[start : start + step].to(keys.device)
            row = row_of_pair[start : start + step].to(keys.device)
            query_symbol, key_symbol = self._symbols[:, part[:, 0]], keys[:, part[:, 1]]
            cell = (self._fold.unsqueeze(1) * n + row) * cells
            cell = cell + key_symbol * self.n_symbols + query_symbol
            real = (query_symbol >= 0) & (key_symbol >= 0)
            total += cell[real].bincount(minlength=len(total))
        return total.view(shape).double()
