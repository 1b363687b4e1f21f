"""Read, check and write sweep files.

This module does not import torch, so that the command line refuses a bad sweep at once.
"""

import json
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from mechcausal.recipes import (
    Recipe,
    RecipeError,
    Seed,
    load_recipe,
    packaged_recipes,
    parse_recipe,
    recipe_fields,
    recipe_to_dict,
)
from mechcausal.recipes.errors import validated
from mechcausal.recipes.files import name_after, read_text
from mechcausal.support.messages import excerpt, suggestion
from mechcausal.sweeps.sweep import (
    COPY_FILE,
    MAX_MEMBERS,
    Picture,
    Range,
    Search,
    Sweep,
    SweepError,
)

Count = Annotated[int, Field(ge=1, le=MAX_MEMBERS)]


@dataclass(frozen=True, kw_only=True)
class _File:
    """The keys of a sweep file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    recipe: str | dict[str, Any]
    axes: dict[str, Any] = field(default_factory=dict)
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
    kind: Literal["grid", "list", "random"] = "grid"
    changes: dict[str, Any] | None = None
    seeds: Count | Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None
    samples: Count | None = None
    sampling_seed: Seed | None = None
    pictures: tuple[Picture, ...] = ()
    search: Search = field(default_factory=Search)


def load_sweep(target: str | Path) -> Sweep:
    """Read a sweep from a TOML file, a sweep's folder, or by the name of a bundled sweep.

    Raises:
        SweepError: no such file, not a sweep, or an invalid axis; one line that names the file.
    """
    path = _find(target)
    data = _read(path)
    data.setdefault("name", name_after(path) or "sweep")
    file = _parse(data, str(path))
    base = _base(file, path)
    axes = _axes(file, str(path))
    if "seed" in axes and file.seeds is not None:
        raise SweepError(f"{path}: seeds: also given as the axis `seed`; keep one of the two")
    seeds = file.seeds if file.seeds is not None else (base.seed,)
    seeds = tuple(range(seeds)) if isinstance(seeds, int) else seeds
    if len(set(seeds)) < len(seeds):
        raise SweepError(f"{path}: seeds: a seed occurs twice, found {excerpt(list(seeds))}")
    if (file.kind == "random") != (file.samples is not None):
        rule = "needed by" if file.kind == "random" else "belongs to"
        raise SweepError(f"{path}: samples: {rule} kind random")
    if file.kind != "random" and file.sampling_seed is not None:
        raise SweepError(f"{path}: sampling_seed: belongs to kind random")
    for number, picture in enumerate(file.pictures):
        _check_picture(picture, f"{path}: pictures.{number}")
    return Sweep(
        name=file.name,
        base=base,
        kind=file.kind,
        axes=axes,
        seeds=seeds,
        samples=file.samples or 0,
        sampling_seed=file.sampling_seed or 0,
        pictures=file.pictures,
        search=file.search,
        source=str(path),
        recipe_source=_bundled_recipe(file, path),
    )


def sweep_to_dict(sweep: Sweep) -> dict[str, Any]:
    """The sweep as plain data, with the full base recipe; `load_sweep` reads it back equal."""
    data: dict[str, Any] = {
        "name": sweep.name,
        "kind": sweep.kind,
        "recipe": recipe_to_dict(sweep.base),
        "axes": {
            path: asdict(axis) if isinstance(axis, Range) else list(axis)
            for path, axis in sweep.axes.items()
        },
        "search": {key: value for key, value in asdict(sweep.search).items() if value is not None},
        "pictures": [
            {key: value for key, value in asdict(picture).items() if value is not None}
            for picture in sweep.pictures
        ],
    }
    if "seed" not in sweep.axes:
        data["seeds"] = list(sweep.seeds)
    if sweep.kind == "random":
        data |= {"samples": sweep.samples, "sampling_seed": sweep.sampling_seed}
    return data


def packaged_sweeps() -> dict[str, Path]:
    """The files of the bundled sweeps, by name."""
    folder = next(iter(packaged_recipes().values())).parent / "sweeps"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _find(target: str | Path) -> Path:
    path = Path(target)
    try:
        if path.is_dir():
            if (path / COPY_FILE).is_file():
                return path / COPY_FILE
            raise SweepError(f"{path}: not a sweep folder: it has no {COPY_FILE}")
        if path.is_file():
            return path
    except OSError as error:
        raise SweepError(f"{path}: {error.strerror or error}") from None
    packaged = packaged_sweeps()
    if str(target) in packaged:
        return packaged[str(target)]
    raise SweepError(
        f"{path}: no such file or sweep{suggestion(str(target), packaged)}; "
        f"bundled sweeps: {', '.join(packaged)}"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path, "a sweep")
    except ValueError as error:
        raise SweepError(str(error)) from None
    kind, parse = ("JSON", json.loads) if path.suffix == ".json" else ("TOML", tomllib.loads)
    try:
        data = parse(text)
    except RecursionError:
        raise SweepError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise SweepError(f"{path}: not valid {kind}: {excerpt(error, 100)}") from None
    if not isinstance(data, dict):
        raise SweepError(f"{path}: not a sweep")
    return data


def _parse(data: dict[str, Any], source: str) -> _File:
    if "base" in data and "recipe" not in data:
        raise SweepError(f"{source}: base: unknown key, did you mean recipe?")
    return validated(_File, data, source=source, error=SweepError)


def _base(file: _File, path: Path) -> Recipe:
    """The recipe that all members share, without report pages unless the file asks for them."""
    try:
        if isinstance(file.recipe, str):
            local_file = path.parent / file.recipe
            recipe = load_recipe(local_file if local_file.is_file() else file.recipe)
            # A worker on another machine cannot read the recipe's edge-list file.
            recipe = recipe.self_contained().with_overrides(probing__report=False)
        else:
            values = {"name": file.name, **file.recipe}
            probing = values.get("probing", {})
            if isinstance(probing, dict):
                values["probing"] = {"report": False, **probing}
            recipe = parse_recipe(values, source=f"{path}: recipe")
        if file.changes:
            values = recipe_to_dict(recipe)
            for field_, value in flatten(file.changes).items():
                overlay(values, field_, value)
            recipe = parse_recipe(values, source=f"{path}: changes")
    except (RecipeError, OSError) as error:
        raise SweepError(str(error)) from None
    except ValueError as error:  # an invalid edge list
        raise SweepError(f"{path}: recipe: {error}") from None
    return recipe


def _bundled_recipe(file: _File, path: Path) -> str:
    """The name of the base recipe if it is a bundled one, unchanged; else empty."""
    known = isinstance(file.recipe, str) and file.recipe in packaged_recipes()
    if not known or file.changes or (path.parent / str(file.recipe)).is_file():
        return ""
    return str(file.recipe)


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested tables into dotted paths, down to the fields of a recipe's sections.

    The TOML lines `a.b = 1` and `"a.b" = 1` then mean the same.
    """
    known = recipe_fields()
    flat: dict[str, Any] = {}
    for key, value in table.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and is_dataclass(known.get(path)):
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat


