"""The smallest set of tokens whose replacement changes what a model predicts.

The prediction is put in its place in the sequence, a causal graph over the tokens is discovered
from the deepest layer's attention, and sets are tried from the prediction's node outwards. Source:
Rohekar, Gurwicz, Nisimov, NeurIPS 2023 (arXiv 2310.20307; CLEANN). The controls say what the graph
is worth: they spend the same budget of model runs without it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.causal_discovery import explanation_search as ways
from probes.causal_discovery.counterfactuals import (
    Counterfactuals,
    Logits,
    Outcome,
    Replace,
    replace_by,
)
from probes.causal_discovery.discovery import discover_attention
from probes.causal_discovery.independence import largest_given
from probes.causal_discovery.pag import PAG
from probes.reading import hook_names
from probes.reading.attach import attach
from probes.reading.attention import AttentionPattern
from probes.reading.errors import ProbeError
from probes.reading.passes import checked_tokens, run, undisturbed

Method: TypeAlias = Literal["causal", "attention", "occlusion", "random", "exhaustive"]
METHODS: tuple[Method, ...] = get_args(Method)
SMALLEST_BUDGET = 3
"""The whole sequence, the one whose attention is read, and one set."""

ReadAttention: TypeAlias = Callable[[Int[Tensor, "1 pos"]], Float[Tensor, "head query key"]]


@dataclass(frozen=True)
class Explanation:
    """A set of tokens without which the model predicts something else, or that none was found.

    Attributes:
        method: how it was looked for.
        prediction: the class predicted from the whole sequence.
        positions: the set, ascending; empty if none was found.
        tokens: what stands there.
        new_prediction: what the model predicts with the set replaced, by its own run; None without.
        calls: sequences that the model was run on; never above the budget.
        graphs: the discovered graph of every head read; empty for methods that use none.
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
        """Whether there is a set."""
        return self.new_prediction is not None

    @property
    def size(self) -> int:
        """Tokens in the set; 0 if none was found."""
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
    n_eff: float | int | None = None,
    alpha: float = 0.01,
    ordered: bool | None = None,
    max_cond: int | None = 2,
    time_budget: float | None = None,
    budget: int = 300,
    max_size: int | None = None,
    batch_size: int = 8,
    generator: torch.Generator | None = None,
) -> Explanation:
    """Look for a small set of tokens whose replacement changes the model's prediction.

    The set that is returned changed the prediction in a run of its own among the calls. No input
    is run twice, and there are never more runs than the budget.

    Methods: "causal" goes outwards from the prediction's node in the discovered graphs, a token's
    distance being the least over heads, sets in the order of size + distance; if the budget runs
    low it grows one set in that order and shrinks it again. The controls:
    "attention" takes the tokens with the most attention of the node, one more at a time;
    "occlusion" runs every token alone, then takes those with the largest effect, one more at a
    time; "random" is the causal search with the candidates shuffled; "exhaustive" tries all sets,
    the smaller first, so that what it finds is a smallest one.

    Args:
        model: a HookedTransformer or TransformerBridge, left as it was; any module where `logits`
            and `attention` are given.
        tokens: one sequence.
        replacement: the token to put in place (PAD, MASK), or a function of tokens and the marked
            positions, both `[batch pos]`. A replacement that the model never met in training
            changes predictions for that alone.
        method: one of `METHODS`.
        node: the position that makes the prediction (a MASK, a CLS), which is read there and never
            replaced. None: the last position predicts the next token, and what it predicts is
            appended to the sequence for its attention to be read.
        fill: put the predicted token at `node` before the attention is read.
        candidates: positions that may be replaced; all but the node if None. The graphs are over
            these and the node. Those that the replacement leaves as they are drop out.
        logits: of the prediction, `[batch class]` for tokens `[batch pos]`; the model's own at the
            node, or at the last position, if None.
        attention: the pattern `[head query key]` for tokens `[1 pos]`; read from the model's
            hooks if None.
        layer: whose attention to read; the deepest if None.
        heads: which heads of it; all if None.
        n_eff: the knob of sparsity of the tests, see `probes.discover`; d_head if None.
        alpha: level of the tests.
        ordered: the tokens are in causal order; whether no head looks ahead if None.
        max_cond: largest conditioning set, at most what `n_eff` allows, which it is if None.
            Small by default: larger ones cost more time than nearness needs.
        time_budget: seconds for the graph of a head, None for no limit.
        budget: the most sequences to run, at least 3.
        max_size: the largest set to try; no limit if None.
        batch_size: sequences of one run; those after the one that is returned count as calls.
        generator: for "random"; a new one with seed 0 if None.

    Raises:
        ValueError: an argument out of range.
        ProbeError: tokens, layer or head that the model has not, or logits that are none.
    """
    _check(method, budget, max_size, batch_size)
    replace = _replacement(model, replacement)
    tokens = _checked_sequence(model, tokens, own_logits=logits is None)
    chosen = _candidates(len(tokens), node, candidates)
    with undisturbed(model):
        runs = Counterfactuals(
            logits or _own_logits(model, node),
            tokens,
            replace,
            budget=budget,
            batch_size=batch_size,
        )
        chosen = runs.effective(chosen)
        limit = len(chosen) if max_size is None else min(max_size, len(chosen))
        graphs: tuple[PAG, ...] = ()
        outcome: Outcome | None
        if method == "exhaustive":
            outcome = runs.first_change(ways.by_size(chosen, limit))
        elif method == "occlusion":
            outcome = ways.occlusion(runs, chosen, limit)
        elif not chosen:
            outcome = None
        else:
            sequence, place = _with_prediction(runs, node, fill)
            read = attention or _own_attention(model, layer)
            pattern = _chosen_heads(read(sequence.unsqueeze(0)), heads, len(sequence))
            runs.spend()
            weight = ways.attention_by_position(pattern, place)
            weights = {c: float(weight[c]) for c in chosen}
            if method == "attention":
                order = sorted(chosen, key=lambda c: (-weights[c], c))
                outcome = runs.first_change(ways.prefixes(order, limit))
            else:
                graphs = _graphs(
                    pattern,
                    (*chosen, place),
                    n_eff=_default_n_eff(model) if n_eff is None else n_eff,
                    alpha=alpha,
                    ordered=ordered,
                    max_cond=max_cond,
                    time_budget=time_budget,
                )
                rings = ways.shells(graphs, place, weights)
                if method == "random":
                    generator = generator or torch.Generator().manual_seed(0)
                    rings, graphs = ways.shuffled(rings, generator), ()
                outcome = ways.search(runs, rings, limit)
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
    pattern: Float[Tensor, "head query key"],
    nodes: Sequence[int],
    *,
    n_eff: float | int,
    alpha: float,
    ordered: bool | None,
    max_cond: int | None,
    time_budget: float | None,
) -> tuple[PAG, ...]:
    """The graph over some positions, by head; the others are left out of the correlations."""
    if not math.isfinite(n_eff):
        raise ValueError(f"n_eff is {n_eff:g}; it must be finite")
    allowed = max(0, largest_given(n_eff))
    max_cond = allowed if max_cond is None else min(max_cond, allowed)
    return tuple(
        discover_attention(
            head,
            n_eff=n_eff,
            alpha=alpha,
            ordered=ordered,
            positions=nodes,
            max_cond=max_cond,
            time_budget=time_budget,
        ).pag
        for head in pattern
    )


