"""Types of a run's figures."""

from collections.abc import Mapping, Sequence

STEP = "train/step"

Value = float | int | None
History = Sequence[Mapping[str, Value]]
"""One row of figures per probe step, with the step under `train/step`."""
