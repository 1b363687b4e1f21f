"""A tensor that knows what its axes mean."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor

from probes.reading.frames import pandas

Label: TypeAlias = int | str


def standard_error(values: Tensor, dim: int = 0) -> Tensor:
    """Standard error of the mean along a dimension, `sqrt(Σ (x - mean)² / (n - 1) / n)`.

    The sums skip NaN; the result is NaN where fewer than two entries remain.

    >>> standard_error(torch.tensor([1.0, 3.0, torch.nan]))
    tensor(1.)
    """
    n = (~values.isnan()).sum(dim).to(values.dtype)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim)
    return torch.where(n > 1, (squares / (n - 1).clamp(min=1) / n).sqrt(), torch.nan)


@dataclass(frozen=True, eq=False, repr=False)
class LabelledTensor:
    """Values with a name for the quantity and for every axis.

    The values are detached: a reading never keeps an autograd graph alive.

    Attributes:
        name: the quantity, such as `attention_pattern`.
        values: the numbers.
        axes: one name per dimension of `values`.
        coords: labels of every index on some axes (layer numbers, score names).

    Raises:
        ValueError: the names or labels do not fit the shape of the values.

    >>> axes = ("layer", "head", "query", "key")
    >>> pattern = LabelledTensor(
    ...     "pattern", torch.eye(2).expand(2, 3, 2, 2), axes, {"layer": (4, 7)}
    ... )
    >>> pattern
    LabelledTensor(pattern: layer=2 (4, 7), head=3, query=2, key=2; float32)
    >>> pattern.sel(layer=7, head=0).values
    tensor([[1., 0.],
            [0., 1.]])
    """

    name: str
    values: Tensor
    axes: tuple[str, ...]
    coords: Mapping[str, tuple[Label, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.axes) != self.values.ndim or len(set(self.axes)) != len(self.axes):
            raise ValueError(
                f"{self.name}: {self.values.ndim} dimensions need as many different axis names, "
                f"found {self.axes}"
            )
        for axis, labels in self.coords.items():
            if axis not in self.axes or len(labels) != self.shape[axis]:
                raise ValueError(
                    f"{self.name}: {labels} cannot label axis {axis!r} of {self.shape}"
                )
        object.__setattr__(self, "values", self.values.detach())

    @property
    def shape(self) -> dict[str, int]:
        """Size of every axis, in order."""
        return dict(zip(self.axes, self.values.shape, strict=True))

    def sel(self, **labels: Label) -> "LabelledTensor":
        """Pick one entry along each named axis; those axes disappear.

        On an axis with coordinates, the label is one of them (a layer number, a score name); on
        any other axis it is an index, which may be negative.

        Args:
            **labels: axis name = label.

        Returns:
            The remaining axes; the values are a view.

        Raises:
            ValueError: no such axis, or no such label on it.
        """
        picked: dict[str, int] = {}
        for axis, label in labels.items():
            if axis not in self.axes:
                raise ValueError(f"{self.name} has no axis {axis!r}; its axes are {self.axes}")
            picked[axis] = self._position(axis, label)
        index = tuple(picked.get(axis, slice(None)) for axis in self.axes)
        return self._keep(self.values[index], drop=tuple(picked))

    def mean(self, axis: str) -> "LabelledTensor":
        """Mean along an axis, `Σ x / n` over the entries that are not NaN."""
        return self._keep(self.values.nanmean(self._dim(axis)), drop=(axis,))

    def stderr(self, axis: str) -> "LabelledTensor":
        """The `standard_error` of `mean(axis)`."""
        return self._keep(standard_error(self.values, self._dim(axis)), drop=(axis,))

    def to_frame(self) -> Any:
        """A pandas frame in long form: one row per number, one column per axis, and `value`.

        An axis with labels has them in its column, any other axis the index. The frame is as long
        as there are numbers: choose with `sel` or average first.

        Raises:
            ProbeError: pandas is not installed.

        >>> losses = torch.tensor([1.0, 2.0])
        >>> reading = LabelledTensor("loss", losses, ("layer",), {"layer": (4, 7)})
        >>> reading.to_frame().to_dict("list")
        {'layer': [4, 7], 'value': [1.0, 2.0]}
        """
        labels = [self.coords.get(axis, range(size)) for axis, size in self.shape.items()]
        rows = list(product(*labels))
        columns = {axis: [row[i] for row in rows] for i, axis in enumerate(self.axes)}
        return pandas().DataFrame({**columns, "value": self.values.cpu().flatten().tolist()})

    def _dim(self, axis: str) -> int:
        if axis not in self.axes:
            raise ValueError(f"{self.name} has no axis {axis!r}; its axes are {self.axes}")
        return self.axes.index(axis)

    def _position(self, axis: str, label: Label) -> int:
        if axis in self.coords:
            if label in self.coords[axis]:
                return self.coords[axis].index(label)
            raise ValueError(f"{self.name} has no {axis} {label!r}; it has {self.coords[axis]}")
        size = self.shape[axis]
        if isinstance(label, int) and -size <= label < size:
            return label
        raise ValueError(f"{self.name} has no {axis} {label!r}; it has 0 to {size - 1}")

    def _keep(self, values: Tensor, *, drop: tuple[str, ...]) -> "LabelledTensor":
        axes = tuple(axis for axis in self.axes if axis not in drop)
        coords = {axis: labels for axis, labels in self.coords.items() if axis not in drop}
        return LabelledTensor(self.name, values, axes, coords)

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{axis}={size}" + (f" {self.coords[axis]}" if axis in self.coords else "")
            for axis, size in self.shape.items()
        )
        return f"LabelledTensor({self.name}: {sizes}; {str(self.values.dtype)[6:]})"
