"""What a tracker reads at one training step."""

from collections.abc import Mapping
from dataclasses import dataclass

from probes.heads.head_table import HeadScores
from probes.reading.labelled import LabelledTensor


@dataclass(frozen=True, eq=False)
class Look:
    """What a tracker read at one training step.

    Attributes:
        step: the training step, as the caller counts.
        figures: the numbers that were logged, without the tracker's prefix.
        scores: every head's scores; None if the model could not be scored.
        descent: `-∂L/∂scores` summed over heads, axes ("layer", "query", "key"); None if the
            gradient could not be read, and in every look but the last, to bound memory.
    """

    step: int
    figures: Mapping[str, float]
    scores: HeadScores | None
    descent: LabelledTensor | None
