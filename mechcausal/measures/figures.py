"""The figures of a run; figures.toml lists their names, units, ranges and meanings.

Pages, pictures, tables, the terminal and docs/figures.md take names and units from here.
"""

import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

STEP = "train/step"

HEAD_SCORES = ("prefix_matching", "previous_token", "duplicate_token")
"""The scores of every head that a run records."""

Value = float | int | None
History = Sequence[Mapping[str, Value]]
"""One row of figures per probe step, with the step under `train/step`."""

_RANGES = {
    "nats": (0.0, math.inf),
    "share": (0.0, 1.0),
    "correlation": (-1.0, 1.0),
    "score": (-math.inf, 1.0),
    "step": (0.0, math.inf),
    "χ²": (-math.inf, math.inf),
    "ratio": (0.0, math.inf),
}


@dataclass(frozen=True, kw_only=True)
class RunFigure:
    """A figure of a run, or a family of figures.

    Attributes:
        key: key in metrics.jsonl and W&B; `{...}` stands for the names of a family.
        label: name in pictures and tables.
        unit: nats, share, correlation, score, step, χ² or ratio.
        meaning: what the figure says, in Markdown.
        short: heading of a narrow column; the label if the list gives none.
        low: smallest possible value.
        high: largest possible value.
        reference: whether it is a constant to compare with, which pictures draw in grey.
    """

    key: str
    label: str
    unit: str = ""
    meaning: str = ""
    short: str = ""
    low: float = -math.inf
    high: float = math.inf
    reference: bool = False

    @property
    def title(self) -> str:
        """The label, with the unit if that is nats."""
        return f"{self.label}, nats" if self.unit == "nats" else self.label


@cache
def _listed() -> dict[str, dict[str, Any]]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


@cache
def figures() -> dict[str, RunFigure]:
    """Every figure that a run writes beside the step, by key."""
    listed = {}
    for key, entry in _listed()["figures"].items():
        low, high = _RANGES[entry["unit"]]
        values = {"key": key, "short": entry["label"], "low": low, "high": high} | entry
        listed[key] = RunFigure(**values)
    return listed


def figure_of(key: str) -> RunFigure:
    """The figure with this key, also one of a family.

    A key that is not listed, of an experiment of the user's own, is its own label; its unit is nats
    if it is a loss or starts with `kl`, as in `loss/mine` and `coins/kl_fair`.

    Example:
        >>> figure_of("loss/gap").title
        'loss above Bayes, nats'
        >>> figure_of("composition/L1H0_reads_L0H1").label
        'L1H0 reads L0H1'
        >>> figure_of("coins/kl_fair").title
        'coins/kl_fair, nats'
    """
    if key in figures():
        return figures()[key]
    for pattern, family in _families():
        if match := pattern.fullmatch(key):
            label = family.label.format(**match.groupdict())
            return replace(family, key=key, label=label, short=label)
    section, _, name = key.rpartition("/")
    unit = "nats" if section == "loss" or name.startswith("kl") else ""
    return RunFigure(key=key, label=key, short=key, unit=unit)


TASK_CURVES = (
    "tree",
    "scales",
    "residuals",
    "heights",
    "lags",
    "parents",
    "kernel",
    "copies",
)
"""Pictures over training that belong to one kind of task, see `curves`."""


def keys_in(history: History, keys: Iterable[str]) -> list[str]:
    """Which of the keys the rows have; a family becomes its members, in the rows' order.

    Example:
        >>> rows = [{"loss/eval": 1.0}, {"strategy/kl_bigram": 0.1}]
        >>> keys_in(rows, ["strategy/kl_{strategy}", "loss/eval", "loss/gap"])
        ['strategy/kl_bigram', 'loss/eval']
    """
    present = dict.fromkeys(key for row in history for key in row)
    patterns = [_pattern(key) for key in keys]
    return [key for pattern in patterns for key in present if pattern.fullmatch(key)]


def curves(history: History, name: str) -> tuple[str, list[str]]:
    """Title and figures of a picture over training, one of the list's `curves`.

    The picture of losses holds those that the list does not have, too.

    Example:
        >>> curves([{"loss/gap": 1.0, "loss/eval": 2.0}], "gap")
        ('loss above its references', ['loss/gap'])
    """
    entry = _listed()["curves"][name]
    keys = keys_in(history, entry["keys"])
    if name == "loss":
        keys += _unlisted(history).get("loss", [])
    if "graph/query_attention" not in keys:  # single parents: equals `graph/recovered`
        keys = [key for key in keys if key != "graph/rows_matched"]
    return entry["title"], keys


def own_curves(history: History) -> dict[str, list[str]]:
    """The figures that are not listed, by section: what comes before the last slash of their keys.

    Losses are left out: `curves` has them.

    Example:
        >>> own_curves([{"train/step": 0, "loss/eval": 1.0, "coins/bias": 1.0, "coins/error": 0.5}])
        {'coins': ['coins/bias', 'coins/error']}
    """
    return {name: keys for name, keys in _unlisted(history).items() if name != "loss"}


def _unlisted(history: History) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for row in history for key in row):
        if key != STEP and not figure_of(key).meaning:
            sections.setdefault(key.rpartition("/")[0] or "figures", []).append(key)
    return sections


def axis_limits(keys: Iterable[str], values: Iterable[Value]) -> tuple[float, float] | None:
    """Limits of an axis for these figures; None if one of them may exceed 1."""
    shown = [figure_of(key) for key in keys]
    if not shown or any(item.high != 1 for item in shown):
        return None
    lowest = min((value for value in values if value is not None), default=0.0)
    return (-0.03 if all(item.low == 0 for item in shown) else min(-0.03, lowest - 0.05), 1.05)


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(key)))


@cache
def _families() -> list[tuple[re.Pattern[str], RunFigure]]:
    return [(_pattern(key), item) for key, item in figures().items() if "{" in key]
