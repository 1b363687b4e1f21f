"""From a sweep to its members: what is run, where, under which name."""

import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechcausal.recipes import Recipe, RecipeError, parse_recipe, recipe_to_dict
from mechcausal.sweeps.definition import overlay
from mechcausal.sweeps.sweep import MAX_MEMBERS, Range, Sweep, SweepError


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
        name: of its folder, unique in the sweep.
        folder: where it lies.
        recipe: what is trained.
        point: its value on every axis, by dotted path.
    """

    name: str
    folder: Path
    recipe: Recipe
    point: Mapping[str, Any]


def plan(sweep: Sweep, folder: Path) -> list[Member]:
    """The members of a sweep, in order: the last axis varies fastest, seeds faster still.

    Args:
        sweep: what to run.
        folder: the sweep's; a member's folder lies in it.

    Raises:
        SweepError: a member whose recipe is none, or more members than a million.
    """
    count = size(sweep)
    if count > MAX_MEMBERS:
        raise SweepError(f"{sweep.source}: {count:,} members; at most {MAX_MEMBERS:,} are allowed")
    values = recipe_to_dict(sweep.base)
    values["wandb"] = {**values["wandb"], "group": sweep.name}
    labels = shortest_ends([*sweep.axes])
    digits = len(str(count - 1))
    members = []
    for number, point in enumerate(_points(sweep)):
        own = dict(values)
        for path, value in point.items():
            overlay(own, path, value)
        said = "_".join(f"{labels.get(path, path)}{_text(v)}" for path, v in point.items())
        name = f"{number:0{digits}d}_{re.sub(r'[^A-Za-z0-9_.+-]', '-', said)}"[:80].rstrip("._-")
        try:
            recipe = parse_recipe(own, source=f"{sweep.source}: member {name}")
        except RecipeError as error:
            raise SweepError(str(error)) from None
        members.append(Member(name, folder / name, recipe, point))
    return members


def size(sweep: Sweep) -> int:
    """The number of members, without making them."""
    lengths = [len(axis) for axis in sweep.axes.values() if not isinstance(axis, Range)]
    points = {
        "grid": math.prod(lengths),
        "list": lengths[0] if lengths else 1,
        "random": sweep.samples,
    }[sweep.kind]
    return points * _n_seeds(sweep)


def _n_seeds(sweep: Sweep) -> int:
    return 1 if "seed" in sweep.axes else len(sweep.seeds)


def _points(sweep: Sweep) -> Iterator[dict[str, Any]]:
    paths = [*sweep.axes]
    lists = [axis for axis in sweep.axes.values() if not isinstance(axis, Range)]
    rows: Iterator[Any]
    if sweep.kind == "random":
        rows = _draws(sweep)
    elif sweep.kind == "list":
        rows = iter(zip(*lists, strict=True)) if lists else iter([()])
    else:
        rows = itertools.product(*lists)
    for row in rows:
        point = dict(zip(paths, row, strict=True))
        if "seed" in point:
            yield point
        else:
            for seed in sweep.seeds:
                yield {**point, "seed": seed}


def _draws(sweep: Sweep) -> Iterator[list[Any]]:
    # Of Python's generator only `random()` is promised to stay as it is.
    source = random.Random(sweep.sampling_seed)
    for _ in range(sweep.samples):
        row = []
        for axis in sweep.axes.values():
            uniform = source.random()
            if isinstance(axis, Range):
                row.append(_within(axis, uniform))
            else:
                row.append(axis[int(uniform * len(axis))])
        yield row


def _within(axis: Range, uniform: float) -> int | float:
    """The value at a share of a range; floats are rounded to six digits, so that they can be read.

    Example:
        >>> _within(Range(low=1, high=6), 0.99), _within(Range(low=0.01, high=100.0, log=True), 0.5)
        (6, 1.0)
    """
    low, high = axis.low, axis.high
    whole = isinstance(low, int) and isinstance(high, int)
    if whole:  # every whole number has an interval of its own
        low, high = (low, high + 1) if not axis.log else (low - 0.5, high + 0.5)
    if axis.log:
        value = math.exp(math.log(low) + uniform * (math.log(high) - math.log(low)))
    else:
        value = low + uniform * (high - low)
    if whole:
        value = round(value) if axis.log else math.floor(value)
        return int(min(max(value, axis.low), axis.high))
    return min(max(float(f"{value:.6g}"), axis.low), axis.high)


def shortest_ends(paths: list[str]) -> dict[str, str]:
    """The shortest end of every path that names it alone.

    Example:
        >>> shortest_ends(["task.alpha", "training.stage1.lr", "training.stage2.lr"]).values()
        dict_values(['alpha', 'stage1.lr', 'stage2.lr'])
    """
    labels = {}
    for path in paths:
        parts = path.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        labels[path] = next(
            (
                end
                for end in ends
                if Counter(p == end or p.endswith(f".{end}") for p in paths)[True] == 1
            ),
            path,
        )
    return labels


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(_text(item) for item in value.values())
    if isinstance(value, list | tuple):
        return "-".join(_text(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)
