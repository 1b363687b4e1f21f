"""What every head of a model scored, and what that makes it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.heads.scores import above_chance

Head: TypeAlias = tuple[int, int]
"""A head as (layer, head)."""

Verdict: TypeAlias = Literal["induction", "previous_token", "duplicate_token", "positional"]

COLUMNS = (
    "induction",
    "induction_stderr",
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

# What uniform attention would score.
_UNIFORM = {
    "induction": "uniform_baseline",
    "positional_control": "uniform_baseline",
    "previous_token": "previous_token_uniform",
    "duplicate_token": "duplicate_token_uniform",
    "duplicate_control": "duplicate_token_uniform",
    "positional": "positional_uniform",
}


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """Scores of every head, `[layer, head]`; means over sequences with their standard errors.

    Shares of attention in [0, 1] unless said otherwise; NaN where nothing could be measured (a
    standard error of one sequence, the copying of a model that writes another vocabulary).

    A head reaches the threshold in a score if `score >= threshold`, and half of it above chance:
    `(score - uniform) / (1 - uniform) >= threshold / 2`, where `uniform` is what attention to all
    keys alike scores on the same sequences. (At 0.4 this matters where chance gives more than a
    quarter: in short sequences, or with few different tokens.) It is called

    - `induction` if it does in `induction`, with clearly more than its `positional_control`: at
      least twice as much, and by three standard errors;
    - `duplicate_token` likewise, against `duplicate_control`;
    - `previous_token` if it does in `previous_token`;
    - `positional` if it does in `positional`: it looks a fixed number of positions back,
      two or more, at whatever is there. The first position of a sequence, where heads rest,
      does not count.

    Attributes:
        layers: the model's number of each row.
        n_layers: layers of the model.
        sequences: repeated sequences scored; there were as many controls.
        threshold: from where on a head gets its name.
        induction: attention to the position after the token's earlier occurrence.
        positional_control: attention to the same positions in sequences that do not repeat.
        previous_token: attention to the position before.
        duplicate_token: attention to the token's earlier occurrence.
        duplicate_control: attention to the same positions in sequences that do not repeat.
        positional: the largest mean attention at one fixed offset of two or more, in sequences
            that do not repeat; NaN where the sequences are too short to tell. No standard error.
        positional_offset: that offset, in positions back (0 where `positional` is NaN).
        copying: of the head's OV circuit, in [-1, 1]; a property of the weights.
        uniform_baseline: what uniform attention would score as `induction`.
        previous_token_uniform: the same as `previous_token`.
        duplicate_token_uniform: the same as `duplicate_token`.
        positional_uniform: the same at `positional_offset`.

    Source:
        Olsson et al. 2022, "In-context Learning and Induction Heads"; Wang et al. 2022,
        "Interpretability in the Wild".

    >>> from probes import score_heads
    >>> from transformer_lens import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20}
    >>> scores = score_heads(HookedTransformer({**sizes, "attn_only": True, "device": "cpu"}))
    >>> scores
    HeadScores(1 layers × 2 heads, 32 sequences: no head reaches 0.4)
    >>> scores.top("induction", 1) == [max(scores.verdicts, key=lambda h: scores.induction[h])]
    True
    """

    layers: tuple[int, ...]
    n_layers: int
    sequences: int
    threshold: float
    induction: Float[Tensor, "layer head"]
    induction_stderr: Float[Tensor, "layer head"]
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
        """Heads of a layer."""
        return self.induction.shape[1]

    @cached_property
    def verdicts(self) -> Mapping[Head, tuple[Verdict, ...]]:
        """What each head is called, for every (layer, head); mostly nothing."""
        names: dict[Verdict, Tensor] = {
            "induction": self._above_control("induction", "positional_control"),
            "previous_token": self.reaches("previous_token", self.threshold),
            "duplicate_token": self._above_control("duplicate_token", "duplicate_control"),
            "positional": self.reaches("positional", self.threshold),
        }
        return {
            (layer, head): tuple(name for name, found in names.items() if found[row, head])
            for row, layer in enumerate(self.layers)
            for head in range(self.n_heads)
        }

    def reaches(self, score: str, threshold: float) -> Bool[Tensor, "layer head"]:
        """Whether each head has a score from the threshold on, half of it above chance.

        Without regard to chance for a score that has none, such as `copying`.

        Raises:
            ValueError: there is no such score.
        """
        self.top(score, 0)
        values: Tensor = getattr(self, score)
        reached = values >= threshold
        if score in _UNIFORM:
            uniform: Tensor = getattr(self, _UNIFORM[score])
            reached &= above_chance(values, uniform) >= threshold / 2
        return reached

    def _above_control(self, name: str, control: str) -> Tensor:
        score: Tensor = getattr(self, name)
        beside: Tensor = getattr(self, control).nan_to_num(0.0)
        errors = [getattr(self, f"{part}_stderr").nan_to_num(0.0) for part in (name, control)]
        clear: Tensor = score - beside > 3 * torch.hypot(*errors)
        return self.reaches(name, self.threshold) & (score >= 2 * beside) & clear

    def heads(self, verdict: Verdict) -> list[Head]:
        """The heads so called, as (layer, head), the highest score first."""
        named = [head for head, verdicts in self.verdicts.items() if verdict in verdicts]
        return [head for head in self.top(verdict, len(self.verdicts)) if head in named]

    def top(self, score: str, n: int) -> list[Head]:
        """The n heads with the highest score of that name, as (layer, head); NaN comes last.

        Raises:
            ValueError: there is no such score.
        """
        if score not in (*COLUMNS, *_MORE_COLUMNS):
            raise ValueError(f"no score {score!r}; there are {', '.join(COLUMNS + _MORE_COLUMNS)}")
        values = getattr(self, score).double().nan_to_num(-math.inf).flatten()
        order = values.argsort(descending=True, stable=True)[:n].tolist()
        return [(self.layers[i // self.n_heads], i % self.n_heads) for i in order]

    def to_dict(self, model: str = "") -> dict[str, Any]:
        """Plain numbers, ready for JSON; heads sorted by induction score, the highest first.

        Keys: `model`, `n_layers`, `n_heads`, `sequences`, `threshold`, `heads`; of each head
        `layer`, `head`, the scores in `COLUMNS`, `verdict`. What could not be measured is None.

        Args:
            model: the name to write down.
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
        """A pandas frame: one row per head, the highest induction score first.

        Columns as in `to_dict`, then the remaining scores; `verdict` is a list.
        """
        import pandas as pd  # type: ignore[import-untyped, unused-ignore]

        return pd.DataFrame(self._rows((*COLUMNS, *_MORE_COLUMNS)))

    def _rows(self, columns: tuple[str, ...]) -> list[dict[str, Any]]:
        values = {name: getattr(self, name).tolist() for name in columns}
        return [
            {
                "layer": layer,
                "head": head,
                **{name: rows[self.layers.index(layer)][head] for name, rows in values.items()},
                "verdict": list(self.verdicts[layer, head]),
            }
            for layer, head in self.top("induction", len(self.verdicts))
        ]

    def __repr__(self) -> str:
        named = [f"{layer}.{head} {'+'.join(v)}" for (layer, head), v in self.verdicts.items() if v]
        found = ", ".join(named) or f"no head reaches {self.threshold:g}"
        sizes = f"{len(self.layers)} layers × {self.n_heads} heads, {self.sequences} sequences"
        return f"HeadScores({sizes}: {found})"
