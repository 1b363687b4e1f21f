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

STEP = "train/step"

Value = float | int | None
History = Sequence[Mapping[str, Value]]
"""One row of figures per probe step, with the step under `train/step`."""

_RANGES = {
    "nats": (0.0, math.inf),
    "share": (0.0, 1.0),
    "correlation": (-1.0, 1.0),
    "score": (-math.inf, 1.0),
    "step": (0.0, math.inf),
}

CURVES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "loss": (
        "loss",
        (
            *("loss/eval", "loss/train", "loss/first_copy", "loss/second_copy"),
            *("loss/bayes", "loss/construction", "loss/chance"),
        ),
    ),
    "gap": (
        "loss above its references",
        ("loss/gap", "loss/construction_gap", "loss/in_context_gain"),
    ),
    "recovery": (
        "graph recovery",
        (
            *("graph/recovered", "graph/parent_attention", "graph/f1"),
            *("graph/rows_matched", "graph/query_attention"),
        ),
    ),
    "correlations": (
        "gradient against theory",
        (
            *("gradient/pattern_theory_correlation", "gradient/theory_correlation"),
            *("gradient/pattern_chi2_correlation", "gradient/pattern_shannon_correlation"),
            "gradient/pattern_edge_hits",
        ),
    ),
    "theory": (
        "gradient against theory",
        (
            *("gradient/theory_correlation", "gradient/pattern_theory_correlation"),
            *("gradient/edge_hits", "gradient/pattern_edge_hits"),
        ),
    ),
    "information": (
        "gradient against pairwise information",
        (
            *("gradient/chi2_correlation", "gradient/shannon_correlation"),
            *("gradient/pattern_chi2_correlation", "gradient/pattern_shannon_correlation"),
        ),
    ),
    "formation": (
        "induction head",
        (
            *("induction/score", "induction/attention", "induction/prefix_matching"),
            *("induction/copying", "induction/positional_control"),
        ),
    ),
    "strategies": ("KL to a strategy", ("strategy/kl_{strategy}",)),
    "composition": ("K-composition", ("composition/{reader}_reads_{writer}",)),
}
"""Title and keys of the pictures that show several figures over training."""


@dataclass(frozen=True, kw_only=True)
class RunFigure:
    """A figure of a run, or a family of figures.

    Attributes:
        key: key in metrics.jsonl and W&B; `{...}` stands for the names of a family.
        label: name in pictures and tables.
        unit: nats, share, correlation, score or step.
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
def figures() -> dict[str, RunFigure]:
    """Every figure that a run writes beside the step, by key."""
    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    listed = {}
    for key, entry in tomllib.loads(text).items():
        low, high = _RANGES[entry["unit"]]
        values = {"key": key, "short": entry["label"], "low": low, "high": high} | entry
        listed[key] = RunFigure(**values)
    return listed


def figure_of(key: str) -> RunFigure:
    """The figure with this key, also one of a family; an unknown key is its own label.

    Example:
        >>> figure_of("loss/gap").title
        'loss above Bayes, nats'
        >>> figure_of("composition/L1H0_reads_L0H1").label
        'L1H0 reads L0H1'
    """
    if key in figures():
        return figures()[key]
    for pattern, family in _families():
        if match := pattern.fullmatch(key):
            label = family.label.format(**match.groupdict())
            return replace(family, key=key, label=label, short=label)
    return RunFigure(key=key, label=key, short=key)


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


def curve_keys(history: History, name: str) -> list[str]:
    """The figures that the picture `name` of `CURVES` shows of these rows."""
    keys = keys_in(history, CURVES[name][1])
    if "graph/query_attention" not in keys:  # single parents: equals `graph/recovered`
        return [key for key in keys if key != "graph/rows_matched"]
    return keys


def axis_limits(keys: Iterable[str], values: Iterable[Value]) -> tuple[float, float] | None:
    """Limits of an axis for these figures; None if one of them may exceed 1."""
    shown = [figure_of(key) for key in keys]
    if not shown or any(item.high != 1 for item in shown):
        return None
    lowest = min((value for value in values if value is not None), default=0.0)
    return (-0.03 if all(item.low == 0 for item in shown) else min(-0.03, lowest - 0.05), 1.05)


def figures_table() -> str:
    """The table of docs/figures.md."""
    rows = ["| key | name | unit | range | meaning |", "|---|---|---|---|---|"]
    for item in figures().values():
        low, high = (f"{bound:g}".replace("inf", "∞") for bound in (item.low, item.high))
        key, label = (re.sub(r"{(\w+)}", r"‹\1›", text) for text in (item.key, item.label))
        limits = f"{low} to {high}".replace("-", "−")
        rows.append(f"| `{key}` | {label} | {item.unit} | {limits} | {item.meaning} |")
    return "\n".join(rows) + "\n"


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(key)))


@cache
def _families() -> list[tuple[re.Pattern[str], RunFigure]]:
    return [(_pattern(key), item) for key, item in figures().items() if "{" in key]