def overlay(values: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path; a table updates the section that it names."""
    *parents, last = path.split(".")
    for part in parents:
        inner = values.get(part)
        values[part] = values = dict(inner) if isinstance(inner, dict) else {}
    if isinstance(value, dict) and isinstance(values.get(last), dict):
        value = {**values[last], **value}
    values[last] = value


def _axes(file: _File, source: str) -> dict[str, tuple[Any, ...] | Range]:
    """The checked axes of a sweep file, by dotted path."""
    known = recipe_fields()
    axes: dict[str, tuple[Any, ...] | Range] = {}
    for path, given in flatten(file.axes).items():
        where = f"{source}: axes.{excerpt(path)}"
        if path not in known:
            hint = suggestion(path, known, closeness=0.5) or "; see mechcausal train --help"
            raise SweepError(f"{where}: not a recipe field{hint}")
        if path in ("name", "wandb", "wandb.group"):
            raise SweepError(f"{where}: the sweep sets this field")
        if isinstance(given, dict):
            axes[path] = _range(given, where, file.kind)
        elif isinstance(given, list):
            axes[path] = _values(given, where, file.kind)
        else:
            allowed = "a list of values, or with kind random also { low, high }"
            raise SweepError(f"{where}: {allowed}, found {excerpt(json.dumps(given, default=str))}")
    if not axes and file.seeds is None:
        raise SweepError(f"{source}: axes: no axis and no seeds: nothing to vary")
    for path in axes:
        inner = next((other for other in axes if other.startswith(f"{path}.")), None)
        if inner:
            raise SweepError(f"{source}: axes.{inner}: lies within the axis {path}")
    lengths = {path: len(axis) for path, axis in axes.items() if not isinstance(axis, Range)}
    if file.kind == "list" and len(set(lengths.values())) > 1:
        listed = ", ".join(f"{path} has {length}" for path, length in lengths.items())
        raise SweepError(f"{source}: axes: kind list needs axes of equal lengths; {listed}")
    return axes


def _values(given: list[Any], where: str, kind: str) -> tuple[Any, ...]:
    if not given:
        raise SweepError(f"{where}: is empty")
    # Only a grid would run the same member twice.
    texts = Counter(json.dumps(value, default=str) for value in given)
    text, count = texts.most_common(1)[0]
    if count > 1 and kind == "grid":
        raise SweepError(f"{where}: {excerpt(text)} occurs twice")
    return tuple(given)


def _range(given: dict[str, Any], where: str, kind: str) -> Range:
    if kind != "random":
        raise SweepError(f"{where}: a range belongs to kind random; kind {kind} takes a list")
    axis = validated(Range, given, source=where, error=SweepError)
    if not axis.low < axis.high:
        raise SweepError(f"{where}: low is {axis.low}, not below high, {axis.high}")
    if axis.log and axis.low <= 0:
        raise SweepError(f"{where}: low is {axis.low}: a logarithmic range starts above 0")
    return axis


def _check_picture(picture: Picture, where: str) -> None:
    known = recipe_fields()
    for role in ("x", "y", "by"):
        path = getattr(picture, role)
        if path is None or path in known or (role == "x" and path == "train/step"):
            continue
        hint = suggestion(path, known, closeness=0.5)
        raise SweepError(f"{where}.{role}: {excerpt(path)}: not a recipe field{hint}")
    if picture.y is not None and (picture.by or picture.fit or picture.x == "train/step"):
        raise SweepError(f"{where}.y: not allowed together with by, fit or x = train/step")
