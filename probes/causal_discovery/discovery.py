"""Discover a causal graph over the tokens of one input from the attention of one head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from probes.causal_discovery.causal_learn import causal_learn
from probes.causal_discovery.correlation import LATER_TOLERANCE, checked_attention, without_sink
from probes.causal_discovery.independence import PartialCorrelationTest, largest_given
from probes.causal_discovery.pag import PAG
from probes.causal_discovery.reading import read_head
from probes.causal_discovery.search import Found, icd

Sink: TypeAlias = Literal["node", "conditioned"]
Engine: TypeAlias = Literal["icd", "fci", "pc"]


@dataclass(frozen=True)
class Discovery:
    """A causal graph over token positions, and the settings of the search.

    Attributes:
        pag: the graph; its nodes are token positions.
        separating_sets: for each pair of positions without an edge, earlier position first: the
            positions that separate it.
        tests: number of independence tests made.
        n_eff: effective number of samples (see `discover`).
        alpha: significance level of the tests.
        ordered: whether the search took token order as causal order.
        complete: whether the search finished; if not, the graph may have too many edges.
        reached: the largest size of conditioning sets fully tested; None if unknown.
        layer: the layer; None if the caller gave the attention pattern.
        head: the head; None if the caller gave the attention pattern.
        sink: "node", or "conditioned" if the tests condition on the attention sink.
        values: whether the covariances are those of attention-weighted values.
        engine: the search algorithm.
    """

    pag: PAG
    separating_sets: dict[tuple[int, int], tuple[int, ...]]
    tests: int
    n_eff: float | int
    alpha: float
    ordered: bool
    complete: bool
    reached: int | None
    layer: int | None = None
    head: int | None = None
    sink: Sink = "node"
    values: bool = False
    engine: Engine = "icd"

    def to_dict(self) -> dict[str, Any]:
        """The discovery as plain values for JSON.

        `{"nodes", "edges": [{"from", "to", "marks"}], "separating_sets": [{"pair", "given"}],
        "tests", "n_eff", "alpha", "ordered", "complete", "reached", "layer", "head", "sink",
        "values", "engine"}`.
        """
        sets = [
            {"pair": list(pair), "given": list(given)}
            for pair, given in sorted(self.separating_sets.items())
        ]
        names = ("tests", "n_eff", "alpha", "ordered", "complete", "reached", "layer", "head")
        settings = {name: getattr(self, name) for name in (*names, "sink", "values", "engine")}
        return {**self.pag.to_dict(), "separating_sets": sets, **settings}


def discover(
    model: nn.Module,
    tokens: Int[Tensor, "*batch pos"],
    *,
    layer: int | None = None,
    head: int = 0,
    n_eff: float | int | None = None,
    alpha: float = 0.01,
    ordered: bool | None = None,
    sink: Sink = "node",
    sink_position: int = 0,
    positions: Sequence[int] | None = None,
    values: bool = False,
    engine: Engine = "icd",
    stable: bool = False,
    max_cond: int | None = None,
    time_budget: float | None = None,
    selection_bias: bool = False,
) -> Discovery:
    """Discover the causal graph over one input's tokens from one head's attention A.

    The covariance of the tokens is A Aᵀ; two tokens keep their edge unless some set of other tokens
    makes their partial correlation insignificant.

    Args:
        model: a HookedTransformer, HookedEncoder or TransformerBridge; unchanged.
        tokens: one sequence, `[pos]` or `[1 pos]`.
        layer: layer of the head; default: the deepest.
        head: index of the head.
        n_eff: effective number of samples in the tests; default: `d_head`. One forward pass has no
            samples: n_eff only sets the sparsity, and a larger one keeps more edges. Compare
            several values.
        alpha: significance level of the tests; a smaller one keeps fewer edges.
        ordered: whether token order is causal order (OrdICD); default: True if no token attends to
            a later one and `selection_bias` is False.
        sink: "node" treats the attention sink as any token; "conditioned" conditions on it and
            removes it.
        sink_position: position of the sink; used with "conditioned".
        positions: the tokens that become nodes; default: all. The others are hidden variables.
        values: use the covariances of the attention-weighted values A V (`hook_z`) instead.
        engine: "icd", or causal-learn's "fci" or "pc" as a check; these ignore token order and
            accept none of `ordered`, `stable`, `selection_bias` and `time_budget`.
        stable: see `icd`.
        max_cond: largest conditioning set; must be below n_eff − 3.
        time_budget: seconds after which the search stops with a sound partial graph (icd only).
        selection_bias: see `icd`.

    Returns:
        The graph over token positions, with its separating sets.

    Raises:
        ValueError: an argument out of range, n_eff too small for a conditioning set, or attention
            that is not finite.
        ProbeError: an unknown layer or head, tokens outside the vocabulary or the context, or no
            attention to read.

    Source: Rohekar, Gurwicz and Nisimov 2023 (arXiv 2310.20307).
    """
    reading = read_head(model, tokens, layer=layer, head=head, values=values)
    config: Any = model.cfg
    return discover_attention(
        reading.attention,
        n_eff=int(config.d_head) if n_eff is None else n_eff,
        alpha=alpha,
        ordered=ordered,
        sink=sink,
        sink_position=sink_position,
        positions=positions,
        mixed_values=reading.mixed_values,
        engine=engine,
        stable=stable,
        max_cond=max_cond,
        time_budget=time_budget,
        selection_bias=selection_bias,
        layer=reading.layer,
        head=head,
    )


def discover_attention(
    attention: Shaped[np.ndarray, "..."] | Shaped[Tensor, "..."],
    *,
    n_eff: float | int,
    alpha: float = 0.01,
    ordered: bool | None = None,
    sink: Sink = "node",
    sink_position: int = 0,
    positions: Sequence[int] | None = None,
    mixed_values: Float[np.ndarray, "query d_head"] | None = None,
    engine: Engine = "icd",
    stable: bool = False,
    max_cond: int | None = None,
    time_budget: float | None = None,
    selection_bias: bool = False,
    layer: int | None = None,
    head: int | None = None,
) -> Discovery:
    """Discover the causal graph from a given attention pattern.

    Args:
        attention: `[query key]`, rows that sum to 1; `checked_attention` gives the tolerances.
        n_eff: see `discover`.
        alpha: see `discover`.
        ordered: see `discover`.
        sink: see `discover`.
        sink_position: see `discover`.
        positions: see `discover`.
        mixed_values: attention-weighted values A V whose covariances replace A Aᵀ.
        engine: see `discover`.
        stable: see `icd`.
        max_cond: see `discover`.
        time_budget: see `discover`.
        selection_bias: see `icd`.
        layer: layer of the pattern, stored in the result.
        head: head of the pattern, stored in the result.

    Raises:
        ValueError: an invalid attention pattern, or as `discover`.
        ProbeError: the engine needs causal-learn, which is not installed.

    >>> chain = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    >>> print(discover_attention(chain, n_eff=1000).pag)
    0 o-> 1
    1 --> 2
    """
    matrix = checked_attention(attention)
    rows = matrix if mixed_values is None else np.asarray(mixed_values, dtype=np.float64)
    if len(rows) != len(matrix) or not np.isfinite(rows).all():
        raise ValueError(f"mixed_values must be finite, one row for each of {len(matrix)} tokens")
    if engine != "icd":
        icd_options = {"ordered": ordered, "stable": stable, "selection_bias": selection_bias}
        for name, is_given in {**icd_options, "time_budget": time_budget is not None}.items():
            if is_given:
                raise ValueError(f"{name} goes with engine 'icd', not {engine!r}")
        ordered = False
    if ordered is None:
        ordered = not (selection_bias or np.triu(matrix, 1).max() > LATER_TOLERANCE)
    nodes = _nodes(len(matrix), positions)
    if sink == "conditioned":
        rows = np.insert(without_sink(rows, sink_position), sink_position, 0.0, axis=0)
        nodes = tuple(node for node in nodes if node != sink_position)
    elif sink != "node":
        raise ValueError(f'sink is {sink!r}; allowed: "node", "conditioned"')
    if not nodes:
        raise ValueError("no token is left to be a node: the sink was the only one")
    test = PartialCorrelationTest(rows[list(nodes)], n_eff=n_eff, alpha=alpha)
    if max_cond is not None and not 0 <= max_cond < n_eff - 3:
        raise ValueError(
            f"max_cond is {max_cond} with n_eff {n_eff:g}; it may be 0 to {largest_given(n_eff)}"
        )
    if engine == "icd":
        result = icd(
            test,
            ordered=ordered,
            stable=stable,
            max_cond=max_cond,
            time_budget=time_budget,
            selection_bias=selection_bias,
        )
    else:
        result = causal_learn(test, engine, max_cond=max_cond)
    return Discovery(
        **_at_positions(result, nodes),
        n_eff=n_eff,
        alpha=alpha,
        ordered=ordered,
        layer=layer,
        head=head,
        sink=sink,
        values=mixed_values is not None,
        engine=engine,
    )


def _nodes(n_tokens: int, positions: Sequence[int] | None) -> tuple[int, ...]:
    if positions is None:
        return tuple(range(n_tokens))
    nodes = tuple(sorted(int(position) for position in positions))
    if not nodes or len(set(nodes)) < len(nodes) or nodes[0] < 0 or nodes[-1] >= n_tokens:
        raise ValueError(
            f"positions are {list(positions)}; at least one, each once, from 0 to {n_tokens - 1}"
        )
    return nodes


def _at_positions(result: Found, nodes: tuple[int, ...]) -> dict[str, Any]:
    """The result of a search over variables 0, 1, …, with token positions as nodes."""
    sets = {
        (nodes[i], nodes[j]): tuple(nodes[k] for k in given)
        for (i, j), given in result.separating_sets.items()
    }
    return {
        "pag": PAG(nodes, result.pag.marks),
        "separating_sets": sets,
        "tests": result.tests,
        "complete": result.complete,
        "reached": result.reached,
    }
