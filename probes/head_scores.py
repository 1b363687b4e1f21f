"""Score every head of a model on what makes an induction circuit, in the passes that this needs.

Cost: one forward pass over the repeated sequences and one over their controls, no unembedding.
Patterns are read as they pass by; what stays is a few numbers per head and sequence, and per
head one sum for every distance that attention can bridge.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes import hook_names
from probes.attach import ForwardHook, attach
from probes.circuits import copying_scores
from probes.errors import ProbeError
from probes.head_table import HeadScores
from probes.hook_names import attention_layers
from probes.induction import AttentionTo, InductionScores
from probes.labelled import LabelledTensor
from probes.passes import MAX_BATCH_BYTES, batch_rows, run, undisturbed
from probes.records import LayerProbe, Sum
from probes.scores import duplicate_token_mask, prefix_matching_mask, uniform_baseline
from probes.stimuli import Bos, Stimulus, draw_stimuli, given_stimuli

COPYING_TOKENS = 4096
"""A larger vocabulary is represented in `copying` by this many of its tokens, evenly spaced."""


def score_heads(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"] | None = None,
    *,
    n_sequences: int = 32,
    repeat_lengths: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    threshold: float = 0.4,
    max_batch_bytes: int = MAX_BATCH_BYTES,
    bos: Bos = "auto",
) -> HeadScores:
    """Which heads are induction, previous-token, duplicate-token or merely positional heads.

    By default on random tokens repeated twice, in about five repeat lengths R, and on controls of
    the same shape that do not repeat. With attention A, q running over the second copy:

    - induction `mean_q A[q, q-R+1]`, positional control: the same entries on the controls;
    - duplicate token `mean_q A[q, q-R]`, with its control;
    - previous token: mean of `A[q, q-1]` over all q >= 1;
    - positional: `max over d >= 2 of mean_q A[q, q-d]` on the controls, keys at position 0 left
      out. Only offsets that more than `1 / threshold` and a quarter of all query positions have:
      a head that rests on one fixed position cannot reach the threshold;
    - copying: `copying_score`, a vocabulary above 4,096 tokens being represented by as many.

    With `tokens`, their own recurrences are scored, by the masks of `probes.scores`, and the same
    entries on random tokens of that shape are the controls; `n_sequences`, `repeat_lengths` and
    `bos` are then not used. Control entries where control tokens happen to recur are left out.

    Args:
        model: a HookedTransformer or TransformerBridge; a tokenizer is not needed. Afterwards it
            is as it was: no hooks, no gradients, the same training mode.
        tokens: sequences to score, or None to draw them.
        n_sequences: repeated sequences over all repeat lengths; the controls come on top.
        repeat_lengths: tokens in the repeated block, each at least 3; None for what fits.
        generator: the source of randomness; None for a new one with seed 0.
        threshold: from which score on a head gets its verdict, in (0, 1].
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.
        bos: token in front: a token, None, or "auto" for what the tokenizer asks for.

    Returns:
        Scores `[layer, head]` with standard errors over sequences, and verdicts.

    Raises:
        ValueError: `n_sequences`, a repeat length, `threshold` or the shape of `tokens`.
        ProbeError: no attention, a context too short for two repeats, tokens outside the
            vocabulary, or none of them recurs.

    >>> from transformer_lens import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> scores = score_heads(model, n_sequences=8)
    >>> scores.induction.shape, scores.heads("induction")
    (torch.Size([1, 2]), [])
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must be above 0 and at most 1")
    layers = attention_layers(model)
    config: Any = model.cfg
    if tokens is None:
        stimuli = draw_stimuli(
            model,
            n_sequences=n_sequences,
            repeat_lengths=repeat_lengths,
            generator=generator,
            bos=bos,
        )
    else:
        stimuli = given_stimuli(model, tokens, generator=generator)
    scan = _Scan()
    with undisturbed(model):
        for stimulus in stimuli:
            scan.take(model, stimulus, max_batch_bytes)
    baseline = torch.cat(scan.uniform).nanmean()
    if baseline.isnan():
        raise ProbeError("no token recurs in the sequences given: there is nothing to score")
    results: dict[str, Tensor] = {}
    for name, readings in scan.readings.items():
        values = torch.cat([reading.values for reading in readings], dim=1)
        scores = LabelledTensor(name, values, ("layer", "batch", "head"))
        results[name] = scores.mean("batch").values
        results[f"{name}_stderr"] = scores.stderr("batch").values
    results["positional"], results["positional_offset"] = _positional(scan.offsets, threshold)
    induction = results["induction"]
    return HeadScores(
        layers=layers,
        n_layers=config.n_layers,
        sequences=sum(len(stimulus.tokens) for stimulus in stimuli),
        threshold=threshold,
        copying=_copying(model, induction),
        uniform_baseline=baseline.to(induction).expand_as(induction).clone(),
        **results,
    )


