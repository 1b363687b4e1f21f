"""Explanations of many predictions by every method, with equal budgets: sizes, success, calls."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from probes.causal_discovery.explain import METHODS, Explanation, Method, explain

MINIMUM = "minimum"
"""The exhaustive search without a budget: what no method can do better than."""
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
    """What one method found on one model's predictions.

    Attributes:
        size: mean tokens of a set, over the predictions for which one was found.
        above_minimum: mean tokens more than the true minimum has, over the same.
        found: share of predictions for which a set was found.
        verified: share of the sets that change the prediction in one more run, on their own.
        causes: share of the sets' tokens that the known rule names; NaN without a rule.
        calls: mean sequences run.
    """

    size: float
    above_minimum: float
    found: float
    verified: float
    causes: float
    calls: float


@dataclass(frozen=True)
class Row:
    """The same as means over seeds, with standard errors; NaN where there is none.

    Attributes:
        method: a method of `probes.explain`, or "minimum".
        mean: by name of `MethodFigures`.
        stderr: over seeds.
    """

    method: str
    mean: dict[str, float]
    stderr: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """`{"method", "size", "size_stderr", …}`, None for NaN."""
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
    """Explain the model's predictions for some sequences by every method.

    Args:
        model: predicts at `node`.
        sequences: one each row.
        causes: the tokens that the rule names, where it is known.
        replacement: see `probes.explain`, as for the rest.
        node: see there.
        fill: see there.
        budget: of every method.
        n_eff: see there.
        seed: of the random candidates.
        on_done: called after every sequence.
    """
    generator = torch.Generator(device=sequences.device).manual_seed(seed)
    found: dict[str, list[Explanation]] = {name: [] for name in (*METHODS, MINIMUM)}
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
            found[method].append(explained(method, budget))
        complete = found["exhaustive"][-1]
        if not complete.found and complete.calls >= budget:
            complete = explained("exhaustive", _MOST_CALLS)
        found[MINIMUM].append(complete)
        on_done()
    smallest = [explanation.size for explanation in found[MINIMUM]]
    return {
        method: _figures(
            explanations,
            smallest,
            verified=[
                changes(model, tokens, explanation, replacement=replacement, node=node)
                for tokens, explanation in zip(sequences, explanations, strict=True)
                if explanation.found
            ],
            causes=None if causes is None else causes.tolist(),
        )
        for method, explanations in found.items()
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
    """Whether the prediction changes without the explanation's tokens: one more run, on its own."""
    replaced = tokens.clone()
    replaced[list(explanation.positions)] = replacement
    predicted = int(model(replaced.unsqueeze(0))[0, node].argmax())
    return predicted == explanation.new_prediction != explanation.prediction


def over_seeds(by_seed: Sequence[Mapping[str, MethodFigures]]) -> list[Row]:
    """Means over seeds with their standard errors."""
    rows = []
    for method in LABELS:
        values = [asdict(figures[method]) for figures in by_seed]
        columns = {name: [value[name] for value in values] for name in values[0]}
        # Where a seed has no such figure, for nothing was found, the others speak.
        known = {name: [v for v in column if math.isfinite(v)] for name, column in columns.items()}
        mean = {name: _mean(column) for name, column in known.items()}
        stderr = {
            name: stdev(column) / math.sqrt(len(column)) if len(column) > 1 else math.nan
            for name, column in known.items()
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
    found = [(i, e) for i, e in enumerate(explanations) if e.found]
    named = [float(causes[i][p]) for i, e in found for p in e.positions] if causes else []
    return MethodFigures(
        size=_mean([e.size for _, e in found]),
        # Where even the unlimited search gave up there is no minimum to compare with.
        above_minimum=_mean([e.size - smallest[i] for i, e in found if smallest[i]]),
        found=len(found) / len(explanations),
        verified=_mean([float(value) for value in verified]),
        causes=_mean(named),
        calls=_mean([e.calls for e in explanations]),
    )


def _mean(values: Sequence[float | int]) -> float:
    return float(fmean(values)) if values else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
