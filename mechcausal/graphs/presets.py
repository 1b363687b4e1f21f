"""Graphs by name; n is the number of positions, without the query.

Every preset raises GraphError unless n is a whole number from 1 to `MAX_POSITIONS` and its other
arguments are in the range given in its docstring.
"""

import difflib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

from mechcausal.graphs.causal_graph import CausalGraph, check_edges, is_integer
from mechcausal.graphs.faults import MAX_POSITIONS, GraphError

if TYPE_CHECKING:
    import torch


def chain(n: int) -> CausalGraph:
    """The Markov chain: p(i) = i - 1.

    Example:
        >>> chain(4).parent_array()
        (-1, 0, 1, 2)
    """
    return lag_chain(n, 1)


def lag_chain(n: int, lag: int) -> CausalGraph:
    """Each position depends on the one `lag` ≥ 1 before it: p(i) = i - lag; the rest are roots.

    Example:
        >>> lag_chain(5, 2).parent_array()
        (-1, -1, 0, 1, 2)
    """
    lag = _count(lag, "lag")
    return CausalGraph.from_parents([max(i - lag, -1) for i in _positions(n)])


def icl_pairs(n: int) -> CausalGraph:
    """In-context learning of (input, output) pairs: odd i → i - 1, every even i is a root.

    Example:
        >>> icl_pairs(5).parent_array()
        (-1, 0, -1, 2, -1)
    """
    return CausalGraph.from_parents([i - 1 if i % 2 else -1 for i in _positions(n)])


def random_tree(n: int, *, generator: "torch.Generator") -> CausalGraph:
    """A random recursive tree: position 0 is the root, p(i) is uniform in {0, …, i-1}.

    Example:
        >>> import torch
        >>> random_tree(9, generator=torch.Generator().manual_seed(0)).roots
        (0,)
    """
    return CausalGraph.from_parents([_draw(0, i, generator) if i else -1 for i in _positions(n)])


def random_forest(n: int, *, edge_probability: float, generator: "torch.Generator") -> CausalGraph:
    """A `random_tree` in which each edge is kept independently with `edge_probability`.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> random_forest(3, edge_probability=0.0, generator=generator).roots
        (0, 1, 2)
    """
    import torch

    if not 0 <= edge_probability <= 1:
        raise GraphError(f"edge_probability must be a number from 0 to 1, got {edge_probability}")
    tree = random_tree(n, generator=generator).parent_array()
    kept = torch.rand(n, generator=generator, dtype=torch.float64) < edge_probability
    return CausalGraph.from_parents(torch.where(kept, torch.tensor(tree), -1).tolist())


def random_parents(n: int, *, generator: "torch.Generator") -> CausalGraph:
    """The paper's random graph: p(i) is uniform in {-1, 0, …, i-1}, where -1 makes i a root.

    Example:
        >>> import torch
        >>> random_parents(1, generator=torch.Generator()).parent_array()
        (-1,)
    """
    return CausalGraph.from_parents([_draw(-1, i, generator) for i in _positions(n)])


def star(n: int) -> CausalGraph:
    """Every position but the first depends on the first: p(i) = 0.

    Example:
        >>> star(4).parent_array()
        (-1, 0, 0, 0)
    """
    return CausalGraph.from_parents([0 if i else -1 for i in _positions(n)])