class _Scan:
    """Readings `[layer batch head]` by score, and the sums that make the positional profile."""

    def __init__(self) -> None:
        self.readings: dict[str, list[LabelledTensor]] = {}
        self.uniform: list[Tensor] = []
        self.offsets: list[tuple[Tensor, int]] = []

    def take(self, model: nn.Module, stimulus: Stimulus, max_batch_bytes: int) -> None:
        """Run the model over a stimulus and its control."""
        offsets = _OffsetSums(None, Sum)
        rows = batch_rows(model, stimulus.tokens.shape[1], max_batch_bytes)
        batches = zip(stimulus.tokens.split(rows), stimulus.control.split(rows), strict=True)
        for tokens, control in batches:
            with attach(model, InductionScores()) as (scores,):
                run(model, tokens)
            reading = scores.reading()
            self._add("induction", reading.sel(score="prefix_matching"))
            self._add("previous_token", reading.sel(score="previous_token"))
            self._add("duplicate_token", reading.sel(score="duplicate_token"))
            self.uniform.append(_uniform(model, tokens))
            induction, duplicate = (
                AttentionTo(None, mask(tokens) & ~mask(control))
                for mask in (prefix_matching_mask, duplicate_token_mask)
            )
            with attach(model, induction, duplicate, offsets):
                run(model, control)
            self._add("positional_control", induction.reading())
            self._add("duplicate_control", duplicate.reading())
        self.offsets.append((offsets.reading().values, len(stimulus.control)))

    def _add(self, name: str, reading: LabelledTensor) -> None:
        self.readings.setdefault(name, []).append(reading)


class _OffsetSums(LayerProbe[Sum]):
    """Attention by distance, `Σ_b Σ_q A[b, q, q-d]`, without the keys at position 0."""

    def hooks(self, model: nn.Module) -> Mapping[str, ForwardHook]:
        return {
            hook_names.pattern(layer): partial(self._read, layer) for layer in self._layers(model)
        }

    def _read(self, layer: int, pattern: Tensor) -> None:
        self._records[layer].add(_by_offset(pattern.sum(0)[:, 1:, 1:]).unsqueeze(0))

    def _seen(self) -> str:
        return "forward pass"

    def reading(self) -> LabelledTensor:
        records = self._complete_records()
        sums = self._stack({layer: record.sum() for layer, record in records.items()})
        return LabelledTensor("attention_by_offset", sums, ("layer", "head", "offset"))


def _by_offset(pattern: Float[Tensor, "head query key"]) -> Float[Tensor, "head offset"]:
    """`Σ_q A[q, q-d]` for every offset d from 0."""
    n_heads, n, _ = pattern.shape
    # Read in rows of n + 1 instead of n, entry (q, k) comes to stand in column (k - q) mod (n + 1).
    flat = torch.nn.functional.pad(pattern.tril().flatten(1), (0, n))
    return flat.view(n_heads, n, n + 1).sum(1).roll(-1, 1).flip(1)[:, :n]


def _positional(
    offsets: Sequence[tuple[Tensor, int]], threshold: float
) -> tuple[Float[Tensor, "layer head"], Int[Tensor, "layer head"]]:
    """The largest mean attention at a fixed offset of two or more, and that offset."""
    longest = max(sums.shape[-1] for sums, _ in offsets)
    total = offsets[0][0].new_zeros(*offsets[0][0].shape[:2], longest)
    count = total.new_zeros(longest)
    for sums, sequences in offsets:
        size = sums.shape[-1]
        total[..., :size] += sums
        count[:size] += sequences * torch.arange(size, 0, -1, device=count.device)
    needed = max(math.floor(1 / threshold) + 1, math.ceil(longest / 4))
    usable = longest + 1 - needed
    if usable <= 2:
        unknown = torch.full_like(total[..., 0], torch.nan)
        return unknown, torch.zeros_like(unknown, dtype=torch.int64)
    values, best = (total / count)[..., 2:usable].max(-1)
    return values, best + 2


def _uniform(model: nn.Module, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch"]:
    """What uniform attention scores as induction."""
    config: Any = model.cfg
    causal = getattr(config, "attention_dir", "causal") == "causal"
    return uniform_baseline(prefix_matching_mask(tokens), causal=causal)


def _copying(model: nn.Module, induction: Tensor) -> Float[Tensor, "layer head"]:
    """Copying scores, NaN for a model that has none."""
    try:
        return copying_scores(model, max_tokens=COPYING_TOKENS).to(induction)
    except ProbeError:
        return torch.full_like(induction, torch.nan)
