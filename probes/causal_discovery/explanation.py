"""Find a small set of tokens whose replacement changes a model's prediction.

The method appends the prediction to the sequence, discovers a causal graph over the tokens from the
deepest layer's attention, and tries sets of tokens, nearest to the prediction's node first. The
controls spend the same budget of model runs without the graph.

Source: Rohekar, Gurwicz, Nisimov, NeurIPS 2023 (arXiv 2310.20307; CLEANN).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, Unpack, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.causal_discovery import explanation_search as search_orders
from probes.causal_discovery.counterfactuals import (
    Counterfactuals,
    Logits,
    Outcome,
    Replace,
    replace_by,
)
from probes.causal_discovery.discovery import discover_attention
from probes.causal_discovery.independence import largest_given
from probes.causal_discovery.options import SearchKeywords
from probes.causal_discovery.pag import PAG
from probes.reading.activation import AttentionPattern
from probes.reading.attach import attach
from probes.reading.errors import ProbeError
from probes.reading.hook_names import layers_with
from probes.reading.passes import checked_tokens, run, undisturbed

Method: TypeAlias = Literal["causal", "attention", "occlusion", "random", "exhaustive"]
METHODS: tuple[Method, ...] = get_args(Method)
SMALLEST_BUDGET = 3
"""One run for the prediction, one to read the attention, and one for a set."""

ReadAttention: TypeAlias = Callable[[Int[Tensor, "1 pos"]], Float[Tensor, "head query key"]]


@dataclass(frozen=True)
class Explanation:
    """A set of tokens whose replacement changes the prediction, or the failure to find one.

    Attributes:
        method: the search method.
        prediction: the class predicted from the original sequence.
        positions: positions of the set, ascending; empty if the search found none.
        tokens: the original tokens at these positions.
        new_prediction: the class predicted with the set replaced; None if the search found none.
        calls: number of sequences the model ran on; never above the budget.
        graphs: the discovered graph of every head; empty for methods that use none.
    """

    method: Method
    prediction: int
    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    new_prediction: int | None
    calls: int
    graphs: tuple[PAG, ...] = ()

    @property
    def found(self) -> bool:
        """Whether the search found a set."""
        return self.new_prediction is not None

    @property
    def size(self) -> int:
        """Number of tokens in the set; 0 if the search found none."""
        return len(self.positions)


def explain(
    model: nn.Module,
    tokens: Int[Tensor, "pos"],
    *,
    replacement: int | Replace,
    method: Method = "causal",
    node: int | None = None,
    fill: bool = False,
    candidates: Sequence[int] | None = None,
    logits: Logits | None = None,
    attention: ReadAttention | None = None,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    budget: int = 300,
    max_size: int | None = None,
    batch_size: int = 8,
    generator: torch.Generator | None = None,
    **options: Unpack[SearchKeywords],
) -> Explanation:
    """Look for a small set of tokens whose replacement changes the model's prediction.

    A model run confirms that the returned set changes the prediction. No input runs twice, and the
    number of runs never exceeds the budget.

    Methods:
        "causal": try sets in the order of size + distance from the prediction's node in the
            discovered graphs (minimum over heads); if the budget runs low, grow one set in order of
            distance, then shrink it.
        "attention" (control): replace the token that the node attends to most, then the two most
            attended, and so on.
        "occlusion" (control): replace each token alone, then the tokens with the largest effects
            together, one more at a time.
        "random" (control): the causal search with shuffled candidates.
        "exhaustive" (control): all sets, smaller first, so that the result is a smallest set.

    Args:
        model: a HookedTransformer or TransformerBridge, unchanged; any module if both `logits` and
            `attention` are given.
        tokens: one sequence.
        replacement: the replacement token (PAD, MASK), or a function of the tokens and the marked
            positions, both `[batch pos]`. A token that the model never met in training may change
            predictions for that reason alone.
        method: one of `METHODS`.
        node: the position that makes the prediction (a MASK, a CLS); it is never replaced.
            Default: the last position predicts the next token, which is appended to the sequence
            before the attention is read.
        fill: put the predicted token at `node` before the attention is read.
        candidates: positions that may be replaced; default: all but the node. The graphs have these
            and the node as nodes. Positions whose token the replacement does not change are left
            out.
        logits: a function from tokens `[batch pos]` to the prediction's logits `[batch class]`;
            default: the model's logits at the node, or at the last position.
        attention: a function from tokens `[1 pos]` to the pattern `[head query key]`; default: read
            from the model's hooks.
        layer: layer whose attention is read; default: the deepest.
        heads: heads of that layer; default: all.
        budget: largest number of sequences to run, at least 3.
        max_size: largest set to try; default: no limit.
        batch_size: sequences per run; a batch counts in full, even after the returned set.
        generator: generator of "random"; default: a new one with seed 0.
        **options: the fields of `SearchOptions` but `positions`, for the graph of each head.
            `max_cond` is 2 by default, since larger sets take longer and hardly change the
            distances; None: as large as `n_eff` allows.

    Raises:
        ValueError: an argument out of range.
        ProbeError: tokens, a layer or a head that the model does not have, or invalid logits.
    """
    _check(method, budget, max_size, batch_size, options)
    replace = _replacement(model, replacement)
    tokens = _checked_sequence(model, tokens, own_logits=logits is None)
    replaceable = _candidates(len(tokens), node, candidates)
    with undisturbed(model):
        runs = Counterfactuals(
            logits or _own_logits(model, node),
            tokens,
            replace,
            budget=budget,
            batch_size=batch_size,
        )
        replaceable = runs.effective(replaceable)
        n_candidates = len(replaceable)
        limit = n_candidates if max_size is None else min(max_size, n_candidates)
        graphs: tuple[PAG, ...] = ()
        outcome: Outcome | None
        if method == "exhaustive":
            outcome = runs.first_change(search_orders.by_size(replaceable, limit))
        elif method == "occlusion":
            outcome = search_orders.occlusion(runs, replaceable, limit)
        elif not replaceable:
            outcome = None
        else:
            sequence, node_position = _with_prediction(runs, node, fill)
            read = attention or _own_attention(model, layer)
            pattern = _chosen_heads(read(sequence.unsqueeze(0)), heads, len(sequence))
            runs.spend()
            row = pattern[:, node_position].mean(0)  # the node's attention, averaged over heads
            weights = {c: float(row[c]) for c in replaceable}
            if method == "attention":
                order = sorted(replaceable, key=lambda c: (-weights[c], c))
                outcome = runs.first_change(search_orders.prefixes(order, limit))
            else:
                graphs = _graphs(model, pattern, (*replaceable, node_position), options)
                rings = search_orders.shells(graphs, node_position, weights)
                if method == "random":
                    generator = generator or torch.Generator().manual_seed(0)
                    rings, graphs = search_orders.shuffled(rings, generator), ()
                outcome = search_orders.search(runs, rings, limit)
    positions = () if outcome is None else outcome.positions
    return Explanation(
        method=method,
        prediction=runs.prediction,
        positions=positions,
        tokens=tuple(tokens[list(positions)].tolist()),
        new_prediction=None if outcome is None else outcome.prediction,
        calls=runs.calls,
        graphs=graphs,
    )


def _graphs(
    model: nn.Module,
    pattern: Float[Tensor, "head query key"],
    nodes: Sequence[int],
    options: SearchKeywords,
) -> tuple[PAG, ...]:
    """The graph over some positions, one per head; other positions are hidden variables."""
    n_eff = options.get("n_eff")
    if n_eff is None:
        n_eff = _d_head(model)
    if not math.isfinite(n_eff):
        raise ValueError(f"n_eff is {n_eff:g}; it must be finite")
    allowed = max(0, largest_given(n_eff))
    max_cond = options.get("max_cond", 2)
    chosen: SearchKeywords = {
        **options,
        "n_eff": n_eff,
        "max_cond": allowed if max_cond is None else min(max_cond, allowed),
        "positions": nodes,
    }
    return tuple(discover_attention(head, **chosen).pag for head in pattern)


def _with_prediction(
    runs: Counterfactuals, node: int | None, fill: bool
) -> tuple[Int[Tensor, "length"], int]:
    """The sequence whose attention is read, and the position of the prediction's node in it."""
    tokens = runs.tokens
    if node is None:
        return torch.cat([tokens, tokens.new_tensor([runs.prediction])]), len(tokens)
    position = node % len(tokens)
    if fill:
        tokens = tokens.clone()
        tokens[position] = runs.prediction
    return tokens, position


