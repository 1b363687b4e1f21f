"""Errors about recipes: one line that names the key."""

import json
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from pydantic import ValidationError

from mechcausal.support.messages import excerpt, suggestion

# A file may hold a million mistakes; only the first are examined.
MAX_ERRORS = 100
_PATTERN_RULES = {
    "device": "input should be cpu, cuda or cuda:N",
    "name": "input should be at most 100 letters, digits, dots, dashes and underscores",
}


class RecipeError(ValueError):
    """A recipe that cannot be read or run; the message is one line for the user."""


def first_error(kind: type, error: ValidationError) -> str:
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
            continue
        if is_dataclass(section):
            known.append(excerpt(part))
            section = get_type_hints(section).get(part)
    return ".".join(known) or "recipe"


def _allowed_keys(kind: type, location: tuple[int | str, ...]) -> list[str]:
    section: Any = kind
    for part in location:
        section = get_type_hints(section)[str(part)]
    return [item.name for item in fields(section)]
