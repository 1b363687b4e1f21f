"""What the small bidirectional models have in common: how they are built and trained."""

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
    """Two layers that look both ways, LayerNorm, MLPs of twice the width.

    Args:
        vocab_size: tokens.
        n_ctx: longest sequence.
        d_model: width.
        n_heads: of each layer, `d_model / n_heads` wide.
        seed: of the initial weights.
        device: where the model lives.
        n_classes: outputs of every position; the tokens if None.
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
    # TransformerLens draws from torch's global generators: leave those untouched.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return build_hooked(config)


def drawn_to_hide(
    tokens: Int[Tensor, "batch pos"], most: float, generator: torch.Generator
) -> Bool[Tensor, "batch pos"]:
    """Which tokens a step of training hides, so that to a model hidden tokens are nothing new.

    Args:
        tokens: one sequence each row.
        most: largest share of a sequence that is hidden; drawn anew for every one.
        generator: on the tokens' device.
    """
    share = most * torch.rand(len(tokens), 1, generator=generator, device=tokens.device)
    return torch.rand(tokens.shape, generator=generator, device=tokens.device) < share


def fit(model: HookedTransformer, loss: Callable[[], Tensor], *, steps: int, lr: float) -> None:
    """AdamW with a learning rate that rises for a tenth of the steps and then falls to zero.

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