def _own_logits(model: nn.Module, node: int | None) -> Logits:
    position = -1 if node is None else node

    def logits(tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch cls"]:
        output = model(tokens)
        if not isinstance(output, Tensor) or output.ndim != 3:
            raise ProbeError(
                f"{type(model).__name__} gives no logits [batch, pos, vocab]: pass logits="
            )
        return output[:, position]

    return logits


def _own_attention(model: nn.Module, layer: int | None) -> ReadAttention:
    layer = layers_with(model, "pattern", layer)[-1]

    def read(tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "head query key"]:
        with attach(model, AttentionPattern(layer)) as (pattern,):
            run(model, checked_tokens(model, tokens))
        return pattern.reading().values[0, 0]

    return read


def _chosen_heads(
    pattern: Float[Tensor, "head query key"], heads: Sequence[int] | None, length: int
) -> Float[Tensor, "head query key"]:
    if pattern.shape[1:] != (length, length) or not len(pattern):
        raise ProbeError(
            f"attention has shape {tuple(pattern.shape)}; expected [head, {length}, {length}]"
        )
    if heads is None:
        return pattern
    wrong = [head for head in heads if not 0 <= head < len(pattern)]
    if wrong or not heads:
        raise ProbeError(f"heads are {tuple(heads)}: the layer has heads 0 to {len(pattern) - 1}")
    return pattern[list(heads)]


def _d_head(model: nn.Module) -> int:
    d_head: Any = getattr(getattr(model, "cfg", None), "d_head", None)
    if not isinstance(d_head, int):
        raise ValueError(f"n_eff is None, and {type(model).__name__} has no d_head: pass n_eff=")
    return d_head


def _checked_sequence(
    model: nn.Module, tokens: Int[Tensor, "pos"], *, own_logits: bool
) -> Int[Tensor, "pos"]:
    if tokens.ndim != 1 or not tokens.numel():
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected [pos], at least one")
    return checked_tokens(model, tokens.unsqueeze(0))[0] if own_logits else tokens.long()


def _replacement(model: nn.Module, replacement: int | Replace) -> Replace:
    if not isinstance(replacement, int):
        return replacement
    size: Any = getattr(getattr(model, "cfg", None), "d_vocab", None)
    if replacement < 0 or (isinstance(size, int) and replacement >= size):
        raise ValueError(
            f"replacement is {replacement}; "
            + (f"tokens run from 0 to {size - 1}" if isinstance(size, int) else "at least 0")
        )
    return replace_by(replacement)


def _candidates(length: int, node: int | None, candidates: Sequence[int] | None) -> tuple[int, ...]:
    if node is not None and not -length <= node < length:
        raise ValueError(f"node is {node}; the sequence has positions 0 to {length - 1}")
    node_position = None if node is None else node % length
    if candidates is None:
        return tuple(position for position in range(length) if position != node_position)
    for position in candidates:
        if not 0 <= position < length or position == node_position:
            raise ValueError(
                f"candidate {position} cannot be replaced; allowed: 0 to {length - 1}"
                + ("" if node_position is None else f", without the node {node_position}")
            )
    return tuple(dict.fromkeys(sorted(candidates)))


def _check(
    method: str, budget: int, max_size: int | None, batch_size: int, options: SearchKeywords
) -> None:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    if budget < SMALLEST_BUDGET:
        raise ValueError(
            f"budget is {budget}; at least {SMALLEST_BUDGET}: the prediction, its attention, a set"
        )
    for name, value in (("max_size", max_size), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; at least 1")
    if "positions" in options:
        raise ValueError("the graphs have the candidates and the node as nodes: pass candidates=")
