"""The residual law on a language model: the gradient by lag against information not used yet."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.measures.figures import History
from mechcausal.models.adapter import HookedTransformer
from probes import (
    DirectPath,
    PairwiseInformation,
    ResidualInformation,
    agreement,
    attention_gradient,
    descent_by_lag,
    direct_path,
    residual_information,
)

CORRELATIONS = ("residual_correlation", "raw_correlation", "direct_path_correlation")


@dataclass(frozen=True, eq=False)
class LawReading:
    """Layer 0's gradient by lag at one step, beside what should explain it; index 0 is lag 1.

    Attributes:
        residual: information that the model has not used yet.
        descent: `-∂L/∂pattern` of every head, mean over queries.
        path: the gradient that the direct path through the values implies.
        raw_correlation: Pearson correlation over lags of every head's gradient with χ²-information
            of the text; NaN for a head that does not stand out from its noise, see `agreement`.
        signal_to_noise: root mean square of the gradient, summed over heads, over its error's.
    """

    residual: ResidualInformation
    descent: Float[Tensor, "head lag"]
    path: DirectPath
    raw_correlation: Float[Tensor, "head"]
    signal_to_noise: float

    @property
    def figures(self) -> dict[str, float]:
        """Figures by name; correlations are means over the heads that stand out, else NaN."""
        heads = self.raw_correlation.isfinite()
        information = self.residual.centred_chi2
        to_residual = correlation(self.descent, information.expand_as(self.descent))
        to_path = correlation(self.descent, self.path.descent)
        by_head = (to_residual, self.raw_correlation, to_path)
        figures = {f"residual/lag{i}": x for i, x in enumerate(information.tolist(), start=1)}
        figures["residual/misfit"] = self.residual.misfit.mean().item()
        for name, values in zip(CORRELATIONS, by_head, strict=True):
            figures[f"gradient/{name}"] = values[heads].mean().item()
        return figures | {"gradient/signal_to_noise": self.signal_to_noise}

    @property
    def matrices(self) -> dict[str, Float[Tensor, "row lag"]]:
        """`gradient/by_lag` and `gradient/direct_path` by head; `residual/by_lag` in one row."""
        return {
            "gradient/by_lag": self.descent.float().cpu(),
            "gradient/direct_path": self.path.descent.float().cpu(),
            "residual/by_lag": self.residual.centred_chi2.unsqueeze(0).float().cpu(),
        }


def read_law(
    model: HookedTransformer,
    windows: Int[Tensor, "window pos"],
    information: PairwiseInformation,
) -> LawReading:
    """Measure both sides of the law on held-out windows; leaves the model as it was.

    Args:
        model: predicts the next token.
        windows: independent sequences.
        information: of the same windows, by lag; it says how many lags to read.
    """
    vocab_size = model.cfg.d_vocab
    n_lags = len(information.chi2)
    residual = residual_information(model, windows, max_lag=n_lags, max_vocab=vocab_size)
    gradient = attention_gradient(model, windows, wrt="pattern", layers=0)
    compared = agreement(gradient, information, target="next")
    return LawReading(
        residual=residual,
        descent=descent_by_lag(gradient)[:, :n_lags],
        path=direct_path(model, residual),
        raw_correlation=torch.tensor(list(compared.per_head.values()), dtype=torch.float64),
        signal_to_noise=compared.signal_to_noise,
    )


def correlation(
    left: Float[Tensor, "head lag"], right: Float[Tensor, "head lag"]
) -> Float[Tensor, "head"]:
    """Pearson correlation over lags, head by head; NaN where a side is constant."""
    left, right = (x.double() - x.double().mean(1, keepdim=True) for x in (left, right))
    return (left * right).sum(1) / (left.square().sum(1) * right.square().sum(1)).sqrt()


def law_in_window(history: History) -> dict[str, float | int]:
    """Mean correlations over the probe steps between the unigram and the bigram loss.

    There the first layer knows more than how frequent characters are, and later layers have not
    begun to compose. Empty without such steps.

    Example:
        >>> row = {"train/step": 3, "loss/unigram": 3.0, "loss/bigram": 2.0, "loss/eval": 2.5}
        >>> law_in_window([row | {"gradient/residual_correlation": 0.9}])
        {'law/first_step': 3, 'law/last_step': 3, 'law/residual_correlation': 0.9}
    """
    rows = [
        row
        for row in history
        if all(row.get(f"loss/{name}") is not None for name in ("eval", "unigram", "bigram"))
        and row["loss/bigram"] < row["loss/eval"] < row["loss/unigram"]  # type: ignore[operator]
    ]
    if not rows:
        return {}
    steps = [int(row["train/step"] or 0) for row in rows]
    means: dict[str, float | int] = {"law/first_step": min(steps), "law/last_step": max(steps)}
    for name in CORRELATIONS:
        values = [row.get(f"gradient/{name}") for row in rows]
        known = [value for value in values if value is not None and value == value]
        if known:
            means[f"law/{name}"] = sum(known) / len(known)
    return means
