"""The table of a sweep: one row per member with its settings, its outcome and its figures."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mechcausal.recipes import recipe_to_dict
from mechcausal.records.run_folder import read_summary
from mechcausal.support.nested import flat
from mechcausal.sweeps.outcome import Outcome
from mechcausal.sweeps.plan import Member

# Entries of a run's summary that are no figures, or the same in every member.
_NOT_FIGURES = ("state", "rows", "warnings", "recipe", "plateaus", "drops", "steepest_drop")


def results_table(members: Sequence[Member], outcomes: Mapping[str, Outcome]) -> pd.DataFrame:
    """One row per member, in their order.

    Columns: `member`, `state` (`waiting` if the member has not started), `error`; the recipe fields
    that differ between members, by dotted path; the figures of the run's summary, with `first/...`
    for those of the first probe step. Lists are written as JSON.
    """
    rows: list[dict[str, Any]] = []
    recipes = [_cells(recipe_to_dict(member.recipe), ".") for member in members]
    fields = varying(recipes)
    for member, recipe in zip(members, recipes, strict=True):
        outcome = outcomes.get(member.name)
        row = {
            "member": member.name,
            "state": outcome.state if outcome else "waiting",
            "error": outcome.error if outcome else "",
            **{path: recipe.get(path) for path in fields},
        }
        try:
            summary = read_summary(member.folder)
        except (OSError, ValueError):
            summary = {}
        figures = _cells({k: v for k, v in summary.items() if k not in _NOT_FIGURES}, "/")
        rows.append(row | {k: v for k, v in figures.items() if not isinstance(v, str)})
    table = pd.DataFrame(rows)
    for name in table.columns:
        if table[name].map(lambda value: isinstance(value, str)).any() and name != "error":
            table[name] = table[name].map(lambda v: v if v is None or _is_nan(v) else str(v))
    return table


def varying(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields in which flat recipes differ, in the recipe's order."""
    if not recipes:
        return []
    names = list(dict.fromkeys(name for recipe in recipes for name in recipe))
    first = recipes[0]
    return [
        name for name in names if any(recipe.get(name) != first.get(name) for recipe in recipes)
    ]


def _cells(values: Mapping[str, Any], separator: str) -> dict[str, Any]:
    cells = flat(values, separator).items()
    return {k: json.dumps(v) if isinstance(v, list | tuple) else v for k, v in cells}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value
