"""Score every head of a model for the roles in an induction circuit.

Cost: one forward pass over the repeated sequences and one over their controls, without unembedding.
Patterns are not kept: memory holds a few numbers per head and sequence, and per head one sum for
every distance between query and key.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from probes.heads.copying import copying_scores
from probes.heads.head_table import CONTROLS, UNIFORM, HeadScores
from probes.heads.induction import AttentionTo, InductionScores
from probes.heads.scores import SCORE_MASKS, uniform_baseline, uniform_pattern
from probes.heads.stimuli import Bos, Stimulus, draw_stimuli, given_stimuli
from probes.heads.token_sources import TokenSource
from probes.reading.activation import Activation
from probes.reading.attach import attach
from probes.reading.errors import ProbeError
from probes.reading.hook_names import config_of, layers_with
from probes.reading.labelled import LabelledTensor
from probes.reading.padding import pairs_of
from probes.reading.passes import (
    MAX_BATCH_BYTES,
    attends_ahead,
    batch_rows,
    run,
    split,
    undisturbed,
)

COPYING_TOKENS = 4096
"""`copying` uses at most this many tokens, evenly spaced in the vocabulary."""


def score_heads(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"] | None = None,
    *,
    attention_mask: Shaped[Tensor, "batch mask_pos"] | None = None,
    n_sequences: int = 32,
    repeat_lengths: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    threshold: float = 0.4,
    max_batch_bytes: int = MAX_BATCH_BYTES,
    bos: Bos = "auto",
    source: TokenSource | None = None,
) -> HeadScores:
    """Score every head as induction, previous-token, duplicate-token and positional head.

    By default the tokens are random blocks repeated twice, of about five repeat lengths R, and
    controls of the same shape do not repeat. With attention A and q over the second copy:

    - prefix matching: `mean_q A[q, q-R+1]`; positional control: the same entries on the controls;
    - duplicate token: `mean_q A[q, q-R]`, with the same kind of control;
    - previous token: mean of `A[q, q-1]` over all q >= 1;
    - positional: `max over d >= 2 of mean_q A[q, q-d]` on the controls, without keys at position 0.
      An offset d counts only if more than `1 / threshold` and at least a quarter of all queries
      have it, so that attention to one fixed position cannot reach the threshold;
    - copying: `copying_score`, on at most 4,096 tokens evenly spaced in the vocabulary.

    With `tokens`, the scores use the masks of `probes.heads.scores` on these tokens, and the
    controls are random tokens of the same shape and padding; `n_sequences`, `repeat_lengths` and
    `bos` are then ignored. The controls skip entries where a random token happens to recur, and no
    score counts padding.

    Args:
        model: a HookedTransformer or TransformerBridge, with or without tokenizer; left as it was.
        tokens: sequences to score; None for random ones.
        attention_mask: 0 at padding of `tokens`, which the model gets too; None to find padding by
            the tokenizer's PAD token, see `padding.real_positions`.
        n_sequences: number of repeated sequences over all repeat lengths; the controls are as many.
        repeat_lengths: tokens in the repeated block, each at least 3; None for about five that fit.
        generator: the source of randomness; None for a new one with seed 0.
        threshold: the score at which a head gets a verdict, in (0, 1].
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.
        bos: token at the start: a token, None, or "auto" for the tokenizer's BOS.
        source: where blocks and controls come from, such as `frequent_tokens` or `text_segments`;
            None for uniformly random ids. Ignored with `tokens`.

    Returns:
        Scores `[layer, head]` with standard errors over sequences, and verdicts.

    Raises:
        ValueError: `n_sequences`, a repeat length, `threshold`, or the shape of tokens or mask is
            not allowed.
        ProbeError: the model has no attention, the context is too short for two repeats, a token
            is outside the vocabulary, or no token recurs.

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> scores = score_heads(model, n_sequences=8)
    >>> scores.prefix_matching.shape, scores.heads("induction")
    (torch.Size([1, 2]), [])
    """
    _check_threshold(threshold)
    layers_with(model, "pattern")
    if tokens is None:
        stimuli = draw_stimuli(
            model,
            n_sequences=n_sequences,
            repeat_lengths=repeat_lengths,
            generator=generator,
            bos=bos,
            source=source,
        )
    else:
        stimuli = given_stimuli(model, tokens, attention_mask=attention_mask, generator=generator)
    return _scored(model, [stimuli], threshold=threshold, max_batch_bytes=max_batch_bytes)[0]


def score_heads_on(
    model: nn.Module,
    sources: Sequence[TokenSource | None],
    *,
    n_sequences: int = 32,
    repeat_lengths: Sequence[int] | None = None,
    seed: int = 0,
    threshold: float = 0.4,
    max_batch_bytes: int = MAX_BATCH_BYTES,
    bos: Bos = "auto",
) -> list[HeadScores]:
    """`score_heads` on several kinds of stimuli, which share what does not depend on them.

    Each result equals `score_heads(source=..., generator=...)` with a generator of this seed. The
    copying scores and the check for attention to later tokens are made once; each stimulus takes
    its two passes and no other.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        sources: where the tokens come from; None for uniformly random ids.
        n_sequences: as in `score_heads`, for each source.
        repeat_lengths: as in `score_heads`.
        seed: seed of the randomness of each source.
        threshold: as in `score_heads`.
        max_batch_bytes: as in `score_heads`.
        bos: as in `score_heads`.

    Returns:
        The scores, in the order of the sources.

    Raises:
        ValueError, ProbeError: as `score_heads`.
    """
    _check_threshold(threshold)
    layers_with(model, "pattern")
    drawn = [
        draw_stimuli(
            model,
            n_sequences=n_sequences,
            repeat_lengths=repeat_lengths,
            generator=torch.Generator().manual_seed(seed),
            bos=bos,
            source=source,
        )
        for source in sources
    ]
    return _scored(model, drawn, threshold=threshold, max_batch_bytes=max_batch_bytes)


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must be above 0 and at most 1")


def _scored(
    model: nn.Module,
    drawn: Sequence[Sequence[Stimulus]],
    *,
    threshold: float,
    max_batch_bytes: int,
) -> list[HeadScores]:
    """Scores of each group of stimuli."""
    causal = not attends_ahead(model)
    scores = []
    copying: Tensor | None = None
    for stimuli in drawn:
        results = _scan_results(model, stimuli, causal, threshold, max_batch_bytes)
        if copying is None:
            copying = _copying(model, like=results["prefix_matching"])
        scores.append(
            HeadScores(
                layers=layers_with(model, "pattern"),
                n_layers=config_of(model).n_layers,
                sequences=sum(len(stimulus.tokens) for stimulus in stimuli),
                threshold=threshold,
                copying=copying,
                **results,
            )
        )
    return scores


def _scan_results(
    model: nn.Module,
    stimuli: Sequence[Stimulus],
    causal: bool,
    threshold: float,
    max_batch_bytes: int,
) -> dict[str, Tensor]:
    """The scores that depend on attention, by their names in `HeadScores`."""
    scan = _Scan(causal=causal)
    with undisturbed(model):
        for stimulus in stimuli:
            scan.add(model, stimulus, max_batch_bytes)
    uniform = {name: torch.cat(values).nanmean() for name, values in scan.uniform.items()}
    if uniform["prefix_matching"].isnan():
        raise ProbeError("no token recurs in the sequences given: there is nothing to score")
    results: dict[str, Tensor] = {}
    for name, readings in scan.readings.items():
        values = torch.cat([reading.values for reading in readings], dim=1)
        scores = LabelledTensor(name, values, ("layer", "batch", "head"))
        results[name] = scores.mean("batch").values
        results[f"{name}_stderr"] = scores.stderr("batch").values
    by_offset = _positional(scan.offsets, threshold)
    results["positional"], results["positional_offset"], results["positional_uniform"] = by_offset
    prefix_matching = results["prefix_matching"]
    for name, value in uniform.items():
        results[UNIFORM[name]] = value.to(prefix_matching).expand_as(prefix_matching).clone()
    return results


class _Scan:
    """Accumulates the readings of all stimuli.

    Attributes:
        readings: by score, the reading `[layer batch head]` of every batch.
        uniform: by score, the scores of uniform attention `[batch]` of every batch.
        offsets: for every stimulus, the sums of attention by distance `[layer head offset]`, the
            same of uniform attention `[offset]`, and the number of query-key pairs `[offset]`.
    """

    def __init__(self, *, causal: bool) -> None:
        self._causal = causal
        self.readings: dict[str, list[LabelledTensor]] = {}
        self.uniform: dict[str, list[Tensor]] = {}
        self.offsets: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, model: nn.Module, stimulus: Stimulus, max_batch_bytes: int) -> None:
        """Run the model over a stimulus and its control, and add the readings."""
        real: Tensor | None = None

        def by_offset(pattern: Tensor) -> Tensor:
            # One row a pass; `real` is the mask of the batch that the pass runs on.
            return _by_offset(_without_first(pattern, real).sum(0)).unsqueeze(0)

        offsets = Activation("pattern", reduce=by_offset, axes=("head", "offset"))
        rows = batch_rows(model, stimulus.tokens.shape[1], max_batch_bytes)
        for tokens, control, real in split(rows, stimulus.tokens, stimulus.control, stimulus.real):
            # Random tokens hold no padding, even where one equals the tokenizer's PAD token.
            text = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
            with attach(model, InductionScores(attention_mask=text)) as (scores,):
                run(model, tokens, real)
            masks = {name: mask(tokens, real) for name, mask in SCORE_MASKS.items()}
            reading = scores.reading()
            for name, keys in masks.items():
                self._add(name, reading.sel(score=name))
                by_chance = uniform_baseline(keys, causal=self._causal, attention_mask=real)
                self.uniform.setdefault(name, []).append(by_chance)
            controls: dict[str, AttentionTo] = {}
            for score, name in CONTROLS.items():
                # The same keys, unless a random token happens to recur there too.
                keys = masks[score] & ~SCORE_MASKS[score](control, real)
                controls[name] = AttentionTo(None, keys, attention_mask=text)
            with attach(model, offsets, *controls.values()):
                run(model, control, real)
            for name, attention in controls.items():
                self._add(name, attention.reading())
        sums = offsets.reading().values * offsets.batches
        self.offsets.append((sums, *self._reference(stimulus)))

    def _reference(
        self, stimulus: Stimulus
    ) -> tuple[Float[Tensor, "offset"], Float[Tensor, "offset"]]:
        """Sums of uniform attention by distance, and the number of query-key pairs."""
        batch, pos = stimulus.tokens.shape
        real = stimulus.real
        pattern = uniform_pattern(pos, self._causal, real, device=stimulus.tokens.device)
        copies = 1 if real is not None else batch  # without padding the pattern is a batch of one
        uniform, count = (
            _by_offset(_without_first(values, real).sum(0))[0] * copies
            for values in (pattern, torch.ones_like(pattern))
        )
        return uniform, count

    def _add(self, name: str, reading: LabelledTensor) -> None:
        self.readings.setdefault(name, []).append(reading)


def _without_first(
    pattern: Float[Tensor, "batch head query key"], real: Bool[Tensor, "batch pos"] | None
) -> Float[Tensor, "batch head rest rest"]:
    """The pattern without position 0, and 0 at padding and at the first position of text."""
    if real is None:
        return pattern[:, :, 1:, 1:]
    later = real & (real.cumsum(1) > 1)
    return (pattern * pairs_of(later.to(pattern.device)).unsqueeze(1))[:, :, 1:, 1:]


def _by_offset(pattern: Float[Tensor, "head query key"]) -> Float[Tensor, "head offset"]:
    """`Σ_q A[q, q-d]` for every offset d from 0."""
    n_heads, n, _ = pattern.shape
    # Reshaped to rows of n + 1 instead of n, entry (q, k) lies in column (k - q) mod (n + 1).
    flat = torch.nn.functional.pad(pattern.tril().flatten(1), (0, n))
    return flat.view(n_heads, n, n + 1).sum(1).roll(-1, 1).flip(1)[:, :n]


def _positional(
    offsets: Sequence[tuple[Tensor, Tensor, Tensor]], threshold: float
) -> tuple[Float[Tensor, "layer head"], Int[Tensor, "layer head"], Float[Tensor, "layer head"]]:
    """Largest mean attention at an offset >= 2, that offset, and uniform attention's mean there."""
    width = max(sums.shape[-1] for sums, _, _ in offsets)
    total = offsets[0][0].new_zeros(*offsets[0][0].shape[:2], width)
    uniform, count = total.new_zeros(width), total.new_zeros(width)
    for sums, uniform_sums, pairs in offsets:
        size = sums.shape[-1]
        total[..., :size] += sums
        uniform[:size] += uniform_sums.to(uniform)
        count[:size] += pairs.to(count)
    longest = int((count > 0).sum())
    needed = max(math.floor(1 / threshold) + 1, math.ceil(longest / 4))
    usable = longest + 1 - needed
    if usable <= 2:
        unknown = torch.full_like(total[..., 0], torch.nan)
        return unknown, torch.zeros_like(unknown, dtype=torch.int64), unknown
    values, best = (total / count)[..., 2:usable].max(-1)
    return values, best + 2, (uniform / count)[best + 2]


def _copying(model: nn.Module, *, like: Tensor) -> Float[Tensor, "layer head"]:
    """Copying scores; NaN if the model has none, as when it predicts another vocabulary."""
    try:
        return copying_scores(model, max_tokens=COPYING_TOKENS).to(like)
    except ProbeError:
        return torch.full_like(like, torch.nan)
