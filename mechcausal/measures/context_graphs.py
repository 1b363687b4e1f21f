"""What a model has inferred of the graph in its context, and learned of the kernel."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.models.base import GraphModel
from mechcausal.models.in_context_graphs import InContextGraphTransformer
from probes import AttentionPattern, attach

SMALLEST = 1e-30
"""Attention below this counts as this in the divergence: float32 has no logarithm of less."""


def parent_figures(
    attention: Float[Tensor, "batch position key"],
    posterior: Float[Tensor, "batch position key"],
    parents: Int[Tensor, "batch position"],
) -> dict[str, float]:
    """Compare attention to the candidates of a parent with the truth and with Bayes' rule.

    Positions with a single candidate are left out.

    Args:
        attention: row h predicts position h of the last example; rows sum to 1 over keys before h.
        posterior: `InContextGraphTask.parent_posterior`.
        parents: the truth, -1 for position 0.

    Returns:
        `parents/top1`, the share of positions whose parent gets the largest attention;
        `parents/oracle_top1`, the same of the posterior; `parents/posterior_kl`, the mean
        `KL(posterior || attention)` in nats.
    """
    attention, posterior, parents = attention[:, 2:], posterior[:, 2:], parents[:, 2:]
    ratio = torch.where(posterior > 0, posterior / attention.double().clamp(min=SMALLEST), 1.0)
    return {
        "parents/top1": (attention.argmax(-1) == parents).double().mean().item(),
        "parents/oracle_top1": (posterior.argmax(-1) == parents).double().mean().item(),
        "parents/posterior_kl": (posterior * ratio.log()).sum(-1).mean().item(),
    }


@torch.no_grad()
def candidate_attention(
    model: GraphModel, tokens: Int[Tensor, "batch pos"], n_positions: int
) -> Float[Tensor, "batch position key"]:
    """Last-layer attention of any model to the candidates, from where each position is predicted.

    The sum over heads of the attention within the last example, divided by its sum over keys. Row 0
    is 0: it has no candidate.
    """
    last = len(model.heads) - 1
    pattern = AttentionPattern(last)
    with model.frozen(), attach(model.hooked, pattern):
        model.hooked(tokens, return_type=None)
    patterns = pattern.reading().sel(layer=last).values[:, : model.heads[last]]
    summed = patterns.double().sum(1)
    within = summed[:, -n_positions:-1, -n_positions:]
    rows = within / within.sum(-1, keepdim=True).clamp(min=SMALLEST)
    return torch.cat([torch.zeros_like(rows[:, :1]), rows], dim=1)


def kernel_errors(
    comparison: Float[Tensor, "parent child"], kernel: Float[Tensor, "parent child"]
) -> dict[str, float]:
    """How far layer 2's matrix is from the logarithm of the kernel, by column and by row.

    Posteriors do not change if a constant is added to a column, so only columns are determined:
    with `softmax(W)` and `softmax(log π)` over parents, `kernel/column_error` is the mean over
    children of `Σ_parents |difference|`, between 0 and 2. `kernel/row_error` is the same with
    softmaxes over children, where softmax(log π) is π itself.

    Example:
        >>> kernel = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> shifted = kernel.log() + torch.tensor([3.0, -1.0])
        >>> {name: round(value, 3) for name, value in kernel_errors(shifted, kernel).items()}
        {'kernel/column_error': 0.0, 'kernel/row_error': 0.83}
    """
    learned, log_kernel = comparison.detach().double(), kernel.double().log().to(comparison.device)
    errors = [
        (learned.softmax(dim) - log_kernel.softmax(dim)).abs().sum(dim).mean().item()
        for dim in (0, 1)
    ]
    return dict(zip(("kernel/column_error", "kernel/row_error"), errors, strict=True))


@torch.no_grad()
def copy_figures(model: InContextGraphTransformer) -> dict[str, float]:
    """Which examples and columns the heads of layer 1 copy.

    Returns:
        `copies/examples_chosen`, the share of examples to which some head attends most;
        `copies/example_attention`, the largest attention to an example, and `copies/own_column`,
        attention to the column itself, both means over heads.
    """
    examples, columns = model.attention_to_examples(), model.attention_to_columns()
    chosen = examples.argmax(-1).unique()
    return {
        "copies/examples_chosen": len(chosen) / model.n_examples,
        "copies/example_attention": examples.amax(-1).mean().item(),
        "copies/own_column": columns.diagonal(dim1=1, dim2=2).mean().item(),
    }
