"""Build and train small bidirectional transformers."""

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from mechcausal.models.adapter import build_hooked


def build_bidirectional(
    vocab_size: int,
    n_ctx: int,
    *,
    d_model: int,
    n_heads: int,
    seed: int,
    device: str,
    n_classes: int | None = None,
) -> HookedTransformer:
    """Two layers with bidirectional attention, LayerNorm, and MLPs of width `2 * d_model`.

    Args:
        vocab_size: number of tokens.
        n_ctx: longest sequence.
        d_model: width.
        n_heads: heads per layer, of width `d_model / n_heads`.
        seed: seed of the initial weights.
        device: device of the model.
        n_classes: outputs per position; `vocab_size` if None.
    """
    config = HookedTransformerConfig(
        n_layers=2,
        n_heads=n_heads,
        d_model=d_model,
        d_head=d_model // n_heads,
        d_mlp=2 * d_model,
        act_fn="gelu",
        n_ctx=n_ctx,
        d_vocab=vocab_size,
        d_vocab_out=n_classes or vocab_size,
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


def hidden_mask(
    tokens: Int[Tensor, "batch pos"], most: float, generator: torch.Generator
) -> Bool[Tensor, "batch pos"]:
    """Random mask of tokens to hide in a training step, so that hidden tokens are in distribution.

    Args:
        tokens: one sequence per row.
        most: largest share of hidden tokens; the share is drawn for each sequence.
        generator: generator on the tokens' device.
    """
    share = most * torch.rand(len(tokens), 1, generator=generator, device=tokens.device)
    return torch.rand(tokens.shape, generator=generator, device=tokens.device) < share


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
