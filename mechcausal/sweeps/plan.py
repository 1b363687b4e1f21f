"""Turn a sweep into its members: their names, folders and recipes."""

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
        name: the folder's name, unique in the sweep.
        folder: the run folder.
        recipe: the recipe to train.
        point: the member's value on every axis, by dotted path.
    """

    name: str
    folder: Path
    recipe: Recipe
    point: Mapping[str, Any]


def plan(sweep: Sweep, folder: Path) -> list[Member]:
    """The members of a sweep, in order: seeds vary fastest, then the last axis.

    Args:
        sweep: the sweep.
        folder: the sweep's folder, which contains the members' folders.

    Raises:
        SweepError: a member with an invalid recipe, or more than `MAX_MEMBERS` members.
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
        member_values = dict(values)
        for path, value in point.items():
            overlay(member_values, path, value)
        label = "_".join(f"{labels.get(path, path)}{_text(v)}" for path, v in point.items())
        name = f"{number:0{digits}d}_{re.sub(r'[^A-Za-z0-9_.+-]', '-', label)}"[:80].rstrip("._-")
        try:
            recipe = parse_recipe(member_values, source=f"{sweep.source}: member {name}")
        except RecipeError as error:
            raise SweepError(str(error)) from None
        members.append(Member(name, folder / name, recipe, point))
    return members


def size(sweep: Sweep) -> int:
    """The number of members, without building them."""
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
    # Only `random()` is guaranteed to give the same numbers in later versions of Python.
    generator = random.Random(sweep.sampling_seed)
    for _ in range(sweep.samples):
        row = []
        for axis in sweep.axes.values():
            uniform = generator.random()
            if isinstance(axis, Range):
                row.append(_range_value(axis, uniform))
            else:
                row.append(axis[int(uniform * len(axis))])
        yield row


def _range_value(axis: Range, uniform: float) -> int | float:
    """Map a number in [0, 1) to a range; floats are rounded to six digits, for readable names.

    Example:
        >>> _range_value(Range(low=1, high=6), 0.99)
        6
        >>> _range_value(Range(low=0.01, high=100.0, log=True), 0.5)
        1.0
    """
    low, high = axis.low, axis.high
    is_integer = isinstance(low, int) and isinstance(high, int)
    if is_integer:  # every integer gets its own interval
        low, high = (low, high + 1) if not axis.log else (low - 0.5, high + 0.5)
    if axis.log:
        value = math.exp(math.log(low) + uniform * (math.log(high) - math.log(low)))
    else:
        value = low + uniform * (high - low)
    if is_integer:
        value = round(value) if axis.log else math.floor(value)
        return int(min(max(value, axis.low), axis.high))
    return min(max(float(f"{value:.6g}"), axis.low), axis.high)


def shortest_ends(paths: list[str]) -> dict[str, str]:
    """The shortest suffix of every dotted path that no other path ends with.

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
