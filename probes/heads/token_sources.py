"""What stimuli are made of: random ids, frequent tokens, or segments of a real text."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

FREQUENT = 1000
"""How many of the most frequent tokens `frequent_tokens` takes."""
_FEWEST = 20
"""Fewer different tokens make no stimulus that could tell heads apart."""


@dataclass(frozen=True, eq=False)
class TokenSource:
    """Draws blocks of tokens, for stimuli and their controls.

    Attributes:
        name: what it is called in results.
        draw: `draw(batch, length, generator)` gives blocks `[batch, length]` on the CPU.
    """

    name: str
    draw: Callable[[int, int, torch.Generator], Int[Tensor, "batch length"]]


def frequent_tokens(ids: Int[Tensor, "n"], n_tokens: int = FREQUENT) -> TokenSource:
    """Blocks of tokens drawn uniformly from the most frequent ones of a text.

    Most ids of a large vocabulary are rare, and a model may have seen some hardly ever: its heads
    can fail on uniformly random ids though they work on usual text. The frequencies are those of a
    text under the model's own tokenizer, because the lowest ids are not the most frequent tokens:
    they are bytes and punctuation in byte-level vocabularies. As for random ids, no token occurs
    twice in a block if there are enough of them.

    Args:
        ids: the tokens of a text, without special tokens.
        n_tokens: how many of the most frequent tokens are used.

    Raises:
        ValueError: the text has fewer than 20 different tokens.

    >>> source = frequent_tokens(torch.arange(30).repeat(3))
    >>> blocks = source.draw(2, 10, torch.Generator().manual_seed(0))
    >>> blocks.shape, len(set(blocks[0].tolist()))
    (torch.Size([2, 10]), 10)
    """
    values, counts = ids.unique(return_counts=True)
    _check_variety(values)
    order = counts.argsort(descending=True, stable=True)
    frequent = values[order[:n_tokens]]

    def draw(batch: int, length: int, generator: torch.Generator) -> Tensor:
        weights = torch.ones(batch, len(frequent))
        repeats = length > len(frequent)
        chosen = torch.multinomial(weights, length, repeats, generator=generator)
        block: Tensor = frequent.index_select(0, chosen.flatten()).view(batch, length)
        return block

    return TokenSource("frequent", draw)


def text_segments(ids: Int[Tensor, "n"]) -> TokenSource:
    """Segments of a text, cut at random positions.

    A stimulus is then a segment read twice, its control another segment, twice as long. Tokens
    recur within a segment as well: prefix matching counts the positions after all earlier
    occurrences, and uniform attention scores higher than on random ids.

    Args:
        ids: the tokens of a text, without special tokens.

    Raises:
        ValueError: the text has fewer than 20 different tokens. In `draw`: it is too short.
    """
    _check_variety(ids.unique())

    def draw(batch: int, length: int, generator: torch.Generator) -> Tensor:
        last = len(ids) - length
        if last < 0:
            raise ValueError(f"the text has {len(ids)} tokens: a segment of {length} does not fit")
        starts = torch.randint(last + 1, (batch, 1), generator=generator)
        segment: Tensor = ids.index_select(0, (starts + torch.arange(length)).flatten())
        return segment.view(batch, length)

    return TokenSource("text", draw)


def _check_variety(values: Tensor) -> None:
    if len(values) < _FEWEST:
        raise ValueError(
            f"the text has {len(values)} different tokens; at least {_FEWEST} are needed"
        )
