"""Find, read and write recipes as TOML files."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from mechcausal.recipes.errors import RecipeError
from mechcausal.recipes.recipe import Recipe, parse_recipe, recipe_to_dict
from mechcausal.support.corpora import CORPORA
from mechcausal.support.messages import excerpt, suggestion

MAX_FILE_BYTES = 4 * 2**20
"""The largest recipe file read."""


def load_recipe(target: str | Path) -> Recipe:
    """Read a recipe from a TOML file, or a bundled recipe by its name.

    Args:
        target: a path (`runs/markov_chain.toml`) or a bundled name (`markov_chain`).

    Raises:
        RecipeError: no such file, not TOML, or not a valid recipe; one line that names the file.
    """
    path = find_recipe(target)
    try:
        text = read_text(path, "a recipe")
    except ValueError as error:
        raise RecipeError(str(error)) from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {excerpt(error, 100)}") from None
    except ValueError:  # int() refuses a number of thousands of digits
        raise RecipeError(f"{path}: not valid TOML: a number is too long") from None
    except RecursionError:
        raise RecipeError(f"{path}: not valid TOML: nested too deeply") from None
    data.setdefault("name", name_after(path) or "run")
    match data:
        case {"graph": {"edge_list": str(edge_list)}}:
            data["graph"]["edge_list"] = str(_edge_list_path(path, edge_list))
        case {"task": {"text": str(name)}} if name not in CORPORA:
            data["task"]["text"] = str((path.parent / name).absolute())
    return parse_recipe(data, source=str(path))


def read_text(path: Path, what: str) -> str:
    """Read a small text file.

    Args:
        path: path of the file.
        what: what the file should hold, such as "a recipe", for the error message.

    Raises:
        ValueError: the file cannot be read, is too large or not text; one line that names it.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{path}: more than {MAX_FILE_BYTES} bytes, the most {what} may have")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file") from None


def name_after(path: Path) -> str:
    """A name made from the file name, for a file without `name`; empty if no character is left."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem).lstrip("_.-")[:100]


def _edge_list_path(recipe: Path, name: str) -> Path:
    """The path of the edge list that a recipe file names, in the recipe's folder or below.

    Raises:
        RecipeError: the path leads elsewhere. Otherwise a recipe from someone else could make us
            read any file and show parts of it in an error message.
    """
    inside, path = name.isprintable() and len(name) <= 200, recipe.parent / name
    try:
        inside = inside and not Path(name).is_absolute() and ".." not in Path(name).parts
        # A symbolic link may lead elsewhere too.
        inside = inside and path.resolve().is_relative_to(recipe.parent.resolve())
    except (OSError, RuntimeError, ValueError):  # circular links, a null character
        inside = False
    if not inside:
        raise RecipeError(
            f"{recipe}: graph.edge_list: must be a file in the recipe's folder or below, found "
            f'"{excerpt(name)}" (on the command line --graph.edge-list takes any file)'
        )
    return path


def find_recipe(target: str | Path) -> Path:
    """The file of a recipe, given its path or the name of a bundled recipe.

    Raises:
        RecipeError: neither a file nor a bundled recipe.
    """
    path = Path(target)
    try:
        if path.is_file():
            return path
    except OSError as error:  # the name is too long, or a folder is not accessible
        raise RecipeError(f"{path}: {error.strerror or error}") from None
    packaged = packaged_recipes()
    if str(target) in packaged:
        return packaged[str(target)]
    if path.suffix == ".toml" or len(path.parts) > 1:
        reason = "is a folder" if path.is_dir() else "no such file"
        raise RecipeError(f"{path}: {reason}; bundled recipes: {', '.join(packaged)}")
    raise RecipeError(
        f"{target}: no such file or recipe{suggestion(str(target), packaged)}; "
        f"bundled recipes: {', '.join(packaged)}"
    )


def packaged_recipes() -> dict[str, Path]:
    """The files of the bundled recipes, by name."""
    package = Path(__file__).resolve().parents[1]
    folder = package / "_recipes"  # in a wheel
    if not folder.is_dir():
        folder = package.parent / "runs"  # in a checkout
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def recipe_to_toml(recipe: Recipe) -> str:
    """A recipe as TOML text, which `load_recipe` reads back as an equal recipe."""
    lines: list[str] = []

    def write(table: dict[str, Any], path: tuple[str, ...]) -> None:
        if path:
            lines.extend(["", f"[{'.'.join(path)}]"])
        for key, value in table.items():
            if not isinstance(value, dict):
                # JSON and TOML write these values alike, except for surrogate pairs (hence
                # ensure_ascii=False) and the delete character.
                text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
                lines.append(f"{key} = {text}")
        for key, value in table.items():
            if isinstance(value, dict):
                write(value, (*path, key))

    write(recipe_to_dict(recipe), ())
    return "\n".join(lines) + "\n"
