"""Text as a task: its characters as tokens, and windows of them.

The text is cut into `N_PARTS` equal parts, and the last tenth of each is held out: both sides then
hold every region of the text, and no window crosses a border.
"""

import re

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechcausal.support.corpora import Corpus, TextError

N_PARTS = 10
_HELD_OUT = 10  # one in as many characters of a part


class TextTask:
    """Windows of a text, character by character.

    Blanks are squeezed to one space. Tokens are the `vocab_size - 1` most frequent characters of
    the training part, by frequency, and a bucket for all others, the last token.

    Attributes:
        vocabulary: the characters, without the bucket.
        vocab_size: number of tokens, V.
        context: characters of a window.
        interleaved: whether each part's two halves are interleaved, character by character: then
            keys at odd lags come from another place of the text than the target.
        training: the parts to train on.
        held_out: the parts held out.
        facts: name, hash and lengths of the text, and the lengths of both sides, in characters.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        vocab_size: int,
        context: int,
        interleaved: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """Encode and split the text.

        Raises:
            TextError: it is too short for the context, or all its characters are equal.
        """
        text = re.sub(r"\s+", " ", corpus.text).strip()
        shortest = N_PARTS * _HELD_OUT * context
        if len(text) < shortest:
            raise TextError(
                f"{corpus.name}: {len(text):,} characters after squeezing blanks; windows of "
                f"{context} need at least {shortest:,}"
            )
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        parts = points[: len(points) // N_PARTS * N_PARTS].reshape(N_PARTS, -1)
        n_training = parts.shape[1] - parts.shape[1] // _HELD_OUT
        values, counts = np.unique(parts[:, :n_training], return_counts=True)
        if len(values) < 2:
            raise TextError(f"{corpus.name}: all its characters are equal; nothing to learn")
        common = values[np.argsort(-counts, kind="stable")[: vocab_size - 1]]
        tokens = torch.from_numpy(_encoded(parts, common, bucket=vocab_size - 1)).to(device)
        self.vocabulary = tuple(chr(point) for point in common.tolist())
        self.vocab_size, self.context, self.interleaved = vocab_size, context, interleaved
        self.training, self.held_out = tokens[:, :n_training], tokens[:, n_training:]
        if interleaved:
            self.training, self.held_out = interleave(self.training), interleave(self.held_out)
        lengths: dict[str, str | int] = {
            "training": self.training.numel(),
            "held_out": self.held_out.numel(),
        }
        self.facts = corpus.facts | lengths

    def sample(self, n: int, generator: torch.Generator) -> Int[Tensor, "n pos"]:
        """Windows at random places of the training part, which may overlap."""
        n_starts = self.training.shape[1] - self.context + 1
        drawn = torch.randint(
            N_PARTS * n_starts, (n, 1), generator=generator, device=self.training.device
        )
        offsets = torch.arange(self.context, device=drawn.device)
        return self.training[drawn // n_starts, drawn % n_starts + offsets].long()

    def windows(self, n: int, generator: torch.Generator) -> Int[Tensor, "n pos"]:
        """At most `n` windows of the held-out part, drawn without overlap."""
        n_windows = self.held_out.shape[1] // self.context
        every = self.held_out[:, : n_windows * self.context].reshape(-1, self.context)
        order = torch.randperm(len(every), generator=generator, device=every.device)
        return every[order[:n].sort().values].long()


def _encoded(points: np.ndarray, common: np.ndarray, *, bucket: int) -> np.ndarray:
    """The place of every character in `common`, as int16; the bucket for the others."""
    order = np.argsort(common)
    ordered = common[order]
    near = np.searchsorted(ordered, points).clip(max=len(ordered) - 1)
    places = order.astype(np.int16)[near]
    encoded: np.ndarray = np.where(ordered[near] == points, places, np.int16(bucket))
    return encoded


def interleave(parts: Int[Tensor, "part pos"]) -> Int[Tensor, "part even_pos"]:
    """Even positions from the first half of every part, odd ones from the second.

    Example:
        >>> interleave(torch.tensor([[0, 1, 2, 3, 4, 5, 6]])).tolist()
        [[0, 3, 1, 4, 2, 5]]
    """
    half = parts.shape[1] // 2
    return torch.stack([parts[:, :half], parts[:, half : 2 * half]], -1).flatten(1)
