"""How stable the edges of a discovered graph are: over heads, layers, n_eff and resampled values.

Cost: as many searches as replicates; the model runs once.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, Unpack, get_args

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.causal_discovery.discovery import Discovery, discover_attention
from probes.causal_discovery.independence import largest_given
from probes.causal_discovery.options import SearchKeywords
from probes.reading.activation import Activation
from probes.reading.attach import attach
from probes.reading.hook_names import layers_with
from probes.reading.passes import checked_tokens, run, undisturbed

Variation: TypeAlias = Literal["heads", "layers", "n_eff", "values"]
"""What a replicate may change."""
VARIATIONS: tuple[Variation, ...] = get_args(Variation)

_MIRRORED = {"<": ">", ">": "<"}


@dataclass(frozen=True)
class PairStability:
    """How often two tokens are joined, and how.

    Attributes:
        start: a token position.
        end: another one.
        marks: the marks of the edge in the graph itself, from `start` to `end`; "" for no edge.
        joined: share of replicates with an edge between the two.
        same: share of replicates with exactly these marks (without an edge: no edge).
        shares: share of replicates by marks, the most frequent first; "" for no edge.
    """

    start: int
    end: int
    marks: str
    joined: float
    same: float
    shares: dict[str, float]


@dataclass(frozen=True)
class Stability:
    """How often replicates of a search find each edge.

    A share near 1 says that the edge does not hang on what was varied; it is no probability that
    the edge is true. An error that all replicates share (attention that is not the model's
    reason, a hidden token) is in all of them.

    Attributes:
        pairs: every edge of the graph, in its order, and then the pairs that only replicates join,
            the most frequent first.
        replicates: number of replicates.
        over: what the replicates changed.
        n_eff: the values of n_eff that they drew from.
    """

    pairs: tuple[PairStability, ...]
    replicates: int
    over: tuple[Variation, ...]
    n_eff: tuple[float, ...]

    @property
    def edges(self) -> tuple[PairStability, ...]:
        """The edges of the graph."""
        return tuple(pair for pair in self.pairs if pair.marks)

    @property
    def missing(self) -> tuple[PairStability, ...]:
        """The pairs that are not joined in the graph, but in some replicate."""
        return tuple(pair for pair in self.pairs if not pair.marks)

    def joined(self) -> dict[tuple[int, int], float]:
        """The share of replicates that join each edge of the graph, by (start, end)."""
        return {(pair.start, pair.end): pair.joined for pair in self.edges}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        values["pairs"] = [
            {"from": pair.pop("start"), "to": pair.pop("end"), **pair} for pair in values["pairs"]
        ]
        return values | {"over": list(self.over), "n_eff": list(self.n_eff)}


def bootstrap(
    discovery: Discovery,
    patterns: Float[np.ndarray, "layer head query key"],
    *,
    replicates: int = 100,
    over: Sequence[Variation] = VARIATIONS,
    mixed_values: Float[np.ndarray, "layer head query d_head"] | None = None,
    layer: int = 0,
    head: int = 0,
    seed: int = 0,
    **options: Unpack[SearchKeywords],
) -> Stability:
    """Repeat a search with other heads, layers, n_eff and resampled values.

    Each replicate draws, uniformly and independently: a head of the layer (`heads`), a layer
    (`layers`), n_eff times 1/2, 1 or 2 (`n_eff`), and with `values` new values of the tokens,
    `A U` with U standard normal, `[key, n_eff]`: the sample covariance of n_eff values replaces
    A Aᵀ, so that every test errs as it would with n_eff samples.

    Args:
        discovery: the graph whose edges are judged.
        patterns: the attention patterns; row 0 and head 0 for a single one.
        replicates: number of searches.
        over: what to vary; without `heads` or `layers`, the given head and layer.
        mixed_values: attention-weighted values whose covariances replace A Aᵀ.
        layer: row of the layer of `discovery` in `patterns`.
        head: its head.
        seed: seed of the draws.
        **options: the options of the search, as for `discovery`.

    Raises:
        ValueError: no replicates, an unknown or no variation, or as `discover_attention`.
    """
    if replicates < 1:
        raise ValueError(f"replicates is {replicates}; it must be at least 1")
    if not over or not set(over) <= set(VARIATIONS):
        raise ValueError(f"over is {list(over)}; some of {', '.join(VARIATIONS)} are needed")
    source = np.random.default_rng(seed)
    n_effs: list[float | int] = [discovery.n_eff]
    if "n_eff" in over:
        n_effs = [n for n in (discovery.n_eff / 2, discovery.n_eff, 2 * discovery.n_eff) if n > 4]
    n_layers, n_heads = patterns.shape[:2]
    nodes = discovery.pag.nodes
    counts: dict[tuple[int, int], Counter[str]] = {}
    given = dict(options)
    for _ in range(replicates):
        row = int(source.integers(n_layers)) if "layers" in over else layer
        column = int(source.integers(n_heads)) if "heads" in over else head
        n_eff = n_effs[int(source.integers(len(n_effs)))]
        pattern = patterns[row, column]
        rows = None if mixed_values is None else mixed_values[row, column]
        if "values" in over:
            wide = pattern if rows is None else rows
            rows = wide @ source.standard_normal((wide.shape[1], math.ceil(n_eff)))
        given["n_eff"] = n_eff
        given["max_cond"] = _largest_set(options.get("max_cond"), n_eff, len(nodes))
        graph = discover_attention(pattern, mixed_values=rows, **given).pag  # type: ignore[arg-type]
        for edge in graph.edges():
            start, end, marks = _ordered(edge.start, edge.end, edge.marks)
            counts.setdefault((start, end), Counter())[marks] += 1
    pairs = []
    for edge in discovery.pag.edges():
        key = _ordered(edge.start, edge.end, edge.marks)
        shares = _shares(counts.pop(key[:2], Counter()), replicates)
        if (edge.start, edge.end) != key[:2]:
            shares = {_mirror(marks): share for marks, share in shares.items()}
        pairs.append(_pair(edge.start, edge.end, edge.marks, shares))
    only = [_pair(*key, "", _shares(seen, replicates)) for key, seen in counts.items()]
    only.sort(key=lambda pair: (-pair.joined, pair.start, pair.end))
    return Stability((*pairs, *only), replicates, tuple(over), tuple(map(float, n_effs)))


def bootstrap_model(
    model: nn.Module,
    tokens: Int[Tensor, "*batch pos"],
    discovery: Discovery,
    *,
    replicates: int = 100,
    over: Sequence[Variation] = VARIATIONS,
    seed: int = 0,
    **options: Unpack[SearchKeywords],
) -> Stability:
    """`bootstrap` with the patterns of every layer and head of a model on one input.

    Args:
        model: the model of `discovery`; unchanged.
        tokens: its input.
        discovery: what `discover` returned for them.
        replicates: number of searches.
        over: what to vary.
        seed: seed of the draws.
        **options: the options of the search, as for `discovery`.

    Raises:
        ValueError, ProbeError: as `discover` and `bootstrap`.
    """
    tokens = checked_tokens(model, tokens[None] if tokens.ndim == 1 else tokens)
    layers = layers_with(model, "pattern") if "layers" in over else (discovery.layer or 0,)
    pattern, z = Activation("pattern", layers), Activation("z", layers)
    with undisturbed(model), attach(model, pattern, *([z] if discovery.values else [])):
        run(model, tokens)
    mixed = None
    if discovery.values:
        mixed = z.reading().values[:, 0].transpose(1, 2).cpu().double().numpy()
    return bootstrap(
        discovery,
        pattern.reading().values[:, 0].cpu().double().numpy(),
        replicates=replicates,
        over=over,
        mixed_values=mixed,
        layer=layers.index(discovery.layer or 0),
        head=discovery.head or 0,
        seed=seed,
        **options,
    )


def _largest_set(max_cond: int | None, n_eff: float | int, n_nodes: int) -> int | None:
    """The largest conditioning set that this n_eff allows, at most the one asked for."""
    allowed = largest_given(n_eff)
    if max_cond is None:
        return None if allowed >= n_nodes - 2 else allowed
    return min(max_cond, allowed)


def _ordered(start: int, end: int, marks: str) -> tuple[int, int, str]:
    return (start, end, marks) if start < end else (end, start, _mirror(marks))


def _mirror(marks: str) -> str:
    """The marks of an edge read from its other end."""
    return "".join(_MIRRORED.get(mark, mark) for mark in reversed(marks))


def _shares(seen: "Counter[str]", replicates: int) -> dict[str, float]:
    shares = {marks: count / replicates for marks, count in seen.most_common()}
    without = replicates - seen.total()
    if without:
        shares[""] = without / replicates
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _pair(start: int, end: int, marks: str, shares: dict[str, float]) -> PairStability:
    joined = 1 - shares.get("", 0.0)
    return PairStability(start, end, marks, joined, shares.get(marks, 0.0), shares)
