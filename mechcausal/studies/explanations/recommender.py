"""A small sequential recommender: reads a session and a MASK, predicts the next item at the MASK.

A bidirectional HookedTransformer like BERT4Rec. Explanations replace items by PAD, and read
attention with the predicted item in place of the MASK. Training therefore also replaces random
items by PAD, and in some sessions the MASK by the next item, so that both are in distribution.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformer_lens import HookedTransformer

from mechcausal.studies.explanations.classifier import build_bidirectional, fit, hidden_mask
from mechcausal.studies.explanations.sessions import MASK, PAD, SessionSource


@dataclass(frozen=True)
class RecommenderSettings:
    """Size and training of a recommender.

    Attributes:
        d_model: width.
        n_heads: heads in each of the two layers, of width `d_model / n_heads`.
        steps: steps of AdamW.
        batch_size: sessions per step.
        lr: peak learning rate.
        dropped: largest share of items replaced by PAD; the share is drawn for each session.
        shown: share of sessions in which the next item replaces the MASK.
    """

    d_model: int = 32
    n_heads: int = 2
    steps: int = 500
    batch_size: int = 256
    lr: float = 2e-3
    dropped: float = 0.5
    shown: float = 0.3


def train_recommender(
    source: SessionSource,
    *,
    seed: int,
    settings: RecommenderSettings | None = None,
    device: str = "cpu",
) -> HookedTransformer:
    """Train a recommender; the same seed gives the same model on one thread.

    Args:
        source: source of the sessions.
        seed: seed of the initial weights and of the data.
        settings: size and training.
        device: device of the model.
    """
    settings = settings or RecommenderSettings()
    generator = torch.Generator(device=device).manual_seed(seed)
    model = build_bidirectional(
        source.vocab_size,
        source.length + 1,
        d_model=settings.d_model,
        n_heads=settings.n_heads,
        seed=seed,
        device=device,
    )

    def loss() -> Tensor:
        batch = source.sample(settings.batch_size, generator)
        hidden = hidden_mask(batch.items, settings.dropped, generator)
        tokens = with_mask(batch.items.masked_fill(hidden, PAD))
        shows_target = torch.rand(len(tokens), generator=generator, device=device) < settings.shown
        tokens[:, -1] = torch.where(shows_target, batch.target, MASK)
        logits: Tensor = model(tokens)[:, -1]
        return cross_entropy(logits, batch.target)

    fit(model, loss, steps=settings.steps, lr=settings.lr)
    return model


def with_mask(items: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos+1"]:
    """The input of a recommender: the items and a MASK, at which it predicts the next item."""
    return pad(items, (0, 1), value=MASK)


@torch.no_grad()
def hit_rate(
    model: HookedTransformer, source: SessionSource, *, n_sessions: int, seed: int
) -> float:
    """Share of held-out sessions whose next item is ranked first."""
    generator = torch.Generator(device=str(model.cfg.device)).manual_seed(seed)
    batch = source.held_out(n_sessions, generator)
    predicted = torch.cat(
        [model(part)[:, -1].argmax(-1) for part in with_mask(batch.items).split(256)]
    )
    return (predicted == batch.target).double().mean().item()
