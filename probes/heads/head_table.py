"""The scores of every head of a model, and the verdicts that follow from them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.heads.head_pictures import draw_panels, html_table
from probes.heads.scores import above_chance
from probes.reading.frames import pandas
from probes.reading.hook_names import Head

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Verdict: TypeAlias = Literal["induction", "previous_token", "duplicate_token", "positional"]

COLUMNS = (
    "prefix_matching",
    "prefix_matching_stderr",
    "positional_control",
    "previous_token",
    "duplicate_token",
    "copying",
    "uniform_baseline",
    "duplicate_control",
    "positional",
    "positional_offset",
)
"""The numbers of a head in JSON, in order."""

_MORE_COLUMNS = (
    "positional_control_stderr",
    "previous_token_stderr",
    "duplicate_token_stderr",
    "duplicate_control_stderr",
    "previous_token_uniform",
    "duplicate_token_uniform",
    "positional_uniform",
)

_LISTED = 5
"""How many heads without a verdict a notebook lists."""

CONTROLS = {"prefix_matching": "positional_control", "duplicate_token": "duplicate_control"}
"""For a score, the field with the same attention in sequences that do not repeat."""

UNIFORM = {
    "prefix_matching": "uniform_baseline",
    "positional_control": "uniform_baseline",
    "previous_token": "previous_token_uniform",
    "duplicate_token": "duplicate_token_uniform",
    "duplicate_control": "duplicate_token_uniform",
    "positional": "positional_uniform",
}
"""For a score, the field with the score of uniform attention."""


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """Scores of every head, `[layer, head]`; means over sequences with their standard errors.

    Scores are shares of attention in [0, 1] unless noted; NaN if not defined (a standard error of
    one sequence, the copying score of a model that predicts another vocabulary).

    A head reaches the threshold in a score if `score >= threshold` and
    `(score - uniform) / (1 - uniform) >= threshold / 2`, where `uniform` is the score of uniform
    attention on the same sequences. (At 0.4 the second condition matters only if `uniform` exceeds
    1/4: in short sequences, or with few different tokens.) The verdict is

    - `induction` if `prefix_matching` reaches the threshold, is at least twice
      `positional_control`, and exceeds it by more than three standard errors;
    - `duplicate_token` likewise, with `duplicate_control`;
    - `previous_token` if `previous_token` reaches the threshold;
    - `positional` if `positional` reaches the threshold: the head attends a fixed number of
      positions back, two or more, whatever the tokens are. Attention to the first position of a
      sequence, an attention sink, does not count.

    Attributes:
        layers: the layer number of each row.
        n_layers: number of layers of the model.
        sequences: number of repeated sequences scored; the controls were as many.
        threshold: the score at which a head gets a verdict.
        prefix_matching: attention to the position after the token's earlier occurrence.
        positional_control: attention to the same positions in sequences that do not repeat.
        previous_token: attention to the position before.
        duplicate_token: attention to the token's earlier occurrence.
        duplicate_control: attention to the same positions in sequences that do not repeat.
        positional: the largest mean attention at one fixed offset of two or more, in sequences
            that do not repeat; NaN if the sequences are too short. It has no standard error.
        positional_offset: that offset, in positions back (0 if `positional` is NaN).
        copying: `copying_score` of the head's OV circuit, in [-1, 1]; depends on weights alone.
        uniform_baseline: the `prefix_matching` score of uniform attention.
        previous_token_uniform: the `previous_token` score of uniform attention.
        duplicate_token_uniform: the `duplicate_token` score of uniform attention.
        positional_uniform: mean uniform attention at `positional_offset`.

    Source:
        Olsson et al. 2022, "In-context Learning and Induction Heads"; Wang et al. 2022,
        "Interpretability in the Wild".

    >>> from probes import score_heads
    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> scores = score_heads(HookedTransformer({**sizes, "attn_only": True, "device": "cpu"}))
    >>> scores
    HeadScores(1 layers × 2 heads, 32 sequences: no head reaches 0.4)
    >>> best = scores.top("prefix_matching", 1)[0]
    >>> bool(scores.prefix_matching[best] == scores.prefix_matching.max())
    True
    """

    layers: tuple[int, ...]
    n_layers: int
    sequences: int
    threshold: float
    prefix_matching: Float[Tensor, "layer head"]
    prefix_matching_stderr: Float[Tensor, "layer head"]
    positional_control: Float[Tensor, "layer head"]
    positional_control_stderr: Float[Tensor, "layer head"]
    previous_token: Float[Tensor, "layer head"]
    previous_token_stderr: Float[Tensor, "layer head"]
    duplicate_token: Float[Tensor, "layer head"]
    duplicate_token_stderr: Float[Tensor, "layer head"]
    duplicate_control: Float[Tensor, "layer head"]
    duplicate_control_stderr: Float[Tensor, "layer head"]
    positional: Float[Tensor, "layer head"]
    positional_offset: Int[Tensor, "layer head"]
    copying: Float[Tensor, "layer head"]
    uniform_baseline: Float[Tensor, "layer head"]
    previous_token_uniform: Float[Tensor, "layer head"]
    duplicate_token_uniform: Float[Tensor, "layer head"]
    positional_uniform: Float[Tensor, "layer head"]

    @property
    def n_heads(self) -> int:
        """Number of heads of a layer."""
        return self.prefix_matching.shape[1]

    @cached_property
    def verdicts(self) -> Mapping[Head, tuple[Verdict, ...]]:
        """The verdicts on every (layer, head); empty for a head that reaches no threshold."""
        applies: dict[Verdict, Tensor] = {
            "induction": self._above_control("prefix_matching"),
            "previous_token": self.reaches("previous_token", self.threshold),
            "duplicate_token": self._above_control("duplicate_token"),
            "positional": self.reaches("positional", self.threshold),
        }
        return {
            (layer, head): tuple(name for name, heads in applies.items() if heads[row, head])
            for row, layer in enumerate(self.layers)
            for head in range(self.n_heads)
        }

    def score(self, name: str) -> Tensor:
        """A score of every head by its name, `[layer head]`.

        Raises:
            ValueError: there is no such score.
        """
        if name not in (*COLUMNS, *_MORE_COLUMNS):
            raise ValueError(f"no score {name!r}; there are {', '.join(COLUMNS + _MORE_COLUMNS)}")
        values: Tensor = getattr(self, name)
        return values

    def reaches(self, score: str, threshold: float) -> Bool[Tensor, "layer head"]:
        """Whether each head reaches the threshold in a score, as the class defines it.

        For scores without a uniform counterpart, such as `copying`: `score >= threshold` alone.

        Raises:
            ValueError: there is no such score.
        """
        values = self.score(score)
        reached = values >= threshold
        if score in UNIFORM:
            uniform: Tensor = getattr(self, UNIFORM[score])
            reached &= above_chance(values, uniform) >= threshold / 2
        return reached

    def _above_control(self, name: str) -> Tensor:
        control = CONTROLS[name]
        score: Tensor = getattr(self, name)
        control_score: Tensor = getattr(self, control).nan_to_num(0.0)
        errors = [getattr(self, f"{part}_stderr").nan_to_num(0.0) for part in (name, control)]
        significant: Tensor = score - control_score > 3 * torch.hypot(*errors)
        return self.reaches(name, self.threshold) & (score >= 2 * control_score) & significant

    def heads(self, verdict: Verdict) -> list[Head]:
        """The heads with this verdict, as (layer, head), the highest score first."""
        score = "prefix_matching" if verdict == "induction" else verdict
        ranked = self.top(score, len(self.verdicts))
        return [head for head in ranked if verdict in self.verdicts[head]]

    def top(self, score: str, n: int) -> list[Head]:
        """The n heads that are highest in a score, as (layer, head); NaN comes last.

        Raises:
            ValueError: there is no such score.
        """
        values = self.score(score).double().nan_to_num(-math.inf).flatten()
        order = values.argsort(descending=True, stable=True)[:n].tolist()
        return [(self.layers[i // self.n_heads], i % self.n_heads) for i in order]

    def to_dict(self, model: str = "") -> dict[str, Any]:
        """Plain numbers, ready for JSON; heads sorted by prefix matching, the highest first.

        Keys: `model`, `n_layers`, `n_heads`, `sequences`, `threshold`, `heads`; each head has
        `layer`, `head`, the scores in `COLUMNS`, `verdict`. NaN becomes None.

        Args:
            model: the value of the key `model`.
        """
        return {
            "model": model,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "sequences": self.sequences,
            "threshold": self.threshold,
            "heads": [
                {key: None if value != value else value for key, value in row.items()}
                for row in self._rows(COLUMNS)
            ],
        }

    def to_json(self, model: str = "") -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(model), indent=2, allow_nan=False)

    def to_frame(self) -> Any:
        """A pandas frame with one row per head, the highest prefix matching first.

        Columns: those of a head in `to_dict`, then the remaining scores; `verdict` is a list.
        """
        return pandas().DataFrame(self._rows((*COLUMNS, *_MORE_COLUMNS)))

    def plot(self, *scores: str) -> "Figure":
        """Draw scores by layer and head; a frame marks the heads with the score's verdict.

        Args:
            *scores: names of scores; by default prefix matching, previous and duplicate token.

        Returns:
            A matplotlib figure, drawn without a display; a notebook shows it,
            `figure.savefig("heads.png")` writes it.

        Raises:
            ValueError: there is no such score.
        """
        names = scores or ("prefix_matching", "previous_token", "duplicate_token")
        panels = {name: self.score(name) for name in names}
        verdicts: dict[str, Verdict] = {"prefix_matching": "induction"}
        verdicts |= {"previous_token": "previous_token", "duplicate_token": "duplicate_token"}
        verdicts |= {"positional": "positional"}
        marked = {name: self.heads(verdicts[name]) for name in names if name in verdicts}
        title = f"{self.sequences} sequences; framed: verdict at threshold {self.threshold:g}"
        return draw_panels(panels, self.layers, marked, title)

    def _repr_html_(self) -> str:
        """A table of the heads with a verdict and the five highest, for notebooks."""
        listed = [row for i, row in enumerate(self._rows(COLUMNS)) if i < _LISTED or row["verdict"]]
        names = ("prefix_matching", "positional_control", "previous_token", "duplicate_token")
        rows = [
            [
                f"{row['layer']}.{row['head']}",
                *(f"{row[name]:.3f}" for name in (*names, "copying")),
                ", ".join(row["verdict"]).replace("_", " "),
            ]
            for row in listed
        ]
        headings = ("head", *(name.replace("_", " ") for name in names), "copying", "verdict")
        caption = (
            f"{len(self.verdicts)} heads, {self.sequences} sequences, threshold "
            f"{self.threshold:g}; {len(rows)} listed, to_frame() has all"
        )
        return html_table(caption, headings, rows)

    def _rows(self, columns: tuple[str, ...]) -> list[dict[str, Any]]:
        values = {name: getattr(self, name).tolist() for name in columns}
        return [
            {
                "layer": layer,
                "head": head,
                **{name: rows[self.layers.index(layer)][head] for name, rows in values.items()},
                "verdict": list(self.verdicts[layer, head]),
            }
            for layer, head in self.top("prefix_matching", len(self.verdicts))
        ]

    def __repr__(self) -> str:
        named = [f"{layer}.{head} {'+'.join(v)}" for (layer, head), v in self.verdicts.items() if v]
        verdicts = ", ".join(named) or f"no head reaches {self.threshold:g}"
        sizes = f"{len(self.layers)} layers × {self.n_heads} heads, {self.sequences} sequences"
        return f"HeadScores({sizes}: {verdicts})"
