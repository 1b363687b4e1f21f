"""A small sequential recommender: a session with a MASK behind it in, the next item out.

A bidirectional HookedTransformer in the manner of BERT4Rec. It is trained on sessions in which
random items are PAD, so that replacing items by PAD, as explanations do, is nothing new to it; and
on some sessions with their next item shown instead of the MASK, so that its attention can be read
with its own prediction in place.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformer_lens import HookedTransformer

from mechcausal.studies.explanations.classifier import build_bidirectional, drawn_to_hide, fit
from mechcausal.studies.explanations.sessions import MASK, PAD, SessionSource


@dataclass(frozen=True)
class RecommenderSettings:
    """Size and training of a recommender.

    Attributes:
        d_model: width.
        n_heads: of each of the two layers, `d_model / n_heads` wide.
        steps: of AdamW.
        batch_size: sessions of a step.
        lr: largest learning rate.
        dropped: largest share of a session's items that are PAD; drawn anew for every session.
        shown: share of sessions that show their next item.
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
        source: of the sessions.
        seed: of the initial weights and of the data.
        settings: size and training.
        device: where it is trained and stays.
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
        gone = drawn_to_hide(batch.items, settings.dropped, generator)
        tokens = with_mask(batch.items.masked_fill(gone, PAD))
        shown = torch.rand(len(tokens), generator=generator, device=device) < settings.shown
        tokens[:, -1] = torch.where(shown, batch.target, MASK)
        logits: Tensor = model(tokens)[:, -1]
        return cross_entropy(logits, batch.target)

    fit(model, loss, steps=settings.steps, lr=settings.lr)
    return model


def with_mask(items: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos+1"]:
    """What a recommender reads: the items and a MASK, whose place predicts the next item."""
    return pad(items, (0, 1), value=MASK)


@torch.no_grad()
def hit_rate(
    model: HookedTransformer, source: SessionSource, *, n_sessions: int, seed: int
) -> float:
    """Share of held-out sessions whose next item is predicted first."""
    generator = torch.Generator(device=str(model.cfg.device)).manual_seed(seed)
    batch = source.held_out(n_sessions, generator)
    predicted = torch.cat(
        [model(part)[:, -1].argmax(-1) for part in with_mask(batch.items).split(256)]
    )
    return (predicted == batch.target).double().mean().item()
