"""A sweep as typed data: a base recipe, axes over its fields, seeds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from mechcausal.recipes import Recipe

MAX_MEMBERS = 1_000_000
COPY_FILE = "sweep.json"
"""The copy of the sweep in its folder, with the full base recipe."""


class SweepError(ValueError):
    """A sweep that cannot be read, planned or run; the message is one line for the user."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """An interval that a random axis draws from; integers if both ends are integers."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    low: int | Annotated[float, Field(allow_inf_nan=False)]
    """Smallest value."""
    high: int | Annotated[float, Field(allow_inf_nan=False)]
    """Largest value."""
    log: bool = False
    """Draw uniformly in the logarithm."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of a finished sweep: mean and spread of a figure over all other axes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    figure: str
    """Name of the figure, as in metrics.jsonl; `first/...` for the first probe step's."""
    x: str
    """Horizontal axis: a recipe field, or `train/step` for curves over training."""
    y: str | None = None
    """Vertical axis, a recipe field; makes the picture a phase diagram."""
    by: str | None = None
    """Recipe field with one line per value (without `y`)."""
    complement: bool = False
    """Draw one minus the figure."""
    fit: bool = False
    """Fit a power law to the means and show its exponent (without `y`)."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """How W&B's own sweep searches; see `--as-wandb`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    method: Literal["grid", "random", "bayes"] | None = None
    """Default: random for a random sweep, else grid."""
    metric: str = "loss/eval"
    """Figure that bayes optimises."""
    goal: Literal["minimize", "maximize"] = "minimize"
    """Whether a smaller or a larger figure is better."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A complete sweep.

    Attributes:
        name: name of the sweep's folder and W&B group.
        base: the recipe that the axes vary.
        kind: "grid": every combination of values. "list": the i-th values of all axes together.
            "random": values drawn from lists and ranges.
        axes: a list of values or a range, by the dotted path of the recipe field.
        seeds: every point runs once with each seed.
        samples: number of points of a random sweep.
        sampling_seed: seed that the points are drawn with.
        pictures: pictures to draw at the end.
        search: settings of W&B's own sweep, see `--as-wandb`.
        source: the file that the sweep was read from.
        recipe_source: name of the base recipe if it is a bundled one, unchanged; else empty.
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
