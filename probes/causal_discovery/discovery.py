"""Discover a causal graph over the tokens of one input from the attention of one head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from probes.causal_discovery.causal_learn import causal_learn
from probes.causal_discovery.independence import PartialCorrelationTest, largest_given
from probes.causal_discovery.linear_model import LATER_TOLERANCE, checked_attention, without_sink
from probes.causal_discovery.options import Engine, SearchKeywords, SearchOptions, Sink
from probes.causal_discovery.pag import PAG
from probes.causal_discovery.search import SearchResult, icd
from probes.reading.activation import Activation
from probes.reading.attach import attach
from probes.reading.hook_names import check_head, layers_with
from probes.reading.passes import checked_tokens, run, undisturbed


@dataclass(frozen=True)
class Discovery(SearchResult):
    """A causal graph over token positions, and the settings of the search.

    The nodes of `pag` and the members of `separating_sets` are token positions.

    Attributes:
        n_eff: effective number of samples.
        alpha: significance level of the tests.
        ordered: whether the search took token order as causal order.
        layer: the layer; None if the caller gave the attention pattern.
        head: the head; None if the caller gave the attention pattern.
        sink: "node", or "conditioned" if the tests condition on the attention sink.
        values: whether the covariances are those of attention-weighted values.
        engine: the search algorithm.
    """

    n_eff: float | int
    alpha: float
    ordered: bool
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
    values: bool = False,
    **options: Unpack[SearchKeywords],
) -> Discovery:
    """Discover the causal graph over one input's tokens from one head's attention A.

    The covariance of the tokens is A Aᵀ; two tokens keep their edge unless some set of other tokens
    makes their partial correlation insignificant.

    Args:
        model: a HookedTransformer, HookedEncoder or TransformerBridge; unchanged.
        tokens: one sequence, `[pos]` or `[1 pos]`.
        layer: layer of the head; default: the deepest.
        head: index of the head.
        values: use the covariances of the attention-weighted values A V (`hook_z`) instead.
        **options: the fields of `SearchOptions`, such as `n_eff` and `alpha`.

    Returns:
        The graph over token positions, with its separating sets.

    Raises:
        ValueError: an option out of range, n_eff too small for a conditioning set, or attention
            that is not finite.
        ProbeError: an unknown layer or head, tokens outside the vocabulary or the context, or no
            attention to read.

    Source: Rohekar, Gurwicz and Nisimov 2023 (arXiv 2310.20307).
    """
    tokens = checked_tokens(model, tokens[None] if tokens.ndim == 1 else tokens)
    if len(tokens) != 1:
        raise ValueError(f"tokens hold {len(tokens)} sequences; discovery reads one at a time")
    layer = layers_with(model, "pattern", layer)[-1]
    check_head(model, (layer, head))
    pattern, z = Activation("pattern", layer), Activation("z", layer)
    with undisturbed(model), attach(model, pattern, *([z] if values else [])):
        run(model, tokens)
    mixed_values = z.reading().values[0, 0, :, head].cpu().double().numpy() if values else None
    config: Any = model.cfg
    if options.get("n_eff") is None:
        options["n_eff"] = int(config.d_head)
    return discover_attention(
        pattern.reading().values[0, 0, head],
        mixed_values=mixed_values,
        layer=layer,
        head=head,
        **options,
    )


def discover_attention(
    attention: Shaped[np.ndarray, "..."] | Shaped[Tensor, "..."],
    *,
    mixed_values: Float[np.ndarray, "query d_head"] | None = None,
    layer: int | None = None,
    head: int | None = None,
    **options: Unpack[SearchKeywords],
) -> Discovery:
    """Discover the causal graph from a given attention pattern.

    Args:
        attention: `[query key]`, rows that sum to 1; `checked_attention` gives the tolerances.
        mixed_values: attention-weighted values A V whose covariances replace A Aᵀ.
        layer: layer of the pattern, stored in the result.
        head: head of the pattern, stored in the result.
        **options: the fields of `SearchOptions`; `n_eff` is required.

    Raises:
        ValueError: an invalid attention pattern, no `n_eff`, or as `discover`.
        ProbeError: the engine needs causal-learn, which is not installed.

    >>> chain = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    >>> print(discover_attention(chain, n_eff=1000).pag)
    0 o-> 1
    1 --> 2
    """
    search = SearchOptions(**options)
    n_eff, max_cond = search.n_eff, search.max_cond
    if n_eff is None:
        raise ValueError("n_eff is needed: an attention pattern does not tell its d_head")
    matrix = checked_attention(attention)
    rows = matrix if mixed_values is None else np.asarray(mixed_values, dtype=np.float64)
    if len(rows) != len(matrix) or not np.isfinite(rows).all():
        raise ValueError(f"mixed_values must be finite, one row for each of {len(matrix)} tokens")
    ordered = search.ordered
    if ordered is None:
        ordered = search.engine == "icd" and not np.triu(matrix, 1).max() > LATER_TOLERANCE
    nodes = _nodes(len(matrix), search.positions)
    if search.sink == "conditioned":
        sink = search.sink_position
        rows = np.insert(without_sink(rows, sink), sink, 0.0, axis=0)
        nodes = tuple(node for node in nodes if node != sink)
    if not nodes:
        raise ValueError("no token is left to be a node: the sink was the only one")
    test = PartialCorrelationTest(rows[list(nodes)], n_eff=n_eff, alpha=search.alpha)
    if max_cond is not None and not 0 <= max_cond < n_eff - 3:
        raise ValueError(
            f"max_cond is {max_cond} with n_eff {n_eff:g}; it may be 0 to {largest_given(n_eff)}"
        )
    if search.engine == "icd":
        result = icd(
            test,
            ordered=ordered,
            stable=search.stable,
            max_cond=max_cond,
            time_budget=search.time_budget,
        )
    else:
        result = causal_learn(test, search.engine, max_cond=max_cond)
    separating_sets = {
        (nodes[i], nodes[j]): tuple(nodes[k] for k in given)
        for (i, j), given in result.separating_sets.items()
    }
    return Discovery(
        pag=PAG(nodes, result.pag.marks),
        separating_sets=separating_sets,
        tests=result.tests,
        complete=result.complete,
        reached=result.reached,
        n_eff=n_eff,
        alpha=search.alpha,
        ordered=ordered,
        layer=layer,
        head=head,
        sink=search.sink,
        values=mixed_values is not None,
        engine=search.engine,
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
