"""A small sentiment classifier: CLS and words in, the sentiment out at the CLS.

It is trained on reviews in which random words are PAD, with the sentiment of what is left, so that
replacing words by PAD, as explanations do, is nothing new to it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens import HookedTransformer

from mechcausal.studies.explanations.classifier import build_bidirectional, drawn_to_hide, fit
from mechcausal.studies.explanations.reviews import CLASSES, PAD, ReviewRule


@dataclass(frozen=True)
class ClassifierSettings:
    """Size and training of a classifier.

    Attributes:
        d_model: width.
        n_heads: of each of the two layers, `d_model / n_heads` wide.
        steps: of AdamW.
        batch_size: reviews of a step.
        lr: largest learning rate.
        dropped: largest share of a review's words that are PAD; drawn anew for every review.
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
        rule: draws reviews and knows their sentiment.
        seed: of the initial weights and of the data.
        settings: size and training.
        device: where it is trained and stays.
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
        gone = drawn_to_hide(tokens, settings.dropped, generator)
        gone[:, 0] = False
        tokens = tokens.masked_fill(gone, PAD)
        logits: Tensor = model(tokens)[:, 0]
        return cross_entropy(logits, rule.label(tokens))

    fit(model, loss, steps=settings.steps, lr=settings.lr)
    return model


@torch.no_grad()
def accuracy(model: HookedTransformer, rule: ReviewRule, *, n_reviews: int, seed: int) -> float:
    """Share of fresh reviews whose sentiment is predicted."""
    generator = torch.Generator(device=str(model.cfg.device)).manual_seed(seed)
    batch = rule.sample(n_reviews, generator)
    predicted = torch.cat([model(part)[:, 0].argmax(-1) for part in batch.tokens.split(256)])
    return (predicted == batch.label).double().mean().item()
