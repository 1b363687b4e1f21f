"""The applications of `mechcausal explain`: recommendation and sentiment."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformer_lens import HookedTransformer

from mechcausal.studies.explanations.driver import Inputs
from mechcausal.studies.explanations.recommender import (
    RecommenderSettings,
    hit_rate,
    train_recommender,
    with_mask,
)
from mechcausal.studies.explanations.reviews import ReviewRule
from mechcausal.studies.explanations.sentiment import ClassifierSettings, accuracy, train_classifier
from mechcausal.studies.explanations.sessions import PAD, SessionSource

_HELD_OUT = 2000


@dataclass(frozen=True)
class Recommendation:
    """Sequential recommendation: which items of a session cause the predicted next item.

    Attributes:
        source: source of the sessions.
        settings: size and training of the model.
        device: device of the model.
    """

    source: SessionSource
    settings: RecommenderSettings
    device: str = "cpu"
    name: str = "recommender"
    replacement: int = PAD
    node: int = -1
    fill: bool = True

    def train(self, seed: int) -> HookedTransformer:
        """Train a recommender."""
        return train_recommender(self.source, seed=seed, settings=self.settings, device=self.device)

    def accuracy(self, model: HookedTransformer, seed: int) -> float:
        """Share of held-out sessions whose next item is ranked first."""
        return hit_rate(model, self.source, n_sessions=_HELD_OUT, seed=seed)

    def inputs(self, n_sequences: int, seed: int) -> Inputs:
        """Held-out sessions, each with a MASK appended."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        batch = self.source.held_out(n_sequences, generator)
        causes = None if batch.causes is None else pad(batch.causes, (0, 1))
        return Inputs(with_mask(batch.items), causes)

    def describe(self) -> dict[str, Any]:
        """Settings of data and model, for the record."""
        source = {"length": self.source.length, "vocab_size": self.source.vocab_size}
        return {"data": type(self.source).__name__, **source, "model": asdict(self.settings)}


@dataclass(frozen=True)
class Sentiment:
    """Sentiment: which words of a review cause the predicted sentiment.

    Attributes:
        rule: generates the reviews.
        settings: size and training of the model.
        device: device of the model.
    """

    rule: ReviewRule
    settings: ClassifierSettings
    device: str = "cpu"
    name: str = "sentiment"
    replacement: int = PAD
    node: int = 0
    fill: bool = False

    def train(self, seed: int) -> HookedTransformer:
        """Train a classifier."""
        return train_classifier(self.rule, seed=seed, settings=self.settings, device=self.device)

    def accuracy(self, model: HookedTransformer, seed: int) -> float:
        """Share of fresh reviews classified as the rule does."""
        return accuracy(model, self.rule, n_reviews=_HELD_OUT, seed=seed)

    def inputs(self, n_sequences: int, seed: int) -> Inputs:
        """Fresh reviews."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        batch = self.rule.sample(n_sequences, generator)
        return Inputs(batch.tokens, batch.causes)

    def describe(self) -> dict[str, Any]:
        """Settings of data and model, for the record."""
        return {"data": asdict(self.rule), "model": asdict(self.settings)}
