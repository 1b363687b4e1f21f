"""Nested tables, as recipes and summaries are, as flat ones."""

from collections.abc import Mapping
from typing import Any


def flat(values: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested tables under joined keys, in order.

    Args:
        values: tables in tables; lists stay as they are.
        separator: between the keys that lead to a value.
        prefix: before every key.

    Example:
        >>> flat({"seed": 0, "graph": {"preset": "chain"}})
        {'seed': 0, 'graph.preset': 'chain'}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, separator, f"{prefix}{key}{separator}")
        else:
            found[f"{prefix}{key}"] = value
    return found
