"""A sweep as typed data: a base recipe, axes over its fields, seeds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from mechcausal.recipes import Recipe

MAX_MEMBERS = 1_000_000
COPY_FILE = "sweep.json"
"""A sweep folder's copy of the sweep, the whole base recipe in it."""


class SweepError(ValueError):
    """A sweep that cannot be read, planned or run; the message is one line for the user."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Values of a random axis between two ends, whole numbers where both ends are."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    low: int | Annotated[float, Field(allow_inf_nan=False)]
    """Smallest value."""
    high: int | Annotated[float, Field(allow_inf_nan=False)]
    """Largest value."""
    log: bool = False
    """Uniform in the logarithm."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of a finished sweep: mean and spread of a figure over all other axes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    figure: str
    """Name of the figure, as in metrics.jsonl; `first/...` for the first probe step's."""
    x: str
    """Axis from left to right: a recipe field, or `train/step` for curves over training."""
    y: str | None = None
    """Axis from bottom to top, which makes a phase diagram."""
    by: str | None = None
    """A field whose values get a line of their own (without `y`)."""
    complement: bool = False
    """Draw one minus the figure."""
    fit: bool = False
    """Fit a power law to the means, and say its exponent (without `y`)."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """How W&B's own sweep is to search; see `--as-wandb`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    method: Literal["grid", "random", "bayes"] | None = None
    """When absent: as the sweep."""
    metric: str = "loss/eval"
    """Figure that bayes improves."""
    goal: Literal["minimize", "maximize"] = "minimize"
    """What better means."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep, completely described.

    Attributes:
        name: of its folder and its W&B group.
        base: the recipe that all members share, but for their axes.
        kind: grid: every combination. list: the axes side by side. random: drawn from ranges.
        axes: values, or the range of a random axis, by dotted path.
        seeds: every point is run with each of these.
        samples: points of a random sweep.
        sampling_seed: they follow from it.
        pictures: drawn at the end.
        search: see `--as-wandb`.
        source: file it was read from.
        recipe_source: name of the base recipe, where that comes along and nothing is changed.
    """

    name: str
    base: Recipe
    kind: Literal["grid", "list", "random"]
    axes: Mapping[str, tuple[Any, ...] | Range]
    seeds: tuple[int, ...]
    samples: int
    sampling_seed: int
    pictures: tuple[Picture, ...]
    search: Search
    source: str
    recipe_source: str = ""
