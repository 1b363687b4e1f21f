"""Compare the methods of `probes.explain` on many predictions with equal budgets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from mechcausal.models.adapter import HookedTransformer
from mechcausal.studies.explanations.applications import Application
from mechcausal.studies.explanations.examples import PAD, Examples
from probes.causal_discovery.explanation import METHODS, Explanation, explain

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


def compare(
    application: Application,
    model: HookedTransformer,
    examples: Examples,
    *,
    budget: int,
    n_eff: float | int | None,
    seed: int,
) -> dict[str, MethodFigures]:
    """Explain the model's predictions on the examples by every method.

    Args:
        application: tells how the model predicts.
        model: the application's model.
        examples: what to explain.
        budget: model runs per method and prediction.
        n_eff: see `probes.explain`.
        seed: seed of the random candidates.
    """
    generator = torch.Generator(device=examples.tokens.device).manual_seed(seed)
    explanations: dict[str, list[Explanation]] = {name: [] for name in (*METHODS, MINIMUM)}
    for tokens in examples.tokens:
        options: dict[str, Any] = {
            "replacement": PAD,
            "node": application.node,
            "fill": application.fill,
            "n_eff": n_eff,
            "generator": generator,
        }
        for method in METHODS:
            explanation = explain(model, tokens, method=method, budget=budget, **options)
            explanations[method].append(explanation)
        minimum = explanations["exhaustive"][-1]
        if not minimum.found and minimum.calls >= budget:
            minimum = explain(model, tokens, method="exhaustive", budget=_MOST_CALLS, **options)
        explanations[MINIMUM].append(minimum)
    smallest = [explanation.size for explanation in explanations[MINIMUM]]
    return {
        method: _figures(model, application.node, examples, of_method, smallest)
        for method, of_method in explanations.items()
    }


@torch.no_grad()
def changes(
    model: HookedTransformer, tokens: torch.Tensor, explanation: Explanation, *, node: int
) -> bool:
    """Whether replacing the explanation's tokens changes the prediction, in a separate run."""
    replaced = tokens.clone()
    replaced[list(explanation.positions)] = PAD
    predicted = int(model(replaced.unsqueeze(0))[0, node].argmax())
    return predicted == explanation.new_prediction != explanation.prediction


def _figures(
    model: HookedTransformer,
    node: int,
    examples: Examples,
    explanations: Sequence[Explanation],
    smallest: Sequence[int],
) -> MethodFigures:
    successes = [(i, e) for i, e in enumerate(explanations) if e.found]
    verified = [changes(model, examples.tokens[i], e, node=node) for i, e in successes]
    is_cause: list[bool] = []
    if examples.causes is not None:
        is_cause = [bool(examples.causes[i, p]) for i, e in successes for p in e.positions]
    return MethodFigures(
        size=_mean([e.size for _, e in successes]),
        # The minimum is unknown (0) where even the search with the larger budget failed.
        above_minimum=_mean([e.size - smallest[i] for i, e in successes if smallest[i]]),
        found=len(successes) / len(explanations),
        verified=_mean(verified),
        causes=_mean(is_cause),
        calls=_mean([e.calls for e in explanations]),
    )


def _mean(values: Sequence[float | int]) -> float:
    return float(fmean(values)) if values else math.nan
