"""`discover`: a causal graph over the tokens of one input, from one head of any transformer."""

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
    """A graph over token positions, and how it was found.

    Attributes:
        pag: the graph; its nodes are token positions.
        separating_sets: by pair of positions without an edge, the earlier first: the positions that
            separated it.
        tests: how many tests of independence were made.
        n_eff: the knob of sparsity (see `discover`).
        alpha: level of the tests.
        ordered: whether token order was taken for causal order.
        complete: whether the search came to its end; if not, edges may be too many.
        reached: size of conditioning sets up to which all tests were made; None where not known.
        layer: which layer's attention; None for a pattern that was given.
        head: which head's.
        sink: "node", or "conditioned" on.
        values: whether covariances are those of attention-weighted values.
        engine: which search.
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
        """Plain values for JSON.

        `{"nodes", "edges": [{"from", "to", "marks"}], "separating_sets": [{"pair", "given"}],
        "tests", "n_eff", "alpha", "ordered", "complete", "reached", "layer", "head", "sink",
        "values", "engine"}`.
        """
        sets = [
            {"pair": list(pair), "given": list(given)}
            for pair, given in sorted(self.separating_sets.items())
        ]
        names = ("tests", "n_eff", "alpha", "ordered", "complete", "reached", "layer", "head")
        rest = {name: getattr(self, name) for name in (*names, "sink", "values", "engine")}
        return {**self.pag.to_dict(), "separating_sets": sets, **rest}


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
    """The causal graph over one input's tokens that one head's attention A stands for.

    Covariances of tokens are A Aᵀ; an edge stays where no set of other tokens makes the partial
    correlation insignificant.

    Args:
        model: a HookedTransformer, HookedEncoder or TransformerBridge; left as it was.
        tokens: one sequence, `[pos]` or `[1 pos]`.
        layer: whose attention; None for the deepest.
        head: which of its heads.
        n_eff: stands for a number of samples in the tests; None for `d_head`. One forward pass has
            no samples: this is a knob of sparsity, and the larger it is, the more edges stay.
            Compare a few.
        alpha: level of the tests; the smaller, the fewer edges.
        ordered: whether token order is causal order (OrdICD); None: where no token attends to
            a later one, and without selection bias.
        sink: "node", or "conditioned": the attention sink is taken out by conditioning on it.
        sink_position: where the sink is; used with "conditioned".
        positions: the tokens to be nodes, None for all; the others are hidden variables.
        values: take the covariances of the attention-weighted values A V (`hook_z`) instead.
        engine: "icd"; "fci" or "pc" of causal-learn as a check, which know no token order, and
            take neither `stable` nor `selection_bias` nor `time_budget`.
        stable: see `icd`.
        max_cond: largest conditioning set; must be below n_eff − 3.
        time_budget: seconds after which the search stops with a sound partial graph (icd alone).
        selection_bias: see `icd`.

    Returns:
        The graph over token positions, with its separating sets.

    Raises:
        ValueError: an argument out of range, n_eff too small for a set that has to be conditioned
            on, or attention that is not finite.
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
    """The same from an attention pattern that is at hand.

    Args:
        attention: `[query key]`, rows that sum to 1; see `checked_attention` for its rounding.
        n_eff: stands for a number of samples: a knob of sparsity.
        alpha: level of the tests.
        ordered: whether token order is causal order; None: see `discover`.
        sink: "node" or "conditioned".
        sink_position: where the sink is.
        positions: the tokens to be nodes.
        mixed_values: A V, to take covariances of in place of A's.
        engine: "icd", "fci" or "pc".
        stable: see `icd`.
        max_cond: largest conditioning set.
        time_budget: seconds after which the search stops.
        selection_bias: see `icd`.
        layer: where the pattern is from, for the record.
        head: the same.

    Raises:
        ValueError: no attention pattern, or as `discover`.
        ProbeError: causal-learn is asked for and not installed.

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
        ours = {"ordered": ordered, "stable": stable, "selection_bias": selection_bias}
        for name, given in {**ours, "time_budget": time_budget is not None}.items():
            if given:
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
        found = icd(
            test,
            ordered=ordered,
            stable=stable,
            max_cond=max_cond,
            time_budget=time_budget,
            selection_bias=selection_bias,
        )
    else:
        found = causal_learn(test, engine, max_cond=max_cond)
    return Discovery(
        **_at_positions(found, nodes),
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


def _at_positions(found: Found, nodes: tuple[int, ...]) -> dict[str, Any]:
    """What a search over variables 0, 1, … found, said of token positions."""
    sets = {
        (nodes[i], nodes[j]): tuple(nodes[k] for k in given)
        for (i, j), given in found.separating_sets.items()
    }
    return {
        "pag": PAG(nodes, found.pag.marks),
        "separating_sets": sets,
        "tests": found.tests,
        "complete": found.complete,
        "reached": found.reached,
    }