def binary_tree(n: int) -> CausalGraph:
    """The complete binary tree in breadth-first order: p(i) = ⌊(i-1)/2⌋.

    Example:
        >>> binary_tree(6).parent_array()
        (-1, 0, 0, 1, 1, 2)
    """
    return CausalGraph.from_parents([(i - 1) // 2 for i in _positions(n)])


def interleaved_chains(n: int, n_chains: int, *, generator: "torch.Generator") -> CausalGraph:
    """Several Markov chains shuffled together: p(i) is the previous position of i's own chain.

    Each chain first gets one random position, so that none is empty (n < n_chains gives n chains of
    one position); every other position joins a uniformly drawn chain.

    Example:
        >>> import torch
        >>> len(interleaved_chains(9, 3, generator=torch.Generator().manual_seed(0)).roots)
        3
    """
    import torch

    n_chains = _count(n_chains, "n_chains")
    chain_of = [_draw(0, n_chains, generator) for _ in _positions(n)]
    first_members = torch.randperm(n, generator=generator)[:n_chains].tolist()
    for chain_index, position in enumerate(first_members):
        chain_of[position] = chain_index
    latest: dict[int, int] = {}
    parents = []
    for position, chain_index in enumerate(chain_of):
        parents.append(latest.get(chain_index, -1))
        latest[chain_index] = position
    return CausalGraph.from_parents(parents)


def two_parents(n: int) -> CausalGraph:
    """The paper's two-parent graph: p(i) = {⌊(i-1)/2⌋, i-1} for i ≥ 1; the query sits at i = n.

    Example:
        >>> two_parents(4)
        CausalGraph(parents=((), (0,), (0, 1), (1, 2)), query_parents=(1, 3))
    """
    rows = [{i // 2, i} for i in _positions(n)]
    return CausalGraph.from_parents([-1, *rows[:-1]], query_parents=rows[-1])


def k_gram(n: int, k: int) -> CausalGraph:
    """In-context k-grams: p(i) = {i-1, …, i-k}, the first k are roots; the query sits at i = n.

    Example:
        >>> k_gram(4, 2)
        CausalGraph(parents=((), (), (0, 1), (1, 2)), query_parents=(2, 3))
    """
    positions = _positions(n)
    k = _count(k, "k", largest=n)
    check_edges((n - k) * k)
    return CausalGraph.from_parents(
        [positions[i - k : i] if i >= k else () for i in positions], query_parents=positions[-k:]
    )


manual = CausalGraph.from_parents
"""A graph given by its parents; see `CausalGraph.from_parents`."""

PRESETS: dict[str, Callable[..., CausalGraph]] = {
    preset.__name__: preset
    for preset in (
        chain,
        lag_chain,
        icl_pairs,
        random_tree,
        random_forest,
        random_parents,
        star,
        binary_tree,
        interleaved_chains,
        two_parents,
        k_gram,
    )
}
"""All presets except `manual`, by name."""

WITH_QUERY_PARENTS = ("two_parents", "k_gram")
"""Presets in which the predicted token has parents, so that no query token is added."""


def preset_options(name: str) -> tuple[str, ...]:
    """The arguments of a preset besides the number of positions; a random one has `generator`.

    Example:
        >>> preset_options("random_forest")
        ('edge_probability', 'generator')
    """
    return tuple(inspect.signature(PRESETS[name]).parameters)[1:]


def build_preset(
    name: str, n_positions: int, *, generator: "torch.Generator | None" = None, **options: object
) -> CausalGraph:
    """Build a preset by name; `options` are its arguments besides n and the generator.

    A preset that is not random ignores the generator.

    Raises:
        GraphError: The name is unknown; an option is missing, does not apply or is out of range.

    Example:
        >>> build_preset("lag_chain", 4, lag=2).parent_array()
        (-1, -1, 0, 1)
        >>> build_preset("chian", 4)
        Traceback (most recent call last):
        mechcausal.graphs.faults.GraphError: unknown graph preset 'chian' ...
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise GraphError(f"unknown graph preset {name!r}{hint}: allowed are {', '.join(PRESETS)}")
    accepted = preset_options(name)
    needed = [option for option in accepted if option != "generator"]
    for option in options:
        if option not in needed:
            takes = f"it takes {', '.join(needed)}" if needed else "it takes no options"
            raise GraphError(f"option {option!r} does not apply to preset {name!r}: {takes}")
    for option in needed:
        if option not in options:
            raise GraphError(f"preset {name!r} needs the option {option!r}")
    if "generator" in accepted:
        if generator is None:
            raise GraphError(f"preset {name!r} is random: it needs a generator")
        options["generator"] = generator
    return PRESETS[name](n_positions, **options)


def _count(value: int, quantity: str, *, largest: int = MAX_POSITIONS) -> int:
    if not (is_integer(value) and 1 <= value <= largest):
        raise GraphError(f"{quantity} must be a whole number from 1 to {largest}, got {value!r}")
    return value


def _positions(n: int) -> range:
    return range(_count(n, "the number of positions"))


def _draw(low: int, high: int, generator: "torch.Generator") -> int:
    """An integer drawn uniformly from low, …, high - 1."""
    import torch

    return int(torch.randint(low, high, (), generator=generator))
