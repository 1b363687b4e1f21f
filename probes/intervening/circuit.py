"""The two-step induction circuit, shown by interventions: which head feeds which input of which."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from probes.heads.logit_attribution import attribute_logits, repeated_sequences
from probes.heads.stimuli import Bos
from probes.intervening.ablation_effects import NEGLIGIBLE
from probes.intervening.patching import INPUTS, Input, Patching
from probes.reading.frames import pandas
from probes.reading.head_outputs import check_sum_of_heads, read_values
from probes.reading.hook_names import Head, check_head, config_of, layers_with
from probes.reading.labelled import standard_error
from probes.reading.passes import MAX_BATCH_BYTES, batch_rows

STANDARD_ERRORS = 5.0
"""A path is named if its effect exceeds this many standard errors."""


@dataclass(frozen=True)
class HeadEffect:
    """What one head contributes to predicting the repeated half.

    Attributes:
        layer: the head's layer.
        head: the head's number in that layer.
        logit: what the head itself adds to the right token's logit, see
            `direct_logit_attribution`.
        logit_stderr: its standard error (NaN for one sequence).
        rise: mean rise of the loss when the head's output is that on another sequence (resample
            ablation), in nats per token.
        rise_stderr: its standard error, paired over sequences (NaN for one sequence).
    """

    layer: int
    head: int
    logit: float
    logit_stderr: float
    rise: float
    rise_stderr: float


@dataclass(frozen=True)
class PathEffect:
    """What changes when one input of the receiver reads the sender's output on another sequence.

    Attributes:
        sender: the earlier head, as (layer, head).
        receiver: the later head, as (layer, head).
        input: what the receiver reads: "k" keys, "q" queries, "v" values (K-, Q-, V-composition).
        rise: mean rise of the loss on the repeated half, in nats per token.
        rise_stderr: its standard error, paired over sequences (NaN for one sequence).
        attention_drop: mean drop of the receiver's prefix matching, a share of attention.
        attention_drop_stderr: its standard error, paired over sequences.
        named: whether the path is part of the circuit: `rise` exceeds `standard_errors` times its
            standard error, and `negligible`.
    """

    sender: Head
    receiver: Head
    input: Input
    rise: float
    rise_stderr: float
    attention_drop: float
    attention_drop_stderr: float
    named: bool

    def __str__(self) -> str:
        (layer, head), (later, receiver) = self.sender, self.receiver
        return f"{layer}.{head} → {later}.{receiver} {self.input}"


@dataclass(frozen=True)
class Circuit:
    """Effects of heads, and of the paths between them, on the repeated half.

    Attributes:
        heads: the effect of every sender and receiver, receivers first.
        paths: the effect of every path, in the order of receivers, senders and inputs.
        loss: loss of the intact model on the repeated half, in nats per token.
        sequences: number of sequences.
        standard_errors: how many standard errors name a path.
        negligible: the smallest rise that names a path, in nats per token.
    """

    heads: tuple[HeadEffect, ...]
    paths: tuple[PathEffect, ...]
    loss: float
    sequences: int
    standard_errors: float
    negligible: float

    @property
    def named(self) -> tuple[PathEffect, ...]:
        """The paths that are part of the circuit, the largest rise first."""
        return tuple(sorted((p for p in self.paths if p.named), key=lambda path: -path.rise))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""
        values = asdict(self)
        for name in ("heads", "paths"):
            values[name] = [
                {key: None if value != value else value for key, value in row.items()}
                for row in values[name]
            ]
        for path in values["paths"]:
            path["sender"], path["receiver"] = list(path["sender"]), list(path["receiver"])
        return values

    def to_frame(self) -> Any:
        """A pandas frame with one row per path; columns: the attributes of `PathEffect`."""
        return pandas().DataFrame([asdict(path) for path in self.paths])

    def __repr__(self) -> str:
        paths = ", ".join(f"{path} {path.rise:+.3f}" for path in self.named) or "no path named"
        return f"Circuit({len(self.paths)} paths, {self.sequences} sequences: {paths})"


def find_circuit(
    model: nn.Module,
    senders: Sequence[Head],
    receivers: Sequence[Head],
    *,
    inputs: Sequence[Input] = INPUTS,
    tokens: Int[Tensor, "batch pos"] | None = None,
    n_sequences: int = 32,
    repeat_length: int | None = None,
    generator: torch.Generator | None = None,
    standard_errors: float = STANDARD_ERRORS,
    negligible: float = NEGLIGIBLE,
    max_batch_bytes: int = MAX_BATCH_BYTES,
    bos: Bos = "auto",
) -> Circuit:
    """Which earlier heads feed which inputs of later heads, by path patching.

    On random tokens repeated twice, for each sender, each receiver in a later layer, and its keys,
    queries or values: this one input reads the sender's output on another sequence,
    `x + (z_other - z_own) W_O` in place of the residual stream x, and everything else stays. The
    effect is the rise of the loss on the repeated half (`repeated_pairs`), beside the drop of the
    receiver's prefix matching. A path is named if the rise exceeds 5 standard errors and 0.05 nats.

    What it establishes: the model's predictions on these sequences rest on that path, through the
    residual stream alone. What it does not: a path without effect may still carry information, if
    another head makes up for it (each path is patched alone) or if softmax saturates; paths through
    MLPs or heads in between are not tested.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        senders: the earlier heads as (layer, head), such as previous-token heads.
        receivers: the later heads as (layer, head), such as induction heads.
        inputs: which inputs of the receivers are tested: "k", "q", "v".
        tokens: at least two sequences in which pairs of tokens recur; each sequence's "other" is
            the one before. None for random ones, whose others are as many further random ones.
        n_sequences: number of sequences to draw, where no tokens are given.
        repeat_length: tokens in the block, at least 3; None for the longest that fits, at most 50.
        generator: the source of randomness; None for a new one with seed 0.
        standard_errors: a path is named if its rise exceeds this many standard errors.
        negligible: a path is named only if its rise exceeds this many nats.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.
        bos: token at the start: a token, None, or "auto" for the tokenizer's BOS.

    Returns:
        The effects of heads and paths. Cost: one pass per head, and (inputs + 1) per pair of
        heads, each from the (later) head's layer on.

    Raises:
        ValueError: a number is out of range, an unknown input, or fewer than two
            sequences.
        ProbeError: a head does not exist; the tokens do not fit the model; the model attends to
            later tokens, normalises what its heads write, or computes without its hook points.

    Source:
        Wang et al. 2022, "Interpretability in the Wild"; Goldowsky-Dill et al. 2023, "Localizing
        Model Behavior with Path Patching"; Elhage et al. 2021 (the three compositions).

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> find_circuit(model, [(0, 0), (0, 1)], [(1, 0)], n_sequences=8)
    Circuit(6 paths, 8 sequences: no path named)
    """
    _check_options(inputs, standard_errors, negligible, tokens)
    heads = tuple(dict.fromkeys([*receivers, *senders]))
    for head in heads:
        check_head(model, head)
    is_drawn = tokens is None
    tokens, pairs = repeated_sequences(
        model,
        tokens,
        n_sequences=2 * n_sequences,
        repeat_length=repeat_length,
        generator=generator,
        bos=bos,
    )
    layers = tuple(sorted({layer for layer, _ in heads}))
    check_sum_of_heads(model, layers, tokens[:2])
    own = read_values(model, layers, tokens, batch_rows(model, tokens.shape[1], max_batch_bytes))
    if is_drawn:
        tokens, pairs = tokens[:n_sequences], pairs[:n_sequences]
        other = {layer: z[n_sequences:] for layer, z in own.items()}
        own = {layer: z[:n_sequences] for layer, z in own.items()}
    else:
        other = {layer: z.roll(1, 0) for layer, z in own.items()}
    patching = Patching(model, tokens, pairs, own, other, max_batch_bytes)
    for layer in dict.fromkeys(layer for layer, _ in receivers):
        patching.check_edits(layer, inputs)
    intact = patching.intact()
    paths: list[PathEffect] = []
    for receiver in dict.fromkeys(receivers):
        earlier = [sender for sender in dict.fromkeys(senders) if sender[0] < receiver[0]]
        if not earlier:
            continue
        before = patching.intact(receiver)
        assert before.attention is not None
        for sender, name, after in patching.along_paths(earlier, receiver, inputs):
            assert after.attention is not None
            rise, stderr = _mean(after.loss - before.loss)
            drop = _mean(before.attention - after.attention)
            named = rise > negligible and rise > standard_errors * stderr
            paths.append(PathEffect(sender, receiver, name, rise, stderr, *drop, named))
    resampled = patching.resampled(heads)
    attribution = attribute_logits(model, tokens, pairs, max_batch_bytes)
    effects = []
    for layer, number in heads:
        index = attribution.layers.index(layer), number
        logit, error = attribution.logit[index].item(), attribution.stderr[index].item()
        rise, stderr = _mean(resampled[layer, number].loss - intact.loss)
        effects.append(HeadEffect(layer, number, logit, error, rise, stderr))
    return Circuit(
        heads=tuple(effects),
        paths=tuple(paths),
        loss=intact.loss.mean().item(),
        sequences=len(tokens),
        standard_errors=standard_errors,
        negligible=negligible,
    )


def heads_below(model: nn.Module, layer: int) -> list[Head]:
    """Every head in a layer below the given one, as (layer, head)."""
    n_heads = config_of(model).n_heads
    return [
        (i, head) for i in layers_with(model, "pattern") if i < layer for head in range(n_heads)
    ]


def _mean(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), standard_error(values).item()


def _check_options(
    inputs: Sequence[Input], standard_errors: float, negligible: float, tokens: Tensor | None
) -> None:
    if not inputs or any(name not in INPUTS for name in inputs):
        raise ValueError(f"inputs are {list(inputs)}; some of {', '.join(INPUTS)} are needed")
    for name, value in (("standard_errors", standard_errors), ("negligible", negligible)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must be at least 0")
    if tokens is not None and len(tokens) < 2:
        raise ValueError("one sequence has no other whose output could replace its own: give two")
