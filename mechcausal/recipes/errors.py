"""Check plain data against dataclasses; errors are one line that names the key."""

import json
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mechcausal.support.messages import excerpt, suggestion

# A file may hold a million mistakes; only the first are examined.
MAX_ERRORS = 100
_PATTERN_RULES = {
    "device": "input should be cpu, cuda or cuda:N",
    "name": "input should be at most 100 letters, digits, dots, dashes and underscores",
}


T = TypeVar("T")


class RecipeError(ValueError):
    """A recipe that cannot be read or run; the message is one line for the user."""


def validated(kind: type[T], data: Any, *, source: str, error: type[ValueError] = RecipeError) -> T:
    """Check nested plain data against a dataclass.

    Args:
        kind: the dataclass.
        data: data as read from TOML or JSON.
        source: where the data comes from, for the message.
        error: what to raise.

    Raises:
        error: the first mistake, in one line.
    """
    try:
        # Strict JSON mode still accepts an array for a tuple and a table for a dataclass.
        adapter = _adapter(kind)  # type: ignore[arg-type]  # mypy does not see that it is hashable
        value: T = adapter.validate_json(json.dumps(data, default=str), strict=True)
        return value
    except ValidationError as mistakes:
        message = _first_error(kind, mistakes)
    except RecursionError:
        message = "nested too deeply"
    except (TypeError, ValueError) as problem:  # a key that is not text, a number that is too long
        message = f"not plain data: {excerpt(problem)}"
    raise error(f"{source}: {message}")


@cache
def _adapter(kind: Any) -> Any:
    return TypeAdapter(kind)


def _first_error(kind: type, error: ValidationError) -> str:
    """One line about the first mistake in data for a dataclass, and how many more there are."""
    errors = error.errors(include_url=False)
    more = "at least " if len(errors) > MAX_ERRORS else ""
    errors = errors[:MAX_ERRORS]
    # A union reports one error per member; the deepest comes from the member that fits best.
    top = _dotted(kind, errors[0]["loc"])
    related = [error for error in errors if f"{_dotted(kind, error['loc'])}.".startswith(f"{top}.")]
    first = max(related, key=lambda error: _dotted(kind, error["loc"]).count("."))
    path = _dotted(kind, first["loc"])
    value = excerpt(json.dumps(first["input"], default=str))
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        allowed = _allowed_keys(kind, first["loc"][:-1])
        message = f"{path}: unknown key{suggestion(str(first['loc'][-1]), allowed)}; "
        message += f"allowed: {', '.join(allowed)}"
    elif first["type"].startswith("missing"):
        message = f"{path}: is missing"
    else:
        rule = _PATTERN_RULES.get(path) if first["type"] == "string_pattern_mismatch" else None
        message = f"{path}: {rule or first['msg'].lower()}, found {value}"
    message = " ".join(message.replace("an object", "a table").split())
    others = {_dotted(kind, error["loc"]) for error in errors if error not in related}
    return message + (f" (and {more}{len(others)} more)" if others else "")


def _dotted(kind: type, location: tuple[int | str, ...]) -> str:
    # pydantic adds the names of union members to the path; keep only the user's keys.
    known: list[str] = []
    section: Any = kind
    for part in location:
        if isinstance(part, int):
            known.append(str(part))
            section = _inner(section, part)
        elif is_dataclass(section):
            known.append(excerpt(part))
            section = _inner(section, part)
    return ".".join(known) or "recipe"


def _allowed_keys(kind: type, location: tuple[int | str, ...]) -> list[str]:
    section: Any = kind
    for part in location:
        section = _inner(section, part)
    return [item.name for item in fields(section)]


def _inner(section: Any, part: int | str) -> Any:
    """The type of a key of a dataclass, or of the items of a tuple."""
    if isinstance(part, str):
        return get_type_hints(section).get(part)
    return next(iter(get_args(section)), None)
