"""Put activations from other sequences into a pass: resample ablation and path patching.

Both ask what a prediction loses if one head tells of another sequence: resample ablation replaces
the head's output for everything that reads it, path patching for one input of one later head.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from probes.heads.scores import mean_weights, prefix_matching_mask
from probes.reading.errors import ProbeError
from probes.reading.head_outputs import output_weights
from probes.reading.hook_names import Head, config_of, hook_name, hook_points, layers_with
from probes.reading.hooking import Hooks, converted
from probes.reading.layer_passes import logits_from, starts_at_layers, stream_before
from probes.reading.passes import batch_rows, next_token_losses, run, undisturbed

Input: TypeAlias = Literal["k", "q", "v"]
"""What a head reads: its keys, queries or values."""
INPUTS: tuple[Input, ...] = get_args(Input)
_Item = TypeVar("_Item")


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
        self._starts_at_layers = starts_at_layers(model)
        self._streams: dict[int, Tensor] = {}

    def intact(self, receiver: Head | None = None) -> Readout:
        """The model without patches, and the attention of a head."""
        return self._measure(1, {}, receiver)[0]

    def resampled(self, heads: Sequence[Head]) -> dict[Head, Readout]:
        """Each head's output, alone, is that on the other sequences."""
        readouts: dict[Head, Readout] = {}
        for layer in sorted({layer for layer, _ in heads}):
            chosen = [head for own_layer, head in heads if own_layer == layer]
            for group in self._groups(chosen):
                own, other = self._own[layer], self._other[layer]
                values = torch.cat([_only_head(head, own, other) for head in group])
                edits: dict[str, _Edit] = {hook_name("z", layer): (values, _replaced)}
                each = self._measure(len(group), edits, layer=layer)
                readouts |= {(layer, head): each[i] for i, head in enumerate(group)}
        return readouts

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
        for group in self._groups(senders):
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
        intact = self._read(None, (*inputs, "z"), layer)
        edits: dict[str, Sequence[str]] = {"resid_pre": inputs}
        edits |= {name: ("z",) for name in inputs}
        for edited, read in edits.items():
            after = self._read(edited, read, layer)
            for name, values in after.items():
                if torch.equal(values, intact[name]):
                    raise ProbeError(
                        f"editing {hook_name(edited, layer)} of this {type(self._model).__name__} "
                        f"changes nothing at {hook_name(name, layer)}: path patching is not "
                        "possible"
                    )

    def _read(self, edited: str | None, read: Sequence[str], layer: int) -> dict[str, Tensor]:
        """Activations of two sequences, with another hook point's values negated."""
        values: dict[str, Tensor] = {}
        sequences = torch.arange(min(2, len(self._tokens)), device=self._tokens.device)

        def keep(name: str, point: nn.Module, _: Any, output: Tensor) -> None:
            values[name] = converted(point, output).clone()

        with undisturbed(self._model), Hooks() as hooks:
            if edited is not None:
                hooks.edit(self._points[hook_name(edited, layer)], torch.neg)
            for name in read:
                point = self._points[hook_name(name, layer)]
                hooks.add(point, partial(keep, name))
            self._run_layer(sequences, layer)
        if missing := [name for name in read if name not in values]:
            raise ProbeError(
                f"{type(self._model).__name__} does not run its {hook_name(missing[0], layer)}: "
                "path patching is not possible"
            )
        return values

    def _inputs_after(
        self, senders: Sequence[Head], layer: int, inputs: Sequence[Input]
    ) -> dict[Input, Float[Tensor, "row pos head d_head"]]:
        """Queries, keys and values of a layer whose input has each sender's other output."""
        change = torch.cat([self._write(sender) for sender in senders])
        parts: dict[Input, list[Tensor]] = {name: [] for name in inputs}

        def add(values: Tensor, stream: Tensor) -> Tensor:
            return stream + values.to(stream)

        def keep(name: Input, point: nn.Module, _: Any, output: Tensor) -> None:
            parts[name].append(converted(point, output).detach().clone())

        sequences = torch.arange(len(change), device=self._tokens.device) % len(self._tokens)
        with undisturbed(self._model):
            for rows in _slices(len(change), self._rows):
                with Hooks() as hooks:
                    point = self._points[hook_name("resid_pre", layer)]
                    hooks.edit(point, partial(add, change[rows]))
                    for name in inputs:
                        point = self._points[hook_name(name, layer)]
                        hooks.add(point, partial(keep, name))
                    self._run_layer(sequences[rows], layer)
        return {name: torch.cat(values) for name, values in parts.items()}

    def _stream(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream of the intact model before a layer."""
        if layer not in self._streams:
            stream = stream_before(self._model, layer, self._tokens, self._rows)
            self._streams = {layer: stream}
        return self._streams[layer]

    def _run_layer(self, sequences: Int[Tensor, "row"], layer: int) -> None:
        """Run a layer for its hooks on the sequences of these numbers."""
        if not self._starts_at_layers:
            run(self._model, self._tokens[sequences])
            return
        model: Any = self._model
        model(self._stream(layer)[sequences], start_at_layer=layer, stop_at_layer=layer + 1)

    def _groups(self, items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
        """As many at a time as one pass has room for copies of the sequences."""
        size = max(1, self._rows // len(self._tokens))
        return (items[start : start + size] for start in range(0, len(items), size))

    def _write(self, sender: Head) -> Float[Tensor, "batch pos d_model"]:
        layer, head = sender
        difference = self._other[layer][:, :, head] - self._own[layer][:, :, head]
        weights = output_weights(self._model, layer)[head].to(difference)
        return einsum(difference, weights, "batch pos i, i model -> batch pos model")

    def _measure(
        self,
        copies: int,
        edits: "Mapping[str, _Edit]",
        receiver: Head | None = None,
        *,
        layer: int | None = None,
    ) -> list[Readout]:
        """Run `copies` of the sequences with edits, and split the result by copy.

        Args:
            copies: how many.
            edits: by hook point.
            receiver: a head whose attention is read; no layer before its own has edits.
            layer: no layer before it has edits; None for the receiver's, or unknown without one.
        """
        tokens, pairs = (x.repeat(copies, 1) for x in (self._tokens, self._pairs))
        losses: list[Tensor] = []
        attention: list[Tensor] = []
        first = receiver[0] if receiver is not None else layer
        stream = None
        if first is not None and self._starts_at_layers:
            stream = self._stream(first).repeat(copies, 1, 1)

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
                        point = self._points[hook_name("pattern", receiver[0])]
                        hooks.add(point, partial(at_pattern, keys, receiver[1]))
                    start = None if stream is None else stream[rows]
                    logits = logits_from(self._model, tokens[rows], start, first or 0, "patching")
                token_loss = next_token_losses(logits, tokens[rows]).double()
                weights = pairs[rows].to(token_loss)
                weights = weights / weights.sum(1, keepdim=True)
                losses.append((token_loss * weights).sum(1))
        by_copy = torch.cat(losses).chunk(copies)
        matching = torch.cat(attention).chunk(copies) if attention else (None,) * copies
        return [Readout(loss, share) for loss, share in zip(by_copy, matching, strict=True)]


_Edit: TypeAlias = tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]
"""Values of every row, and how the row's values and an activation make the new activation."""


def _replaced(values: Tensor, activation: Tensor) -> Tensor:
    return values.to(activation)


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
