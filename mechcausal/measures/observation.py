"""Figures and matrices of a model at one probe step."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """Figures and matrices of one probe step.

    Attributes:
        figures: by the names of the W&B charts; NaN if a figure is not defined.
        matrices: attention and gradients by name, on the CPU.
        prediction: the model's output on the evaluation batch; None if nothing compares it.
    """

    figures: dict[str, float]
    matrices: dict[str, Tensor]
    prediction: Tensor | None = field(default=None, repr=False)
