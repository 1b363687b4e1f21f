"""Compare the gradient on attention with the information of the data, row by row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.reading.attention_gradient import centred_by_row
from probes.watching.gradient import LossGradient
from probes.watching.information import PairwiseInformation

Target = Literal["next", "query"]

MIN_SIGNAL_TO_NOISE = 3.0
"""Below this signal-to-noise ratio a gradient is not compared with anything."""

MIN_Z = 5.0
"""Standard errors by which information must exceed 0 to count as an edge."""


@dataclass(frozen=True)
class Agreement:
    """How well the descent direction on attention follows the information of the data.

    Attributes:
        signal_to_noise: root mean square of the descent direction, divided by that of its standard
            errors. Pure noise gives about 1.
        pearson: correlation with χ²-information, for the sum over heads; NaN below
            `MIN_SIGNAL_TO_NOISE`, or if one side is constant.
        edge_hits: share of rows whose largest entry is an edge; NaN below `MIN_SIGNAL_TO_NOISE`.
        chance: the expected `edge_hits` of a row's largest entry picked at random.
        n_rows: rows that count for `edge_hits`.
        per_head: `pearson` of every head (layer, head) by itself; NaN below its own ratio of 3.
    """

    signal_to_noise: float
    pearson: float
    edge_hits: float
    chance: float
    n_rows: int
    per_head: dict[tuple[int, int], float]

    @property
    def measurable(self) -> bool:
        """Whether the gradient stands out from its sampling noise."""
        return self.signal_to_noise >= MIN_SIGNAL_TO_NOISE


def agreement(
    gradient: LossGradient,
    information: PairwiseInformation,
    *,
    target: Target = "next",
    layer: int | None = None,
    edges: Sequence[int | Sequence[int]] | None = None,
) -> Agreement:
    """Compare `-∂L/∂attention` of one layer with χ²-information.

    At uniform attention over i keys the softmax divides the gradient on scores by i, so each row of
    it is multiplied by its number of keys. With information by position, both sides are centred by
    row, since only differences within a row matter to a softmax. With information by lag, the
    gradient is averaged over the rows that have the lag.

    Which information belongs to row q depends on what the query's output predicts: a next-token
    model predicts x[q+1] from position q, so that row q is compared with I(x[q+1]; x[k]) for k <= q
    (`target="next"`). The paper's indexing compares with I(x[q]; x[k]) for k < q
    (`target="query"`), which fits models that move information to the token's own position.

    Args:
        gradient: of `attention_gradient`.
        information: of `pairwise_information`, for sequences of at least the gradient's length.
        target: "next" or "query".
        layer: the layer compared; None for the first in `gradient`.
        edges: for each position its parent, -1 for none, or a sequence of parents. None takes each
            position's most informative earlier position, where that information exceeds `MIN_Z`
            standard errors.

    Returns:
        Correlations and hits; NaN where the signal-to-noise ratio is below 3.

    Raises:
        ValueError: the sizes differ, or there is no such layer or target.

    Source:
        Nichani, Damian and Lee 2024, section 4, for the first gradient of the simplified model.
    """
    if target not in get_args(Target):
        raise ValueError(f'target is {target!r}; allowed: "next", "query"')
    chosen = int(gradient.mean.coords["layer"][0]) if layer is None else layer
    parts = (gradient.summed, gradient.summed_stderr, gradient.mean, gradient.stderr)
    summed, summed_error, by_head, by_head_error = (
        part.sel(layer=chosen).values.double().cpu() for part in parts
    )
    descent = -torch.cat([summed.unsqueeze(0), by_head])
    errors = torch.cat([summed_error.unsqueeze(0), by_head_error])
    if gradient.wrt == "scores":
        n_keys = torch.arange(1, descent.shape[-1] + 1).unsqueeze(1)
        descent, errors = descent * n_keys, errors * n_keys
    shift = 1 if target == "next" else 0  # row q is compared with position q + shift
    compare = _by_lag if information.by == "lag" else _by_position
    comparison = compare(descent, errors, information.chi2.double().cpu(), shift)
    ratio, *head_ratios = comparison.signal_to_noise()
    pearson, *head_pearsons = (_pearson(*pair) for pair in comparison.pairs())
    hits = chance = math.nan
    n_rows = 0
    if information.by == "position":
        parents = _most_informative(information) if edges is None else _parent_sets(edges)
        hits, chance, n_rows = _edge_hits(comparison.values[0], comparison.compared, parents, shift)
    measurable = ratio >= MIN_SIGNAL_TO_NOISE
    return Agreement(
        signal_to_noise=ratio,
        pearson=pearson if measurable else math.nan,
        edge_hits=hits if measurable else math.nan,
        chance=chance,
        n_rows=n_rows,
        per_head={
            (chosen, head): value if head_ratio >= MIN_SIGNAL_TO_NOISE else math.nan
            for head, (value, head_ratio) in enumerate(zip(head_pearsons, head_ratios, strict=True))
        },
    )


@dataclass(frozen=True)
class _Comparison:
    """Descent directions beside information; index 0 is the sum over heads, then every head.

    Attributes:
        values: centred by row where there are rows.
        errors: the standard errors.
        information: centred alike.
        compared: the entries that count.
    """

    values: Float[Tensor, "source *entry"]
    errors: Float[Tensor, "source *entry"]
    information: Float[Tensor, "*entry"]
    compared: Bool[Tensor, "*entry"]

    def signal_to_noise(self) -> list[float]:
        signal, noise = (x[:, self.compared].square().mean(1) for x in (self.values, self.errors))
        return (signal / noise).sqrt().tolist()

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(v[self.compared], self.information[self.compared]) for v in self.values]


def _by_position(
    values: Tensor, errors: Tensor, information: Float[Tensor, "pos pos"], shift: int
) -> _Comparison:
    n = values.shape[-1]
    if len(information) != n:
        raise ValueError(
            f"the gradient is over {n} positions, the information over {len(information)}"
        )
    values, information, compared = row_by_row(values, information, shift=shift)
    return _Comparison(values, errors[:, : n - shift], information, compared)


def row_by_row(
    values: Float[Tensor, "*source query key"],
    information: Float[Tensor, "query key"],
    *,
    shift: int,
) -> tuple[Tensor, Tensor, Bool[Tensor, "row key"]]:
    """Line up the rows of a descent direction with those of information, both centred by row.

    Row q of `values` belongs to row q + `shift` of `information`, over the keys before position
    q + `shift`. A row with one key has nothing to compare.

    Returns:
        Both sides, 0 where nothing is compared, and which entries are.
    """
    n_rows = len(information) - shift
    information, values = information[shift:], values[..., :n_rows, :]
    compared = information.isfinite().tril(shift - 1)
    compared &= compared.sum(1, keepdim=True) > 1
    return centred_by_row(values, compared), centred_by_row(information, compared), compared


def _by_lag(
    values: Tensor, errors: Tensor, information: Float[Tensor, "lag"], shift: int
) -> _Comparison:
    """Per lag, the mean over the rows that have it; in row q, key k has lag `q + shift - k`."""
    n = values.shape[-1]
    lags = range(1, min(len(information), n - 1) + 1)
    by_lag = torch.stack([lag_diagonal(values, lag - shift, shift).mean(-1) for lag in lags], -1)
    squares = [lag_diagonal(errors, lag - shift, shift).square() for lag in lags]
    error = torch.stack([part.mean(-1) / part.shape[-1] for part in squares], -1).sqrt()
    reference = information[: len(lags)]
    return _Comparison(by_lag, error, reference, reference.isfinite())


def lag_diagonal(matrix: Tensor, below: int, shift: int) -> Tensor:
    """Entries [q, q - below] of every row but the last `shift`."""
    rows = matrix.shape[-1] - shift  # without the row that predicts beyond the sequence
    return matrix[..., :rows, :].diagonal(-below, -2, -1)


def _pearson(left: Float[Tensor, "entry"], right: Float[Tensor, "entry"]) -> float:
    """Pearson correlation; NaN if a side is constant."""
    left, right = left - left.mean(), right - right.mean()
    scale = (left.square().sum() * right.square().sum()).sqrt()
    return ((left * right).sum() / scale).item() if scale > 0 else math.nan


def _parent_sets(edges: Sequence[int | Sequence[int]]) -> list[tuple[int, ...]]:
    parents = [(entry,) if isinstance(entry, int) else tuple(entry) for entry in edges]
    for position, row in enumerate(parents):
        if any(not -1 <= parent < position for parent in row):
            raise ValueError(
                f"edges: position {position} has parents {list(row)}; allowed: -1 (none) or "
                "earlier positions"
            )
    return [tuple(parent for parent in row if parent >= 0) for row in parents]


def _most_informative(information: PairwiseInformation) -> list[tuple[int, ...]]:
    """For each position the earlier one with most information, where that is significant."""
    chi2, error = information.chi2.cpu(), information.chi2_stderr.cpu()
    parents: list[tuple[int, ...]] = [()]
    for position in range(1, len(chi2)):
        best = int(chi2[position, :position].nan_to_num(-math.inf).argmax())
        clear = chi2[position, best] > MIN_Z * error[position, best]
        parents.append((best,) if clear else ())
    return parents


def _edge_hits(
    values: Float[Tensor, "query key"],
    compared: Bool[Tensor, "query key"],
    parents: list[tuple[int, ...]],
    shift: int,
) -> tuple[float, float, int]:
    """Share of rows whose largest entry is a parent, the same for a random entry, and rows."""
    if len(parents) != len(values) + shift:
        raise ValueError(
            f"edges name {len(parents)} positions, the gradient has {len(values) + shift}"
        )
    hits, chances = [], []
    for row, keys in enumerate(compared):
        edges = parents[row + shift]
        if edges and bool(keys.any()):
            largest = int(values[row].masked_fill(~keys, -math.inf).argmax())
            hits.append(largest in edges)
            chances.append(len(edges) / int(keys.sum()))
    if not hits:
        return math.nan, math.nan, 0
    return sum(hits) / len(hits), sum(chances) / len(chances), len(hits)
