"""The applications of `mechcausal explain`: recommendation and sentiment."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from mechcausal.models.adapter import HookedTransformer
from mechcausal.studies.explanations.examples import PAD, Examples, hidden_mask
from mechcausal.studies.explanations.reviews import CLASSES, ReviewRule
from mechcausal.studies.explanations.sessions import MASK, SessionSource
from mechcausal.studies.explanations.training import Settings, build_bidirectional, fit
from mechcausal.training.experiments import Generators

RECOMMENDER = Settings(d_model=32, steps=500, batch_size=256, lr=2e-3)
CLASSIFIER = Settings(d_model=48, steps=1500, batch_size=128, lr=3e-3)
REVIEWS = ReviewRule()
_HELD_OUT = 2000
_HELD_OUT_SEED = 10_000


class Application(ABC):
    """Data and model of one application.

    Attributes:
        name: name of the application.
        node: the position at which the model predicts.
        fill: whether the prediction is written to `node` before attention is read.
        quick_steps: training steps of a quick run.
        settings: size and training of the model.
        device: device of the model.
    """

    name: ClassVar[str]
    node: ClassVar[int]
    fill: ClassVar[bool]
    quick_steps: ClassVar[int]
    settings: Settings
    device: str

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """`vocab_size`, `n_ctx` and `n_classes` of the model."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Settings of data and model, for the record."""

    @abstractmethod
    def training_examples(self, generator: torch.Generator) -> Examples:
        """One training batch, in which some tokens are replaced by PAD."""

    @abstractmethod
    def held_out(self, n_sequences: int, generator: torch.Generator) -> Examples:
        """Examples that are not used in training, at most `n_sequences`."""

    def quick(self) -> "Application":
        """The application with shorter training."""
        this: Any = self  # every application is a dataclass
        quick: Application = replace(this, settings=replace(self.settings, steps=self.quick_steps))
        return quick

    def train(self, seed: int) -> HookedTransformer:
        """Train a model; the same seed gives the same model on one thread."""
        generator = torch.Generator(self.device).manual_seed(seed)
        init = Generators.from_seed(seed, torch.device(self.device)).init
        model = build_bidirectional(self.settings, **self.sizes, seed=init, device=self.device)

        def loss() -> Tensor:
            examples = self.training_examples(generator)
            logits: Tensor = model(examples.tokens)[:, self.node]
            return cross_entropy(logits, examples.target)

        fit(model, loss, steps=self.settings.steps, lr=self.settings.lr)
        return model

    @torch.no_grad()
    def accuracy(self, model: HookedTransformer, seed: int) -> float:
        """Share of held-out examples whose class the model ranks first."""
        examples = self.inputs(_HELD_OUT, seed)
        predicted = torch.cat(
            [model(part)[:, self.node].argmax(-1) for part in examples.tokens.split(256)]
        )
        return (predicted == examples.target).double().mean().item()

    def inputs(self, n_sequences: int, seed: int) -> Examples:
        """Held-out examples, drawn with another seed than the training data."""
        generator = torch.Generator(self.device).manual_seed(seed + _HELD_OUT_SEED)
        return self.held_out(n_sequences, generator)


@dataclass(frozen=True)
class Recommendation(Application):
    """Which items of a session cause the predicted next item.

    The model reads a session and a MASK and predicts the next item at the MASK, like BERT4Rec.
    Explanations read attention with the predicted item in place of the MASK. Training therefore
    also replaces the MASK by the next item in some sessions.

    Attributes:
        source: source of the sessions.
        shown: share of training sessions in which the next item replaces the MASK.
    """

    source: SessionSource
    settings: Settings = RECOMMENDER
    device: str = "cpu"
    shown: float = 0.3
    name = "recommender"
    node = -1
    fill = True
    quick_steps = 300

    @property
    def sizes(self) -> dict[str, int]:
        """See `Application`."""
        n_tokens = self.source.vocab_size
        return {"vocab_size": n_tokens, "n_ctx": self.source.length + 1, "n_classes": n_tokens}

    def describe(self) -> dict[str, Any]:
        """See `Application`."""
        source = {"length": self.source.length, "vocab_size": self.source.vocab_size}
        model = {**asdict(self.settings), "shown": self.shown}
        return {"data": type(self.source).__name__, **source, "model": model}

    def training_examples(self, generator: torch.Generator) -> Examples:
        """See `Application`."""
        batch = self.source.sample(self.settings.batch_size, generator)
        hidden = hidden_mask(batch.tokens, self.settings.dropped, generator)
        tokens = batch.tokens.masked_fill(hidden, PAD)
        shows_target = torch.rand(len(tokens), generator=generator, device=self.device) < self.shown
        last = torch.where(shows_target, batch.target, MASK)
        return Examples(torch.cat([tokens, last[:, None]], 1), batch.target)

    def held_out(self, n_sequences: int, generator: torch.Generator) -> Examples:
        """Held-out sessions, each with a MASK appended."""
        batch = self.source.held_out(n_sequences, generator)
        causes = None if batch.causes is None else pad(batch.causes, (0, 1))
        return Examples(pad(batch.tokens, (0, 1), value=MASK), batch.target, causes)


@dataclass(frozen=True)
class Sentiment(Application):
    """Which words of a review cause the sentiment that a model predicts at the CLS.

    Attributes:
        rule: generates the reviews.
    """

    rule: ReviewRule = REVIEWS
    settings: Settings = CLASSIFIER
    device: str = "cpu"
    name = "sentiment"
    node = 0
    fill = False
    quick_steps = 600

    @property
    def sizes(self) -> dict[str, int]:
        """See `Application`."""
        rule = self.rule
        return {
            "vocab_size": rule.vocab_size,
            "n_ctx": rule.length + 1,
            "n_classes": len(CLASSES),
        }

    def describe(self) -> dict[str, Any]:
        """See `Application`."""
        return {"data": asdict(self.rule), "model": asdict(self.settings)}

    def training_examples(self, generator: torch.Generator) -> Examples:
        """Reviews with the sentiment of the words that remain."""
        tokens = self.held_out(self.settings.batch_size, generator).tokens
        hidden = hidden_mask(tokens, self.settings.dropped, generator)
        hidden[:, 0] = False
        tokens = tokens.masked_fill(hidden, PAD)
        return Examples(tokens, self.rule.label(tokens))

    def held_out(self, n_sequences: int, generator: torch.Generator) -> Examples:
        """Fresh reviews."""
        return self.rule.sample(n_sequences, generator)
