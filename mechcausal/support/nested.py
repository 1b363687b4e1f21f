"""Flatten nested tables such as recipes and summaries."""

from collections.abc import Mapping
from typing import Any


def flat(values: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """A flat table whose keys are the joined keys of a nested one, in order.

    Args:
        values: the nested table; lists stay as they are.
        separator: text between joined keys.
        prefix: text before every key.

    Example:
        >>> flat({"seed": 0, "graph": {"preset": "chain"}})
        {'seed': 0, 'graph.preset': 'chain'}
    """
    joined: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            joined |= flat(value, separator, f"{prefix}{key}{separator}")
        else:
            joined[f"{prefix}{key}"] = value
    return joined
