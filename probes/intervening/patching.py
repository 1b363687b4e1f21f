"""Put activations from other sequences into a pass: resample ablation and path patching.

Both ask what a prediction loses if one head tells of another sequence: resample ablation replaces
the head's output for everything that reads it, path patching for one input of one later head.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from probes.heads.scores import mean_weights, prefix_matching_mask
from probes.reading.activation import Activation
from probes.reading.attach import attach
from probes.reading.errors import ProbeError
from probes.reading.head_outputs import output_weights
from probes.reading.hook_names import Head, config_of, hook_name, hook_points, layers_with
from probes.reading.hooking import Hooks, converted
from probes.reading.passes import batch_rows, checked_logits, next_token_losses, run, undisturbed

Input: TypeAlias = Literal["k", "q", "v"]
"""What a head reads: its keys, queries or values."""
INPUTS: tuple[Input, ...] = get_args(Input)


@dataclass(frozen=True, eq=False)
class Readout:
    """What a pass of the intact or the patched model shows of every sequence, in float64.

    Attributes:
        loss: loss at the tokens that induction can predict, in nats.
        attention: prefix matching of the receiving head; None if no head receives.
    """

    loss: Float[Tensor, "batch"]
    attention: Float[Tensor, "batch"] | None = None


class Patching:
    """The sequences, and what heads write on them and on other sequences.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        tokens: the sequences.
        pairs: True where induction predicts the next token, at least once in every sequence.
        own: z of every head on `tokens`, by layer.
        other: z of every head on the other sequences, by layer.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Int[Tensor, "batch pos"],
        pairs: Bool[Tensor, "batch pos-1"],
        own: Mapping[int, Tensor],
        other: Mapping[int, Tensor],
        max_batch_bytes: int,
    ) -> None:
        self._model, self._points = model, hook_points(model)
        self._tokens = tokens
        self._pairs = pairs
        self._own, self._other = own, other
        self._rows = batch_rows(model, tokens.shape[1], max_batch_bytes, logits=True)
        self._keys = mean_weights(prefix_matching_mask(tokens).unsqueeze(1))
        config = config_of(model)
        positions = getattr(config, "positional_embedding_type", None)
        # A bridge always runs all layers; shortformer's keys need positions in every layer.
        self._runs_from = not hasattr(model, "original_model") and positions != "shortformer"
        self._streams: dict[int, Tensor] = {}

    def intact(self, receiver: Head | None = None) -> Readout:
        """The model without patches, and the attention of a head."""
        return self._measure(1, {}, receiver)[0]

    def resampled(self, heads: Sequence[Head]) -> Readout:
        """Every given head's output is that on the other sequences."""
        edits: dict[str, _Edit] = {}
        for layer in {layer for layer, _ in heads}:
            chosen = [head for own_layer, head in heads if own_layer == layer]
            values = self._other[layer][:, :, chosen]
            edits[hook_name("z", layer)] = (values, partial(_with_heads, chosen))
        return self._measure(1, edits)[0]

    def along_paths(
        self, senders: Sequence[Head], receiver: Head, inputs: Sequence[Input]
    ) -> Iterator[tuple[Head, Input, Readout]]:
        """One input of the receiver reads each sender's output on the other sequences.

        The residual stream that this input reads changes by
        `(z_other - z_own) W_O` of the sender; everything between the two heads, and everything else
        that reads the sender, stays as in the intact model.
        """
        layer, head = receiver
        replace_input = partial(_with_shared, config_of(self._model).n_heads, head)
        size = max(1, self._rows // len(self._tokens))
        for start in range(0, len(senders), size):
            group = senders[start : start + size]
            changed = self._inputs_after(group, layer, inputs)
            restored = self._own[layer].repeat(len(group), 1, 1, 1)
            by_input = {}
            for name in inputs:
                edits: dict[str, _Edit] = {
                    hook_name(name, layer): (changed[name], replace_input),
                    hook_name("z", layer): (restored, partial(_only_head, head)),
                }
                by_input[name] = self._measure(len(group), edits, receiver)
            for index, sender in enumerate(group):
                for name in inputs:
                    yield sender, name, by_input[name][index]

    def check_edits(self, layer: int, inputs: Sequence[Input]) -> None:
        """Check that the model computes with edited queries, keys and values of a layer.

        Raises:
            ProbeError: a hook point is missing, or an edit of it changes nothing.
        """
        for name in ("resid_pre", *inputs, "z"):
            layers_with(self._model, name, layer)
        tokens = self._tokens[:2]
        steps = [("resid_pre", name) for name in inputs] + [(name, "z") for name in inputs]
        intact = {name: self._read(tokens, None, name, layer) for name in {to for _, to in steps}}
        for edited, read in steps:
            after = self._read(tokens, edited, read, layer)
            if torch.equal(after, intact[read]):
                raise ProbeError(
                    f"editing {hook_name(edited, layer)} of this {type(self._model).__name__} "
                    f"changes nothing at {hook_name(read, layer)}: path patching is not possible"
                )

    def _read(self, tokens: Tensor, edited: str | None, read: str, layer: int) -> Tensor:
        """An activation of one pass, in which another hook point's values may be negated."""
        values: list[Tensor] = []
        with undisturbed(self._model), Hooks() as hooks:
            if edited is not None:
                hooks.edit(self._points[hook_name(edited, layer)], torch.neg)
            point = self._points[hook_name(read, layer)]
            hooks.add(point, lambda _, __, output: values.append(converted(point, output).clone()))
            run(self._model, tokens)
        if not values:
            raise ProbeError(
                f"{type(self._model).__name__} does not run its {hook_name(read, layer)}: path "
                "patching is not possible"
            )
        return values[-1]

    def _inputs_after(
        self, senders: Sequence[Head], layer: int, inputs: Sequence[Input]
    ) -> dict[Input, Float[Tensor, "row pos head d_head"]]:
        """Queries, keys and values of a layer whose input has each sender's other output."""
        change = torch.cat([self._write(sender) for sender in senders])
        stream = self._stream(layer).repeat(len(senders), 1, 1)
        parts: dict[Input, list[Tensor]] = {name: [] for name in inputs}

        def add(values: Tensor, stream: Tensor) -> Tensor:
            return stream + values.to(stream)

        def keep(name: Input, point: nn.Module, _: Any, output: Tensor) -> None:
            parts[name].append(converted(point, output).detach().clone())

        tokens = self._tokens.repeat(len(senders), 1)
        with undisturbed(self._model):
            for rows in _slices(len(tokens), self._rows):
                with Hooks() as hooks:
                    point = self._points[hook_name("resid_pre", layer)]
                    hooks.edit(point, partial(add, change[rows]))
                    for name in inputs:
                        point = self._points[hook_name(name, layer)]
                        hooks.add(point, partial(keep, name))
                    if self._runs_from:
                        model: Any = self._model
                        model(stream[rows], start_at_layer=layer, stop_at_layer=layer + 1)
                    else:
                        run(self._model, tokens[rows])
        return {name: torch.cat(values) for name, values in parts.items()}

    def _stream(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream of the intact model before a layer."""
        if layer not in self._streams:
            stream = Activation("resid_pre", layer)
            with undisturbed(self._model), attach(self._model, stream):
                for batch in self._tokens.split(self._rows):
                    run(self._model, batch)
            self._streams = {layer: stream.reading().values[0]}
        return self._streams[layer]

    def _logits(self, rows: slice, tokens: Tensor, stream: Tensor | None, layer: int) -> Tensor:
        """The logits of some rows; with a stream, from the one before that layer on."""
        if stream is None:
            return checked_logits(self._model, tokens[rows], None, "patching")
        model: Any = self._model
        logits: Tensor = model(stream[rows], return_type="logits", start_at_layer=layer)
        return logits

    def _write(self, sender: Head) -> Float[Tensor, "batch pos d_model"]:
        layer, head = sender
        difference = self._other[layer][:, :, head] - self._own[layer][:, :, head]
        weights = output_weights(self._model, layer)[head].to(difference)
        return einsum(difference, weights, "batch pos i, i model -> batch pos model")

    def _measure(
        self, copies: int, edits: "Mapping[str, _Edit]", receiver: Head | None = None
    ) -> list[Readout]:
        """Run `copies` of the sequences with edits, and split the result by copy."""
        tokens, pairs = (x.repeat(copies, 1) for x in (self._tokens, self._pairs))
        losses: list[Tensor] = []
        attention: list[Tensor] = []
        layer, head = receiver or (0, 0)
        stream = None
        if receiver is not None and self._runs_from:
            stream = self._stream(layer).repeat(copies, 1, 1)

        def at_pattern(
            weights: Tensor, head: int, point: nn.Module, _: Any, output: Tensor
        ) -> None:
            pattern = converted(point, output)[:, head].double()
            attention.append((pattern * weights[:, 0].to(pattern)).sum((1, 2)))

        with undisturbed(self._model):
            for rows in _slices(len(tokens), self._rows):
                with Hooks() as hooks:
                    for name, (values, change) in edits.items():
                        hooks.edit(self._points[name], partial(change, values[rows]))
                    if receiver is not None:
                        keys = self._keys.repeat(copies, 1, 1, 1)[rows]
                        point = self._points[hook_name("pattern", layer)]
                        hooks.add(point, partial(at_pattern, keys, head))
                    logits = self._logits(rows, tokens, stream, layer)
                token_loss = next_token_losses(logits, tokens[rows]).double()
                weights = pairs[rows].to(token_loss)
                weights = weights / weights.sum(1, keepdim=True)
                losses.append((token_loss * weights).sum(1))
        by_copy = torch.cat(losses).chunk(copies)
        matching = torch.cat(attention).chunk(copies) if attention else (None,) * copies
        return [Readout(loss, share) for loss, share in zip(by_copy, matching, strict=True)]


_Edit: TypeAlias = tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]
"""Values of every row, and how the row's values and an activation make the new activation."""


def _with_heads(heads: list[int], values: Tensor, activation: Tensor) -> Tensor:
    changed = activation.clone()
    changed[:, :, heads] = values.to(activation)
    return changed


def _with_shared(n_heads: int, head: int, values: Tensor, activation: Tensor) -> Tensor:
    """Replace what a head reads; under grouped-query attention other heads read it too."""
    changed = activation.clone()
    index = head * activation.shape[2] // n_heads
    changed[:, :, index] = values[:, :, index].to(activation)
    return changed


def _only_head(head: int, intact: Tensor, z: Tensor) -> Tensor:
    """The intact values of all heads but one."""
    changed = intact.to(z, copy=True)
    changed[:, :, head] = z[:, :, head]
    return changed


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, start + size)
