"""Records accumulate the values that a probe reads, one record per layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from probes.reading.attach import Probe
from probes.reading.errors import ProbeError
from probes.reading.hook_names import Layers, layers_with


class Record(ABC):
    """Accumulates one layer's batches.

    Attributes:
        batches: how many batches were added.
    """

    def __init__(self) -> None:
        self.batches = 0

    @abstractmethod
    def add(self, values: Tensor) -> None:
        """Add one batch `[batch ...]`; its first dimension is the sequences."""


class Concatenated(Record):
    """Concatenates all batches along the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Add one batch `[batch ...]`, without copying it."""
        if self._parts:
            _require_same_shape(self._parts[0].shape[1:], values.shape[1:])
        self._parts.append(values)
        self.batches += 1

    def values(self) -> Tensor:
        """All sequences so far, `[batch ...]`."""
        return torch.cat(self._parts)


class Sum(Record):
    """Sum over sequences, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.sequences = 0
        self._sum = torch.zeros(())
        self._dtype = torch.float32

    def add(self, values: Tensor) -> None:
        """Add one batch `[batch ...]`."""
        if self.batches:
            _require_same_shape(self._sum.shape, values.shape[1:])
        self._dtype = torch.promote_types(values.dtype, torch.float32)
        self._sum = self._sum + values.sum(0, dtype=wide_type(values))
        self.sequences += len(values)
        self.batches += 1

    def sum(self) -> Tensor:
        """`Σ_b x_b`, `[...]`, in float32 or wider."""
        return self._sum.to(self._dtype)

    def mean(self) -> Tensor:
        """`Σ_b x_b / B`."""
        return (self._sum / self.sequences).to(self._dtype)


class Moments(Sum):
    """Sum over sequences and the standard error of that sum, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self._squares = torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Add one batch `[batch ...]`."""
        wide = values.to(wide_type(values), copy=True)
        super().add(wide)
        self._dtype = torch.promote_types(values.dtype, torch.float32)
        self._squares = self._squares + wide.square_().sum(0)

    def stderr(self) -> Tensor:
        """`sqrt(B · s²)` with `s²` the sample variance over the B sequences; needs B >= 2."""
        scaled = self.sequences * self._squares - self._sum.square()  # B (B - 1) s²
        return (scaled.clamp(min=0) / (self.sequences - 1)).sqrt().to(self._dtype)


R = TypeVar("R", bound=Record)


class LayerProbe(Probe, Generic[R]):
    """A probe that keeps one record per layer.

    Args:
        layers: one layer, several, or None for every layer that has the hook point.
        record: makes an empty record.
        hook: the hook point that a layer must have, one of `hook_names.LAYER_HOOKS`.
    """

    _pass_kind = "forward pass"
    """The kind of pass that fills the records, for error messages."""

    def __init__(self, layers: Layers, record: Callable[[], R], hook: str = "pattern") -> None:
        self._requested_layers = layers
        self._hook = hook
        self._new_record = record
        self._records: dict[int, R] = {}

    def _layers(self, model: nn.Module) -> tuple[int, ...]:
        """The layers to hook; each gets a record."""
        layers = layers_with(model, self._hook, self._requested_layers)
        if self._records and tuple(self._records) != layers:
            if any(record.batches for record in self._records.values()):
                raise ProbeError(
                    f"{type(self).__name__} holds readings of layers {tuple(self._records)}, "
                    f"this model would add layers {layers}: call reset() first"
                )
            self._records.clear()
        for layer in layers:
            self._records.setdefault(layer, self._new_record())
        return layers

    def _complete_records(self) -> dict[int, R]:
        """The records, if every layer has as many batches as the others, and at least one."""
        counts = {layer: record.batches for layer, record in self._records.items()}
        if not any(counts.values()):
            raise ProbeError(
                f"{type(self).__name__} has no reading: no {self._pass_kind} seen yet "
                "(passes of a compiled copy of the model do not count)"
            )
        if len(set(counts.values())) > 1:
            raise ProbeError(
                f"{type(self).__name__} has no reading: a {self._pass_kind} did not reach every "
                f"layer (passes by layer: {counts}); call reset(), or choose layers="
            )
        return self._records

    def _stack(self, values: dict[int, Tensor]) -> Tensor:
        """One tensor `[layer ...]`, on the first layer's device."""
        shapes = {layer: tuple(value.shape) for layer, value in values.items()}
        if len(set(shapes.values())) > 1:
            raise ProbeError(f"layers differ in shape: choose one with layers=, found {shapes}")
        device = next(iter(values.values())).device
        return torch.stack([value.to(device) for value in values.values()])

    @property
    def batches(self) -> int:
        """How many passes the reading covers; 0 before the first."""
        return min((record.batches for record in self._records.values()), default=0)

    def reset(self) -> None:
        """Forget every pass seen so far."""
        for layer in self._records:
            self._records[layer] = self._new_record()


def _require_same_shape(earlier: torch.Size, current: torch.Size) -> None:
    if earlier != current:
        raise ProbeError(
            f"this batch has shape {tuple(current)} per sequence, earlier ones {tuple(earlier)}: "
            "call reset() between lengths"
        )


def wide_type(values: Tensor) -> torch.dtype:
    """The type of the sums: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if values.device.type == "mps" else torch.float64
