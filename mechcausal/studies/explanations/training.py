"""Build and train small bidirectional transformers."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mechcausal.models.adapter import HookedTransformer, HookedTransformerConfig, build_hooked


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Size and training of a model.

    Attributes:
        d_model: width.
        n_heads: heads in each of the two layers, of width `d_model / n_heads`.
        steps: steps of AdamW.
        batch_size: sequences per step.
        lr: peak learning rate.
        dropped: largest share of tokens replaced by PAD; the share is drawn for each sequence.
    """

    d_model: int
    n_heads: int = 2
    steps: int
    batch_size: int
    lr: float
    dropped: float = 0.5


def build_bidirectional(
    settings: Settings, *, vocab_size: int, n_ctx: int, n_classes: int, seed: int, device: str
) -> HookedTransformer:
    """Two layers with bidirectional attention, LayerNorm, and MLPs of width `2 * d_model`.

    Args:
        settings: the size.
        vocab_size: number of tokens.
        n_ctx: longest sequence.
        n_classes: outputs per position.
        seed: seed of the initial weights.
        device: device of the model.
    """
    config = HookedTransformerConfig(
        n_layers=2,
        n_heads=settings.n_heads,
        d_model=settings.d_model,
        d_head=settings.d_model // settings.n_heads,
        d_mlp=2 * settings.d_model,
        act_fn="gelu",
        n_ctx=n_ctx,
        d_vocab=vocab_size,
        d_vocab_out=n_classes,
        normalization_type="LN",
        attention_dir="bidirectional",
        positional_embedding_type="standard",
        default_prepend_bos=False,
        device=device,
    )
    # TransformerLens draws from torch's global generators: restore them afterwards.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return build_hooked(config)


def fit(model: HookedTransformer, loss: Callable[[], Tensor], *, steps: int, lr: float) -> None:
    """Train with AdamW; the learning rate rises for a tenth of the steps, then falls to zero.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, total_steps=steps, pct_start=0.1
        )
    for step in range(steps):
        value = loss()
        if not bool(value.isfinite()):
            raise FloatingPointError(f"the loss became {value.item()} at step {step}")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    model.eval()
