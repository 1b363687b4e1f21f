"""Short generated reviews with known cue words and negation."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechcausal.studies.explanations.examples import Examples

CLS, NOT = 1, 2
FIRST_CUE = 3
CLASSES = ("negative", "neutral", "positive")
_POSITIVE = ("good", "great", "fine", "lovely", "fun", "superb", "warm", "clever")
_NEGATIVE = ("bad", "awful", "poor", "dull", "cold", "weak", "ugly", "silly")
_PLAIN = (
    *("the", "film", "story", "plot", "actor", "scene", "music", "was", "is", "and", "this"),
    *("that", "we", "saw", "it", "with", "a", "of", "on", "screen", "night", "city", "they"),
)
WORDS = ("[PAD]", "[CLS]", "not", *_POSITIVE, *_NEGATIVE, *_PLAIN)


@dataclass(frozen=True)
class ReviewRule:
    """Sentiment is the sign of the sum over cue words, +1 or -1 each; `not` flips the next word.

    A review has 1 to `most` cue words among plain words. A sum of zero is neutral. The rule applies
    to any text, including reviews with words replaced by PAD.

    Attributes:
        length: number of words.
        most: largest number of cue words.
        negated: probability of a `not` in front of a cue word.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> rule = ReviewRule()
        >>> ids = {word: i for i, word in enumerate(WORDS)}
        >>> text = torch.tensor([[ids[w] for w in "[CLS] not good and fun".split()]])
        >>> CLASSES[rule.label(text)[0]]
        'neutral'
    """

    length: int = 12
    most: int = 4
    negated: float = 0.3

    def __post_init__(self) -> None:
        if self.most < 1 or self.length < 2 * self.most or not 0 <= self.negated <= 1:
            raise ValueError(
                f"{self}: most must be at least 1, length twice that, negated from 0 to 1"
            )

    @property
    def vocab_size(self) -> int:
        """PAD, CLS and the words."""
        return len(WORDS)

    def sample(self, n_reviews: int, generator: torch.Generator) -> Examples:
        """Draw reviews."""
        device = generator.device

        def uniform(*size: int) -> Tensor:
            return torch.rand(n_reviews, *size, generator=generator, device=device)

        n_plain, n_cue = len(_PLAIN), len(_POSITIVE) + len(_NEGATIVE)
        words = FIRST_CUE + n_cue + (uniform(self.length) * n_plain).long()
        # A cue word is the second word of a pair, so that a `not` fits in front of it.
        n_pairs = self.length // 2
        pairs = uniform(n_pairs).argsort(1)[:, : self.most]
        used = torch.arange(self.most, device=device) < 1 + (uniform(1) * self.most).long()
        cues = FIRST_CUE + (uniform(self.most) * n_cue).long()
        flipped = used & (uniform(self.most) < self.negated)
        for positions, is_set, new_words in (
            (2 * pairs + 1, used, cues),
            (2 * pairs, flipped, torch.full_like(cues, NOT)),
        ):
            old_words = words.gather(1, positions)
            words = words.scatter(1, positions, torch.where(is_set, new_words, old_words))
        tokens = torch.nn.functional.pad(words, (1, 0), value=CLS)
        return Examples(tokens, self.label(tokens), self.causes(tokens))

    def label(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch"]:
        """The sentiment of any text, as an index into `CLASSES`."""
        polarity = _polarity(tokens)
        negated = torch.nn.functional.pad(tokens[:, :-1] == NOT, (1, 0))
        return torch.where(negated, -polarity, polarity).sum(1).sign() + 1

    def causes(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """True at cue words and at each `not` in front of one."""
        is_cue = _polarity(tokens) != 0
        return is_cue | ((tokens == NOT) & torch.nn.functional.pad(is_cue[:, 1:], (0, 1)))


def _polarity(tokens: Tensor) -> Tensor:
    """1 for a positive cue word, -1 for a negative one, 0 otherwise."""
    first_negative = FIRST_CUE + len(_POSITIVE)
    positive = (tokens >= FIRST_CUE) & (tokens < first_negative)
    negative = (tokens >= first_negative) & (tokens < first_negative + len(_NEGATIVE))
    return positive.long() - negative.long()
