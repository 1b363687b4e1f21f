"""A small sentiment classifier: reads CLS and words, predicts the sentiment at the CLS.

Explanations replace words by PAD. Training therefore also replaces random words by PAD and uses the
sentiment of the remaining words, so that such inputs are in distribution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens import HookedTransformer

from mechcausal.studies.explanations.classifier import build_bidirectional, fit, hidden_mask
from mechcausal.studies.explanations.reviews import CLASSES, PAD, ReviewRule


@dataclass(frozen=True)
class ClassifierSettings:
    """Size and training of a classifier.

    Attributes:
        d_model: width.
        n_heads: heads in each of the two layers, of width `d_model / n_heads`.
        steps: steps of AdamW.
        batch_size: reviews per step.
        lr: peak learning rate.
        dropped: largest share of words replaced by PAD; the share is drawn for each review.
    """

    d_model: int = 48
    n_heads: int = 2
    steps: int = 1500
    batch_size: int = 128
    lr: float = 3e-3
    dropped: float = 0.5


def train_classifier(
    rule: ReviewRule,
    *,
    seed: int,
    settings: ClassifierSettings | None = None,
    device: str = "cpu",
) -> HookedTransformer:
    """Train a classifier; the same seed gives the same model on one thread.

    Args:
        rule: generates reviews and their sentiment.
        seed: seed of the initial weights and of the data.
        settings: size and training.
        device: device of the model.
    """
    settings = settings or ClassifierSettings()
    generator = torch.Generator(device=device).manual_seed(seed)
    model = build_bidirectional(
        rule.vocab_size,
        rule.length + 1,
        d_model=settings.d_model,
        n_heads=settings.n_heads,
        seed=seed,
        device=device,
        n_classes=len(CLASSES),
    )

    def loss() -> Tensor:
        tokens = rule.sample(settings.batch_size, generator).tokens
        hidden = hidden_mask(tokens, settings.dropped, generator)
        hidden[:, 0] = False
        tokens = tokens.masked_fill(hidden, PAD)
        logits: Tensor = model(tokens)[:, 0]
        return cross_entropy(logits, rule.label(tokens))

    fit(model, loss, steps=settings.steps, lr=settings.lr)
    return model


@torch.no_grad()
def accuracy(model: HookedTransformer, rule: ReviewRule, *, n_reviews: int, seed: int) -> float:
    """Share of fresh reviews with a correctly predicted sentiment."""
    generator = torch.Generator(device=str(model.cfg.device)).manual_seed(seed)
    batch = rule.sample(n_reviews, generator)
    predicted = torch.cat([model(part)[:, 0].argmax(-1) for part in batch.tokens.split(256)])
    return (predicted == batch.label).double().mean().item()
