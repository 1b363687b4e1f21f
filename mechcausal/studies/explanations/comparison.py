"""Compare the methods of `probes.explain` on many predictions with equal budgets."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from probes.causal_discovery.explanation import METHODS, Explanation, Method, explain

MINIMUM = "minimum"
"""Exhaustive search with a far larger budget: no method can find smaller sets."""
_MOST_CALLS = 20_000
LABELS = {
    "causal": "causal graph",
    "random": "shuffled",
    "occlusion": "occlusion",
    "attention": "attention",
    "exhaustive": "exhaustive",
    MINIMUM: "true minimum",
}


@dataclass(frozen=True)
class MethodFigures:
    """Results of one method on one model's predictions.

    Attributes:
        size: mean number of tokens in a set, over predictions with a set.
        above_minimum: mean excess of that number over the true minimum.
        found: share of predictions for which the method found a set.
        verified: share of the sets that change the prediction in a separate run.
        causes: share of the sets' tokens that are causes by the known rule; NaN without a rule.
        calls: mean number of sequences run per prediction.
    """

    size: float
    above_minimum: float
    found: float
    verified: float
    causes: float
    calls: float


@dataclass(frozen=True)
class Row:
    """Means of `MethodFigures` over seeds, with standard errors; NaN if undefined.

    Attributes:
        method: a method of `probes.explain`, or "minimum".
        mean: means over seeds, by field of `MethodFigures`.
        stderr: their standard errors.
    """

    method: str
    mean: dict[str, float]
    stderr: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """`{"method", "size", "size_stderr", …}` with None for NaN."""
        content: dict[str, Any] = {"method": self.method}
        for name, value in self.mean.items():
            content[name] = _finite(value)
            content[f"{name}_stderr"] = _finite(self.stderr[name])
        return content


def compare(
    model: HookedTransformer,
    sequences: Int[Tensor, "batch pos"],
    *,
    causes: Bool[Tensor, "batch pos"] | None,
    replacement: int,
    node: int,
    fill: bool,
    budget: int,
    n_eff: float | int | None,
    seed: int,
    on_done: Callable[[], None] = lambda: None,
) -> dict[str, MethodFigures]:
    """Explain the model's predictions on the sequences by every method.

    Args:
        model: predicts at `node`.
        sequences: one sequence per row.
        causes: True at the causes by the known rule; None without a rule.
        replacement: see `probes.explain`.
        node: see `probes.explain`.
        fill: see `probes.explain`.
        budget: model runs per method and prediction.
        n_eff: see `probes.explain`.
        seed: seed of the random candidates.
        on_done: called after every sequence.
    """
    generator = torch.Generator(device=sequences.device).manual_seed(seed)
    explanations: dict[str, list[Explanation]] = {name: [] for name in (*METHODS, MINIMUM)}
    for tokens in sequences:

        def explained(method: Method, calls: int, tokens: Tensor = tokens) -> Explanation:
            return explain(
                model,
                tokens,
                replacement=replacement,
                method=method,
                node=node,
                fill=fill,
                budget=calls,
                n_eff=n_eff,
                generator=generator,
            )

        for method in METHODS:
            explanations[method].append(explained(method, budget))
        minimum = explanations["exhaustive"][-1]
        if not minimum.found and minimum.calls >= budget:
            minimum = explained("exhaustive", _MOST_CALLS)
        explanations[MINIMUM].append(minimum)
        on_done()
    smallest = [explanation.size for explanation in explanations[MINIMUM]]
    return {
        method: _figures(
            of_method,
            smallest,
            verified=[
                changes(model, tokens, explanation, replacement=replacement, node=node)
                for tokens, explanation in zip(sequences, of_method, strict=True)
                if explanation.found
            ],
            causes=None if causes is None else causes.tolist(),
        )
        for method, of_method in explanations.items()
    }


@torch.no_grad()
def changes(
    model: HookedTransformer,
    tokens: Int[Tensor, "pos"],
    explanation: Explanation,
    *,
    replacement: int,
    node: int,
) -> bool:
    """Whether replacing the explanation's tokens changes the prediction, in a separate run."""
    replaced = tokens.clone()
    replaced[list(explanation.positions)] = replacement
    predicted = int(model(replaced.unsqueeze(0))[0, node].argmax())
    return predicted == explanation.new_prediction != explanation.prediction


def over_seeds(by_seed: Sequence[Mapping[str, MethodFigures]]) -> list[Row]:
    """Means over seeds, with standard errors."""
    rows = []
    for method in LABELS:
        values = [asdict(figures[method]) for figures in by_seed]
        columns = {name: [value[name] for value in values] for name in values[0]}
        # A figure is NaN for a seed without any set: average over the other seeds.
        finite = {name: [v for v in column if math.isfinite(v)] for name, column in columns.items()}
        mean = {name: _mean(column) for name, column in finite.items()}
        stderr = {
            name: stdev(column) / math.sqrt(len(column)) if len(column) > 1 else math.nan
            for name, column in finite.items()
        }
        rows.append(Row(method, mean, stderr))
    return rows


def _figures(
    explanations: Sequence[Explanation],
    smallest: Sequence[int],
    *,
    verified: Sequence[bool],
    causes: Sequence[Sequence[bool]] | None,
) -> MethodFigures:
    successes = [(i, e) for i, e in enumerate(explanations) if e.found]
    is_cause = [float(causes[i][p]) for i, e in successes for p in e.positions] if causes else []
    return MethodFigures(
        size=_mean([e.size for _, e in successes]),
        # The minimum is unknown (0) where even the search with the larger budget failed.
        above_minimum=_mean([e.size - smallest[i] for i, e in successes if smallest[i]]),
        found=len(successes) / len(explanations),
        verified=_mean([float(value) for value in verified]),
        causes=_mean(is_cause),
        calls=_mean([e.calls for e in explanations]),
    )


def _mean(values: Sequence[float | int]) -> float:
    return float(fmean(values)) if values else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