def _with_prediction(
    runs: Counterfactuals, node: int | None, fill: bool
) -> tuple[Int[Tensor, "length"], int]:
    """The sequence whose attention is read, and where the prediction's node is in it."""
    tokens = runs.tokens
    if node is None:
        return torch.cat([tokens, tokens.new_tensor([runs.prediction])]), len(tokens)
    place = node % len(tokens)
    if fill:
        tokens = tokens.clone()
        tokens[place] = runs.prediction
    return tokens, place


def _own_logits(model: nn.Module, node: int | None) -> Logits:
    place = -1 if node is None else node

    def logits(tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch cls"]:
        output = model(tokens)
        if not isinstance(output, Tensor) or output.ndim != 3:
            raise ProbeError(
                f"{type(model).__name__} gives no logits [batch, pos, vocab]: pass logits="
            )
        return output[:, place]

    return logits


def _own_attention(model: nn.Module, layer: int | None) -> ReadAttention:
    layer = hook_names.attention_layers(model, layer)[-1]

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


def _default_n_eff(model: nn.Module) -> float | int:
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
    place = None if node is None else node % length
    if candidates is None:
        return tuple(position for position in range(length) if position != place)
    for position in candidates:
        if not 0 <= position < length or position == place:
            raise ValueError(
                f"candidate {position} is no position that may be replaced: "
                f"0 to {length - 1}" + ("" if place is None else f", without the node {place}")
            )
    return tuple(dict.fromkeys(sorted(candidates)))


def _check(method: str, budget: int, max_size: int | None, batch_size: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    if budget < SMALLEST_BUDGET:
        raise ValueError(
            f"budget is {budget}; at least {SMALLEST_BUDGET}: the prediction, its attention, a set"
        )
    for name, value in (("max_size", max_size), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; at least 1")
