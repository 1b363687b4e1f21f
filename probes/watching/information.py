"""How much the tokens of a dataset say about one another: pairwise information, estimated.

A plug-in estimate from n sequences is too large, by about (S - 1)²/2n nats with S symbols. So the
bias is estimated too and subtracted, and every value comes with its standard error.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.watching.counting import Counter, Groups, Vocabulary

By = Literal["position", "lag"]
Correction = Literal["jackknife", "shuffle", "miller_madow", "none"]

MIN_PER_CELL = 10
"""Observed pairs for each cell of a table below which the shuffle null corrects better."""
_N_SHUFFLES = 16


@dataclass(frozen=True, eq=False)
class PairwiseInformation:
    """Information of pairs of tokens, in nats (Shannon) and as χ², with the bias subtracted.

    Attributes:
        shannon: `Σ_ab P(a,b) log(P(a,b) / P(a)P(b))`: `[query, key]`, symmetric, with NaN on the
            diagonal, or `[lag]`, where index 0 is lag 1. NaN where no pair was unmasked.
        chi2: `Σ_ab P(a,b)² / (P(a)P(b)) - 1`, alike.
        shannon_stderr: standard error of `shannon`.
        chi2_stderr: standard error of `chi2`.
        shannon_bias: the estimated bias that was subtracted from the plug-in `shannon`.
        chi2_bias: that of `chi2`.
        n_sequences: sequences counted.
        by: "position", or "lag" when all positions are pooled.
        correction: the method behind the bias.
        n_symbols: symbols told apart, including the bucket.
        bucket_share: share of tokens that share the bucket of rare tokens. Above 0, the values are
            lower bounds: merging symbols never adds information.
    """

    shannon: Float[Tensor, "..."]
    chi2: Float[Tensor, "..."]
    shannon_stderr: Float[Tensor, "..."]
    chi2_stderr: Float[Tensor, "..."]
    shannon_bias: Float[Tensor, "..."]
    chi2_bias: Float[Tensor, "..."]
    n_sequences: int
    by: By
    correction: Correction
    n_symbols: int
    bucket_share: float

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.chi2.shape))
        bound = f", lower bound: {self.bucket_share:.1%} in a bucket" if self.bucket_share else ""
        return (
            f"PairwiseInformation(by {self.by}, {shape}, {self.n_sequences} sequences, "
            f"{self.n_symbols} symbols, {self.correction}{bound})"
        )


def pairwise_information(
    tokens: Int[Tensor, "sequence pos"] | Iterable[Int[Tensor, "batch pos"]],
    *,
    vocab_size: int | None = None,
    mask: Bool[Tensor, "sequence pos"] | Iterable[Bool[Tensor, "batch pos"]] | None = None,
    correction: Correction | None = None,
    folds: int = 16,
    groups: Int[Tensor, "sequence"] | None = None,
    by: By = "position",
    max_lag: int | None = None,
    max_vocab: int = 256,
    generator: torch.Generator | None = None,
) -> PairwiseInformation:
    """Estimate the information between the tokens at every two positions, or at every lag.

    Corrections of the bias: "jackknife" leaves out one of `folds` parts of the sequences at a time;
    "shuffle" pairs the keys of one sequence with the query of another, where information is 0;
    "miller_madow" uses the number of symbols seen; "none" keeps the plug-in estimate.

    Args:
        tokens: independent sequences of equal length, in random order, or an iterable of batches
            of them (kept in memory as integers).
        vocab_size: tokens lie in [0, vocab_size); None for the largest token + 1.
        mask: False at padding, which is left out of every pair; shaped like `tokens`.
        correction: None takes the jackknife, or the shuffle null where a group has fewer than
            `MIN_PER_CELL` observed pairs of positions for each pair of symbols.
        folds: parts of the jackknife, which also gives the standard errors.
        groups: a group number for each sequence: information is computed within each group and
            averaged. Use it where sequences of a group share a distribution that others do not.
        by: "position" for a matrix over positions; "lag" pools all positions, as for text.
        max_lag: largest lag; None for pos - 1.
        max_vocab: most symbols told apart; rarer tokens share one bucket.
        generator: of the shuffles, on the CPU; None for a new one with seed 0.

    Returns:
        Estimates in float64, on the device of the tokens.

    Raises:
        ValueError: fewer than two sequences (or in a group), sequences of one token, tokens outside
            the vocabulary, shapes that differ, or an argument out of range.

    Source:
        Miller 1955 and Quenouille 1956 for the corrections; Nichani, Damian and Lee 2024 for
        χ²-information as the quantity that the attention gradient follows.

    >>> tokens = torch.randint(2, (256, 3), generator=torch.Generator().manual_seed(0))
    >>> tokens[:, 2] = tokens[:, 0]
    >>> information = pairwise_information(tokens)
    >>> information
    PairwiseInformation(by position, 3×3, 256 sequences, 2 symbols, jackknife)
    >>> information.chi2.round(decimals=1)[2].abs().tolist()  # the last token copies the first
    [1.0, 0.0, nan]
    """
    _check(correction, folds, by, max_lag, max_vocab)
    tokens = _joined(tokens)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else _joined(mask).bool()
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)} and type {tokens.dtype}; expected integers "
            "[sequence, pos] with at least two positions"
        )
    if real.shape != tokens.shape:
        raise ValueError(f"mask has shape {tuple(real.shape)}, tokens {tuple(tokens.shape)}")
    vocabulary = Vocabulary.of(tokens, real, vocab_size, max_vocab)
    n_symbols = vocabulary.n_symbols
    members = Groups.of(groups, len(tokens), tokens.device)
    if correction is None:
        n_pairs = len(tokens) * (tokens.shape[1] // 2 if by == "lag" else 1)
        enough = n_pairs >= MIN_PER_CELL * n_symbols**2 * members.number
        correction = "jackknife" if enough else "shuffle"
    source = torch.Generator().manual_seed(0) if generator is None else generator
    if members.number > 1 and correction != "jackknife":
        folds = 1  # the groups give the standard errors
    counter = Counter(vocabulary.symbols(tokens, real), n_symbols, members, folds)
    n_shuffles = -(-_N_SHUFFLES // members.number) if correction == "shuffle" else 0
    shuffles = [members.shuffle(source) for _ in range(n_shuffles)]
    pairs = _pairs(tokens.shape[1], by, max_lag)
    n_rows = counter.rows_at_once()
    parts = [
        _estimate(counter, pairs[start : start + n_rows], correction, shuffles)
        for start in range(0, len(pairs), n_rows)
    ]
    estimates = torch.cat(parts, -1)
    if by == "position":
        estimates = _matrices(estimates, pairs, tokens.shape[1])
    shannon, chi2, shannon_error, chi2_error, shannon_bias, chi2_bias = estimates
    return PairwiseInformation(
        shannon=shannon,
        chi2=chi2,
        shannon_stderr=shannon_error,
        chi2_stderr=chi2_error,
        shannon_bias=shannon_bias,
        chi2_bias=chi2_bias,
        n_sequences=len(tokens),
        by=by,
        correction=correction,
        n_symbols=n_symbols,
        bucket_share=vocabulary.bucket_share,
    )


def _check(
    correction: str | None, folds: int, by: str, max_lag: int | None, max_vocab: int
) -> None:
    if by not in get_args(By):
        raise ValueError(f'by is {by!r}; allowed: "position", "lag"')
    if correction is not None and correction not in get_args(Correction):
        allowed = ", ".join(f'"{name}"' for name in get_args(Correction))
        raise ValueError(f"correction is {correction!r}; allowed: {allowed}, None")
    for name, value, least in (("folds", folds, 2), ("max_vocab", max_vocab, 2)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if max_lag is not None and (by != "lag" or max_lag < 1):
        raise ValueError(f'max_lag is {max_lag}; it must be at least 1, and needs by="lag"')


def _joined(values: Tensor | Iterable[Tensor]) -> Tensor:
    if isinstance(values, Tensor):
        return values
    batches = list(values)
    if not batches:
        raise ValueError("no batches were given")
    if len({batch.shape[1:] for batch in batches}) > 1:
        shapes = sorted({tuple(batch.shape) for batch in batches})
        raise ValueError(f"batches differ in the length of their sequences: shapes {shapes}")
    return torch.cat(batches)


def _pairs(n_positions: int, by: By, max_lag: int | None) -> list[Int[Tensor, "_ 2"]]:
    """For each estimate, the pairs (query, key) of positions that it pools."""
    if by == "position":
        query, key = torch.tril_indices(n_positions, n_positions, offset=-1)
        return list(torch.stack([query, key], -1).unsqueeze(1))
    last = min(max_lag or n_positions, n_positions - 1)
    positions = torch.arange(n_positions)
    return [torch.stack([positions[lag:], positions[:-lag]], -1) for lag in range(1, last + 1)]


def _estimate(
    counter: Counter,
    rows: list[Tensor],
    correction: Correction,
    shuffles: list[Tensor],
) -> Float[Tensor, "6 row"]:
    """Shannon and χ² information, their standard errors, and the biases that were subtracted."""
    counts = counter.counts(rows)
    total = counts.sum(1)
    plug_in = _information(total)
    n_groups, n_folds = counts.shape[:2]
    bias, error = torch.zeros_like(plug_in), None
    if n_groups == 1 or correction == "jackknife":
        without_fold = _information(total.unsqueeze(1) - counts)
        mean = without_fold.mean(2)
        spread = (without_fold - mean.unsqueeze(2)).square().sum(2)
        error = (spread * (n_folds - 1) / n_folds).sqrt()
    if correction == "jackknife":
        bias = (n_folds - 1) * (mean - plug_in)
    elif correction == "shuffle":
        null = [_information(counter.counts(rows, partner).sum(1)) for partner in shuffles]
        bias = torch.stack(null).mean(0)
    elif correction == "miller_madow":
        bias = _miller_madow(total)
    if n_groups == 1:
        assert error is not None
        return torch.cat([(plug_in - bias)[:, 0], error[:, 0], bias[:, 0]])
    weight = counter.groups.sizes.double().unsqueeze(1)
    value, error = _weighted_mean(plug_in - bias, weight)
    return torch.cat([value, error, _weighted_mean(bias, weight)[0]])


def _information(counts: Float[Tensor, "*rows key query"]) -> Float[Tensor, "2 *rows"]:
    """Plug-in Shannon and χ² information of tables of counts; NaN for an empty table."""
    number = counts.sum((-1, -2))
    by_key, by_query = counts.sum(-1, keepdim=True), counts.sum(-2, keepdim=True)
    entropies = [torch.xlogy(x, x).sum((-1, -2)) for x in (counts, by_key, by_query)]
    shannon = (entropies[0] - entropies[1] - entropies[2]) / number + number.log()
    chi2 = (counts.square() / (by_key * by_query)).nan_to_num(0.0).sum((-1, -2)) - 1
    return torch.stack([shannon, torch.where(number > 0, chi2, torch.nan)])


def _miller_madow(counts: Float[Tensor, "*rows key query"]) -> Float[Tensor, "2 *rows"]:
    number = counts.sum((-1, -2))
    cells = (counts > 0).sum((-1, -2))
    keys, queries = (counts.sum(-1) > 0).sum(-1), (counts.sum(-2) > 0).sum(-1)
    shannon = (cells - keys - queries + 1) / (2 * number)
    return torch.stack([shannon, (keys - 1) * (queries - 1) / number])


def _weighted_mean(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over groups, leaving out those without a value, and its standard error."""
    weight = torch.where(values.isfinite(), weight, 0.0)
    weight = weight / weight.sum(1, keepdim=True)
    values = torch.where(weight > 0, values, 0.0)
    mean = (weight * values).sum(1)
    n = (weight > 0).sum(1)
    squares = (weight * (values - mean.unsqueeze(1))).square().sum(1)
    return torch.where(n > 0, mean, torch.nan), (squares * n / (n - 1)).sqrt()


def _matrices(
    estimates: Float[Tensor, "6 row"], pairs: list[Tensor], n_positions: int
) -> Float[Tensor, "6 pos pos"]:
    query, key = torch.cat(pairs).to(estimates.device).unbind(-1)
    matrices = estimates.new_full((len(estimates), n_positions, n_positions), torch.nan)
    matrices[:, query, key] = estimates
    matrices[:, key, query] = estimates
    return matrices
