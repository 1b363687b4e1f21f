"""Run a model over many sequences in batches of bounded memory, without changing the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from probes.reading.errors import ProbeError
from probes.reading.hook_names import config_of, hook_name, hook_points, modules_of
from probes.reading.hooking import Hooks, converted
from probes.reading.padding import real_positions

MAX_BATCH_BYTES = 64 * 2**20
"""Default limit on the estimated activations of one batch, in bytes."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; then every module gets its mode back.

    >>> model = nn.Dropout()
    >>> with undisturbed(model):
    ...     model.training, torch.is_grad_enabled()
    (False, False)
    >>> model.training
    True
    """
    modules = modules_of(model)
    modes = [module.training for module in modules]
    try:
        if any(modes):
            model.eval()
        with torch.no_grad():
            yield
    finally:
        try:
            _set_modes(modules, modes)
        finally:  # Ctrl-C may have interrupted the first call
            _set_modes(modules, modes)


def _set_modes(modules: list[nn.Module], modes: list[bool]) -> None:
    for module, mode in zip(modules, modes, strict=True):
        if module.training != mode:
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block no parameter of the model requires a gradient; then each does as before."""
    parameters = {
        id(parameter): parameter
        for module in modules_of(model)
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad
    }
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(True)


def device_of(model: nn.Module) -> torch.device:
    """The device for the model's tokens: that of its first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def checked_tokens(model: nn.Module, tokens: Tensor) -> Int[Tensor, "batch pos"]:
    """The tokens on the model's device, checked against its vocabulary and context.

    Raises:
        ValueError: the tokens are not a non-empty integer tensor `[batch, pos]`.
        ProbeError: a token outside the vocabulary, or a sequence longer than the context.
    """
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex() or not tokens.numel():
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)} and type {tokens.dtype}; "
            "expected integers [batch, pos], at least one"
        )
    config = config_of(model)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.d_vocab:
        raise ProbeError(
            f"tokens run from {low} to {high}, the model's vocabulary from 0 to "
            f"{config.d_vocab - 1}"
        )
    if tokens.shape[1] > config.n_ctx:
        raise ProbeError(
            f"sequences of {tokens.shape[1]} tokens do not fit the context of {config.n_ctx}"
        )
    return tokens.long().to(device_of(model))


def batch_rows(model: nn.Module, pos: int, max_bytes: int, *, logits: bool = False) -> int:
    """How many sequences of `pos` tokens one pass may take; at least 1.

    The estimated peak of one sequence is four score-sized tensors (scores, mask, pattern, copy),
    four of the MLP's width, eight of the residual stream's, and three of the vocabulary's if the
    pass computes logits (a bridge always does).

    Raises:
        ValueError: the limit is not positive.
    """
    if max_bytes < 1:
        raise ValueError(f"max_batch_bytes is {max_bytes}; it must be at least 1")
    config: Any = model.cfg
    width = 4 * config.n_heads * pos + 8 * config.d_model
    if not getattr(config, "attn_only", False):
        width += 4 * (getattr(config, "d_mlp", None) or 4 * config.d_model)
    if logits or hasattr(model, "original_model"):
        width += 3 * config.d_vocab
    itemsize = next((parameter.element_size() for parameter in model.parameters()), 4)
    return int(max(1, max_bytes // (width * pos * itemsize)))


def run(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"] | None = None,
) -> None:
    """One forward pass only for its hooks; a HookedTransformer then skips the unembedding.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: its input.
        real: False at padding, passed on as attention mask; None if there is no padding.
    """
    model(tokens, return_type=None, **mask_argument(real))


def mask_argument(real: Tensor | None) -> dict[str, Tensor]:
    """The keyword that tells a model which positions hold text; none if all do."""
    return {} if real is None else {"attention_mask": real.long()}


def checked_logits(
    model: nn.Module, tokens: Int[Tensor, "batch pos"], real: Tensor | None, purpose: str
) -> Float[Tensor, "batch pos vocab"]:
    """The logits of one forward pass; `purpose` says in the error what needs them.

    Raises:
        ProbeError: there is not one logit for every token of the vocabulary.
    """
    logits: Tensor = model(tokens, return_type="logits", **mask_argument(real))
    if logits.ndim != 3 or logits.shape[-1] < config_of(model).d_vocab:
        raise ProbeError(
            f"{purpose} needs logits for every token of the vocabulary, "
            f"{type(model).__name__} gives shape {tuple(logits.shape)}"
        )
    return logits


def next_token_losses(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos-1"]:
    """`-log p(t[i+1] | t[0..i])` at index i, in nats and at least float32."""
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    targets = tokens[:, 1:].to(wide.device)
    return torch.nn.functional.cross_entropy(wide.mT, targets, reduction="none")


def attends_ahead(model: nn.Module) -> bool:
    """Whether any head attends to later tokens, as in BERT, in a pass over three tokens.

    Such a model reads the next token before predicting it: its next-token loss has no meaning.
    """
    points, config = hook_points(model), config_of(model)
    ahead: list[bool] = []

    def check(point: nn.Module, inputs: Any, weights: Tensor) -> None:
        ahead.append(bool(converted(point, weights).triu(1).any()))

    length = min(3, config.n_ctx)
    tokens = torch.arange(length, device=device_of(model)).unsqueeze(0) % config.d_vocab
    with undisturbed(model), Hooks() as hooks:
        for layer in range(config.n_layers):
            if (point := points.get(hook_name("pattern", layer))) is not None:
                hooks.add(point, check)
        run(model, tokens)
    return any(ahead)


def token_losses(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    *,
    attention_mask: Shaped[Tensor, "batch mask_pos"] | None = None,
    max_batch_bytes: int = MAX_BATCH_BYTES,
) -> Float[Tensor, "batch pos-1"]:
    """Loss of every token after the first: `-log p(t[i+1] | t[0..i])` at index i.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        tokens: sequences of at least two tokens.
        attention_mask: 0 at padding; None to find padding by the tokenizer's PAD token, see
            `padding.real_positions`.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.

    Returns:
        Losses in nats, `[batch, pos - 1]`; NaN where this token or the next is padding.

    Raises:
        ValueError: the tokens are not `[batch, pos]` with pos >= 2, or the mask differs in shape.
        ProbeError: tokens outside the vocabulary or context, or a model that predicts another
            vocabulary, or that attends to later tokens.
    """
    tokens = checked_tokens(model, tokens)
    if tokens.shape[1] < 2:
        raise ValueError("sequences of one token have no next token: a loss needs at least two")
    if attends_ahead(model):
        raise ProbeError(
            f"{type(model).__name__} attends to later tokens: it has no next-token loss"
        )
    real = real_positions(model, tokens, attention_mask)
    losses = []
    rows = batch_rows(model, tokens.shape[1], max_batch_bytes, logits=True)
    with undisturbed(model):
        for batch, batch_real in split(rows, tokens, real):
            logits = checked_logits(model, batch, batch_real, "a loss")
            losses.append(next_token_losses(logits, batch))
    token_loss = torch.cat(losses)
    if real is None:
        return token_loss
    both_real = (real[:, :-1] & real[:, 1:]).to(token_loss.device)
    return token_loss.masked_fill(~both_real, torch.nan)


def split(rows: int, tokens: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Batches of `rows` sequences of the tokens and of each further tensor (None stays None)."""
    parts = [tokens.split(rows)]
    parts += [(None,) * len(parts[0]) if other is None else other.split(rows) for other in others]
    yield from zip(*parts, strict=True)
