"""The information that a model has not used yet, at any step of training.

Position i predicts `y = x[i+1]` with probabilities p. The key at lag l is `x[i+1-l]`, so that lag 1
is the query's own token. Over N queries that have the lag, the residual joint is

    R_l[a,b] = mean of 1{key = a} (1{y = b} - p(b))

and the residual χ² removes what sampling alone would give, each query's product with itself:

    ρ_l = Σ_ab (R_l[a,b]² - N_l[a,b]) / (P_l(a) P_l(b))
    N_l[a,b] = N⁻² Σ 1{key = a} (1{y = b} - p(b))²

The squares are observed ones: p(b)(1 - p(b)) is their mean only once the model is calibrated, and
takes off too much before. ρ equals χ²-information at lag l while p is the distribution of single
tokens, and is 0 once the model has used everything that pairs at that lag say about the next token.

A model whose mean prediction is not yet the distribution of single tokens has a residual
`r_l(b) = Σ_a R_l[a,b]` whatever the key is, which shows at every lag, even where the key says
nothing. The centred residual leaves it out:

    R_l[a,b] - P_l(a) r_l(b) = covariance of 1{key = a} and 1{y = b} - p(b)

Its χ² and that of the misfit, `Σ_b r_l(b)² / P_l(b)`, add up to that of R_l. The misfit is almost
the same at every lag, so the softmax passes on none of its gradient.

If a model has one layer, no MLP, no normalisation, and keeps positions out of its values, the same
tables give its gradient exactly. With `OV_h[a] = (W_E[a] W_V + b_V) W_O W_U`, the mean over queries
of `-∂L/∂pattern_h` at lag l is `<OV_h, R_l> = Σ_ab OV_h[a,b] R_l[a,b]`. `direct_path` computes it,
with the Cauchy-Schwarz bound
`|<OV_h, R_l>| <= sqrt(Σ OV_h² P_l(a) P_l(b)) sqrt(Σ R_l² / (P_l(a) P_l(b)))`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from probes.reading.errors import ProbeError
from probes.reading.hook_names import config_of, layers_with
from probes.reading.padding import real_positions
from probes.reading.passes import (
    MAX_BATCH_BYTES,
    batch_rows,
    checked_logits,
    checked_tokens,
    split,
    undisturbed,
)
from probes.watching.agreement import lag_diagonal
from probes.watching.counting import Vocabulary
from probes.watching.gradient import MIN_BLOCKS, LossGradient


@dataclass(frozen=True, eq=False)
class ResidualInformation:
    """Residual information by lag; index 0 is lag 1.

    Attributes:
        chi2: ρ of every lag.
        chi2_stderr: its standard error, a jackknife over blocks of sequences.
        centred_chi2: ρ of the centred residual, without the misfit of single tokens.
        centred_chi2_stderr: its standard error.
        joint: R of every lag.
        key_share: P(a) of every lag, over the queries that have it.
        target_share: P(b) of every lag, over the same queries.
        n_queries: N of every lag.
        n_sequences: sequences read.
        bucket_share: share of tokens in the bucket of rare tokens; above 0, ρ is a lower bound.
    """

    chi2: Float[Tensor, "lag"]
    chi2_stderr: Float[Tensor, "lag"]
    centred_chi2: Float[Tensor, "lag"]
    centred_chi2_stderr: Float[Tensor, "lag"]
    joint: Float[Tensor, "lag key_token target_token"]
    key_share: Float[Tensor, "lag key_token"]
    target_share: Float[Tensor, "lag target_token"]
    n_queries: Int[Tensor, "lag"]
    n_sequences: int
    bucket_share: float

    @property
    def misfit(self) -> Float[Tensor, "lag"]:
        """`chi2 - centred_chi2`: the χ² of the mean prediction against the share of each target."""
        return self.chi2 - self.centred_chi2


def residual_information(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    *,
    max_lag: int = 16,
    max_vocab: int = 128,
    attention_mask: Shaped[Tensor, "sequence pos"] | None = None,
    max_batch_bytes: int = MAX_BATCH_BYTES,
) -> ResidualInformation:
    """Estimate ρ at every lag; see the module's docstring.

    Args:
        model: a HookedTransformer or TransformerBridge that predicts the next token; left as it
            was.
        tokens: independent sequences, at least two.
        max_lag: largest lag; at most pos - 1 are read.
        max_vocab: most symbols told apart; rarer tokens share one bucket, as in
            `pairwise_information`.
        attention_mask: 0 at padding; None to find padding by the tokenizer's PAD token.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.

    Raises:
        ValueError: one sequence, one position, or an argument out of range.
        ProbeError: tokens that the model cannot read, or a model without next-token logits.

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 6, "d_vocab": 5}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu", "seed": 0})
    >>> residual_information(model, torch.randint(5, (64, 6))).joint.shape
    torch.Size([5, 5, 5])
    """
    tokens = checked_tokens(model, tokens)
    n_sequences, pos = tokens.shape
    if n_sequences < 2 or pos < 2:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; residual information needs at least two "
            "sequences of at least two tokens"
        )
    if max_lag < 1:
        raise ValueError(f"max_lag is {max_lag}; it must be at least 1")
    real = real_positions(model, tokens, attention_mask)
    counted = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
    vocabulary = Vocabulary.of(tokens, counted, config_of(model).d_vocab, max_vocab)
    rows = batch_rows(model, pos, max_batch_bytes, logits=True)
    rows = min(rows, max(1, n_sequences // MIN_BLOCKS))
    n_blocks = min(MIN_BLOCKS, -(-n_sequences // rows))
    tables = _Tables(n_blocks, min(max_lag, pos - 1), vocabulary.n_symbols, tokens.device)
    with undisturbed(model):
        for number, (batch, batch_real) in enumerate(split(rows, tokens, real)):
            logits = checked_logits(model, batch, batch_real, "residual information")
            probabilities = vocabulary.merged(logits[:, :-1].double().softmax(-1))
            tables.add(number % n_blocks, vocabulary.symbols(batch, batch_real), probabilities)
    return tables.result(n_sequences, vocabulary.bucket_share)


class _Tables:
    """Sums over queries by block, lag and symbols; the query at index i of a batch is x[i]."""

    def __init__(self, n_blocks: int, n_lags: int, n_symbols: int, device: torch.device) -> None:
        shape = (n_blocks, n_lags, n_symbols, n_symbols)
        self._joint = torch.zeros(shape, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._joint)
        self._keys = torch.zeros(shape[:3], dtype=torch.float64, device=device)
        self._targets = torch.zeros_like(self._keys)

    def add(
        self,
        block: int,
        symbols: Int[Tensor, "batch pos"],
        probabilities: Float[Tensor, "batch pos-1 symbol"],
    ) -> None:
        n_symbols = probabilities.shape[-1]
        target = symbols[:, 1:]
        one_hot = nn.functional.one_hot(target.clamp(min=0), n_symbols).double()
        residual = one_hot - probabilities
        squares = residual.square()
        # The query's own padding makes its prediction meaningless.
        predicted = (target >= 0) & (symbols[:, :-1] >= 0)
        for index in range(self._joint.shape[1]):
            key = symbols[:, : symbols.shape[1] - 1 - index]
            real = predicted[:, index:] & (key >= 0)
            keys = key[real]
            self._joint[block, index].index_add_(0, keys, residual[:, index:][real])
            self._squares[block, index].index_add_(0, keys, squares[:, index:][real])
            self._keys[block, index] += keys.bincount(minlength=n_symbols)
            self._targets[block, index] += target[:, index:][real].bincount(minlength=n_symbols)

    def result(self, n_sequences: int, bucket_share: float) -> ResidualInformation:
        blocks = (self._joint, self._squares, self._keys, self._targets)
        totals = [block.sum(0) for block in blocks]
        chi2 = _residual_chi2(*totals)
        n = len(self._joint)
        without = torch.stack(
            [
                _residual_chi2(
                    *(total - block[i] for total, block in zip(totals, blocks, strict=True))
                )
                for i in range(n)
            ]
        )
        spread = (without - without.mean(0)).square().sum(0)
        stderr = (spread * (n - 1) / n).sqrt()
        number = totals[2].sum(-1)
        return ResidualInformation(
            chi2=chi2[0],
            chi2_stderr=stderr[0],
            centred_chi2=chi2[1],
            centred_chi2_stderr=stderr[1],
            joint=totals[0] / number[:, None, None],
            key_share=totals[2] / number.unsqueeze(1),
            target_share=totals[3] / number.unsqueeze(1),
            n_queries=number.long(),
            n_sequences=n_sequences,
            bucket_share=bucket_share,
        )


def _residual_chi2(
    joint: Float[Tensor, "lag key target"],
    squares: Float[Tensor, "lag key target"],
    keys: Float[Tensor, "lag key"],
    targets: Float[Tensor, "lag target"],
) -> Float[Tensor, "2 lag"]:
    """ρ of every lag from sums over queries, then ρ of the centred residual; NaN without queries.

    Centred indicators 1{key = a} - P(a) add up to 0, so that the centred sums do not change when
    the mean of 1{y = b} - p(b) is taken off it, and their squares are those of the difference.
    """
    number = keys.sum(-1)
    of_key = keys.unsqueeze(2)
    share = of_key / number.clamp(min=1)[:, None, None]
    of_target = joint.sum(1, keepdim=True)
    mean = of_target / number.clamp(min=1)[:, None, None]
    centred = joint - share * of_target
    centred_twice = squares - 2 * mean * joint + mean.square() * of_key
    centred_squares = centred_twice * (1 - 2 * share)
    centred_squares += share.square() * centred_twice.sum(1, keepdim=True)
    # N cancels: (joint/N)² / (keys/N · targets/N) = joint² / (keys · targets).
    expected = keys.unsqueeze(2) * targets.unsqueeze(1)
    terms = torch.stack([joint.square() - squares, centred.square() - centred_squares])
    chi2 = torch.where(expected > 0, terms / expected, 0.0).sum((2, 3))
    return torch.where(number > 0, chi2, torch.nan)


@dataclass(frozen=True, eq=False)
class DirectPath:
    """The gradient on attention that the direct path through one layer's values implies.

    Attributes:
        descent: `Σ_ab OV_h[a,b] R_l[a,b]`, which is `-∂L/∂pattern` at lag l, mean over queries.
        bound: the Cauchy-Schwarz bound on its absolute value.
        layer: the layer.
    """

    descent: Float[Tensor, "head lag"]
    bound: Float[Tensor, "head lag"]
    layer: int


def direct_path(model: nn.Module, residual: ResidualInformation, *, layer: int = 0) -> DirectPath:
    """Compute what residual information says about the gradient on a layer's patterns.

    Exact for one layer without MLP, normalisation and positions in the values; an approximation
    that gets worse as later layers learn to use this one.

    Raises:
        ProbeError: no such layer, weights of another kind, or residual information in which rare
            tokens share a bucket.

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 6, "d_vocab": 5}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu", "seed": 0})
    >>> path = direct_path(model, residual_information(model, torch.randint(5, (64, 6))))
    >>> bool((path.descent.abs() <= path.bound).all())
    True
    """
    layers_with(model, "pattern", layer)
    if residual.bucket_share > 0:
        raise ProbeError(
            "the direct path needs every token apart: raise max_vocab of residual_information"
        )
    names = ("W_E", "W_V", "b_V", "W_O", "W_U")
    try:
        weights: list[Any] = [getattr(model, name) for name in names]
    except AttributeError as error:
        raise ProbeError(f"{type(model).__name__} does not show its weights: {error}") from None
    embedding, values, bias, output, unembedding = (
        weight.detach().double().to(residual.joint.device) for weight in weights
    )
    written = embedding @ values[layer] + bias[layer].unsqueeze(1)
    circuit = written @ output[layer] @ unembedding
    if circuit.shape[1:] != residual.joint.shape[1:]:
        raise ProbeError(
            f"the circuit maps {circuit.shape[1]} tokens to {circuit.shape[2]}, the tables hold "
            f"{residual.joint.shape[1]}"
        )
    share = residual.key_share.unsqueeze(2) * residual.target_share.unsqueeze(1)
    reference = torch.where(share > 0, residual.joint.square() / share, 0.0).sum((1, 2))
    size = torch.einsum("hab,lab->hl", circuit.square(), share)
    return DirectPath(
        descent=torch.einsum("hab,lab->hl", circuit, residual.joint),
        bound=(size * reference).sqrt(),
        layer=layer,
    )


def descent_by_lag(gradient: LossGradient, *, layer: int = 0) -> Float[Tensor, "head lag"]:
    """`-∂L/∂attention` by lag, mean over the queries that have the lag; index 0 is lag 1.

    The loss must be the mean over the T - 1 predictions of a sequence, as `next_token_loss` is, and
    no sequence may hold padding.
    """
    matrix = -gradient.mean.sel(layer=layer).values
    n = matrix.shape[-1] - 1
    lags = [lag_diagonal(matrix, below, 1).mean(-1) * n for below in range(n)]
    return torch.stack(lags, -1)
