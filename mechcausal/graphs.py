"""Causal graphs over sequence positions: which earlier tokens each token is drawn from.

Positions are numbered from 0 and every parent comes before its child, so position order is always a
topological order. Neither torch nor networkx is loaded until a method needs it: importing this
module costs nothing, which the command line relies on.
"""

import difflib
import inspect
import io
import reprlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    import networkx as nx
    import torch
    from jaxtyping import Float
    from torch import Tensor

MAX_POSITIONS = 10_000
"""The largest graph accepted, which bounds what a file or an option can make us allocate."""

MAX_FILE_BYTES = 4 * 2**20
"""The largest edge-list file read, for the same reason."""

QUERY = "query"
"""The name of the predicted token in networkx graphs and edge-list files."""


class GraphError(ValueError):
    """A causal graph, or a description of one, that cannot be used; the message is one line."""


@dataclass(frozen=True)
class CausalGraph:
    """The parents of every position of a sequence, and of the token to be predicted.

    Attributes:
        parents: For each of the n positions, its parents, all smaller than the position and sorted
            on construction; an empty tuple marks a root.
        query_parents: None for the single-parent task, where an extra query token, drawn uniformly,
            follows the n positions (T = n + 1). Otherwise the parents of the token to be predicted
            after the n positions (T = n).

    Raises:
        GraphError: The graph is empty or too large, has a cycle or an edge that points forward, or
            names a parent that is not an integer, negative or given twice.

    Source:
        Nichani, Damian and Lee, "How Transformers Learn Causal Structure with Gradient Descent",
        ICML 2024, arXiv 2402.14735.

    Example:
        >>> graph = CausalGraph(((), (0,), (0,), (1, 2)))
        >>> graph.roots, graph.depths, graph.max_parents
        ((0,), (0, 1, 1, 2), 2)
        >>> CausalGraph(((), (2,), (1,)))
        Traceback (most recent call last):
        mechcausal.graphs.GraphError: cycle 1 → 2 → 1: every parent must come before its child
    """

    parents: tuple[tuple[int, ...], ...]
    query_parents: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        rows = _as_tuple(self.parents, "the parents of a graph")
        if not rows:
            raise GraphError("the graph is empty: it needs at least one position")
        if len(rows) > MAX_POSITIONS:
            raise GraphError(f"the graph has more than {MAX_POSITIONS} positions, the most allowed")
        parents = tuple(
            _checked_parents(row, f"position {child}") for child, row in enumerate(rows)
        )
        if fault := _order_fault([(p, child) for child, row in enumerate(parents) for p in row]):
            raise GraphError(fault[1])
        query_parents = None
        if self.query_parents is not None:
            query_parents = _checked_parents(self.query_parents, "the query")
            if not query_parents:
                raise GraphError("the query has no parents: name at least one or pass None")
            if query_parents[-1] >= len(rows):
                raise GraphError(_not_before(query_parents[-1], "the query", len(rows)))
        # Sorting makes equal graphs compare and hash equal, however they were written down.
        object.__setattr__(self, "parents", parents)
        object.__setattr__(self, "query_parents", query_parents)

    @classmethod
    def from_parents(
        cls,
        parents: Iterable[int | Iterable[int]],
        *,
        query_parents: Iterable[int] | None = None,
    ) -> "CausalGraph":
        """Build a graph from one entry per position: -1 for a root, a parent, or several parents.

        Raises:
            GraphError: An entry is none of these, or the graph is not valid.

        Example:
            >>> CausalGraph.from_parents([-1, 0, [1, 0]]).parents
            ((), (0,), (0, 1))
        """
        rows = []
        for child, entry in enumerate(_as_tuple(parents, "the parents of a graph")):
            if _is_integer(entry):
                entry = () if entry == -1 else (entry,)
            rows.append(_checked_parents(entry, f"position {child}"))
        query = None if query_parents is None else _checked_parents(query_parents, "the query")
        return cls(tuple(rows), query)

    @classmethod
    def from_networkx(cls, digraph: "nx.DiGraph") -> "CausalGraph":
        """Build a graph from a networkx one whose nodes are 0..n-1 and, optionally, "query".

        Raises:
            GraphError: The argument is not directed, holds another node, or is not a valid graph.

        Example:
            >>> import networkx as nx
            >>> CausalGraph.from_networkx(nx.DiGraph([(0, 1), (1, 2)])) == chain(3)
            True
        """
        import networkx as nx

        if not isinstance(digraph, nx.DiGraph):
            raise GraphError(f"expected a networkx DiGraph, found a {type(digraph).__name__}")
        nodes = [node for node in digraph if node != QUERY]
        for node in nodes:
            if not (_is_integer(node) and 0 <= node < len(nodes)):
                raise GraphError(
                    f"node {reprlib.repr(node)} is not a position: {len(nodes)} positions are the"
                    f" integers 0 to {len(nodes) - 1}, beside them only {QUERY!r} is allowed"
                )
        parents: list[list[int]] = [[] for _ in nodes]
        query_parents: list[int] = []
        for parent, child in digraph.edges():
            if parent == QUERY:
                raise GraphError(f"the query cannot be a parent, found the edge query → {child}")
            (query_parents if child == QUERY else parents[child]).append(int(parent))
        return cls.from_parents(parents, query_parents=query_parents if QUERY in digraph else None)

    @classmethod
    def from_edge_list(cls, path: str | Path) -> "CausalGraph":
        r"""Read a graph from a text file with one edge, `parent child`, per line.

        The two fields are separated by blanks, a comma or `->`; the child may be the word `query`.
        A line with one number says that this position exists, which isolated roots need. `#` starts
        a comment. The graph reaches up to the largest number named; positions without parents are
        roots.

        Raises:
            GraphError: The file cannot be read, is larger than `MAX_FILE_BYTES`, is not text, or a
                line is not as described; the message names the file, the line and what is allowed.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = Path(folder, "graph.txt")
            ...     _ = path.write_text("0 1  # an edge\n0 -> 2\n3\n")
            ...     CausalGraph.from_edge_list(path).parents
            ((), (0,), (0,), ())
        """
        size = 0
        edge_lines: dict[tuple[int, int | str], int] = {}
        for number, line in enumerate(io.StringIO(_read_text(path), newline=None), start=1):
            content = line.partition("#")[0].strip()
            if not content:
                continue
            named = _parse_line(content, f"{path}:{number}")
            size = max([size, *(field + 1 for field in named if isinstance(field, int))])
            if len(named) == 2:
                first = edge_lines.setdefault(named, number)
                if first != number:
                    raise GraphError(
                        f"{path}:{number}: edge {named[0]} → {named[1]} is given twice,"
                        f" first on line {first}"
                    )
        if size == 0:
            raise GraphError(f"{path}: found no edge: write one 'parent child' pair per line")
        parents: list[list[int]] = [[] for _ in range(size)]
        query_parents: list[int] = []
        edges: list[tuple[int, int]] = []
        for parent, child in edge_lines:
            if isinstance(child, int):
                parents[child].append(parent)
                edges.append((parent, child))
            else:
                query_parents.append(parent)
        if fault := _order_fault(edges):
            raise GraphError(f"{path}:{edge_lines[fault[0]]}: {fault[1]}")
        return cls.from_parents(parents, query_parents=query_parents or None)

    @property
    def n_positions(self) -> int:
        """The number n of graph positions, a query token not counted."""
        return len(self.parents)

    @property
    def sequence_length(self) -> int:
        """The number T of tokens the model sees: n + 1 with an extra query token, else n."""
        return self.n_positions + (self.query_parents is None)

    @property
    def roots(self) -> tuple[int, ...]:
        """The positions without a parent, ascending."""
        return tuple(child for child, row in enumerate(self.parents) if not row)

    @property
    def non_roots(self) -> tuple[int, ...]:
        """The positions with a parent, ascending."""
        return tuple(child for child, row in enumerate(self.parents) if row)

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """All (parent, child) pairs of positions by child, then parent; the query's are left out.

        Example:
            >>> two_parents(4).edges
            ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3))
        """
        return tuple((parent, child) for child, row in enumerate(self.parents) for parent in row)

    @property
    def max_parents(self) -> int:
        """The largest number of parents that a position or the query has."""
        return max(len(row) for row in (*self.parents, self.query_parents or ()))

    @property
    def is_single_parent(self) -> bool:
        """Whether this is a single-parent task: at most one parent each and a uniform query."""
        return self.query_parents is None and self.max_parents <= 1

    def parent_array(self) -> tuple[int, ...]:
        """The parent of each position, -1 for a root.

        Raises:
            GraphError: A position has several parents.

        Example:
            >>> icl_pairs(4).parent_array()
            (-1, 0, -1, 2)
        """
        for child, row in enumerate(self.parents):
            if len(row) > 1:
                raise GraphError(
                    f"position {child} has {len(row)} parents, at most one is allowed here"
                )
        return tuple(row[0] if row else -1 for row in self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """The longest path from a root to each position, in edges: 0 for a root.

        Example:
            >>> binary_tree(7).depths
            (0, 1, 1, 2, 2, 2, 2)
        """
        depths: list[int] = []
        for row in self.parents:
            depths.append(1 + max((depths[parent] for parent in row), default=-1))
        return tuple(depths)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The positions grouped by depth: given the levels before it, a level can be drawn at once.

        Example:
            >>> binary_tree(6).levels
            ((0,), (1, 2), (3, 4, 5))
        """
        levels: list[list[int]] = [[] for _ in range(1 + max(self.depths))]
        for position, depth in enumerate(self.depths):
            levels[depth].append(position)
        return tuple(tuple(level) for level in levels)

    def adjacency(self) -> "Float[Tensor, 'n n']":
        """The n × n matrix with a one at [child, parent], laid out as attention is; no query.

        Example:
            >>> chain(3).adjacency().tolist()
            [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
        """
        import torch

        matrix = torch.zeros(self.n_positions, self.n_positions)
        if self.edges:
            parents, children = torch.tensor(self.edges).unbind(dim=1)
            matrix[children, parents] = 1.0
        return matrix

    def to_networkx(self) -> "nx.DiGraph":
        """A networkx graph with the nodes 0..n-1 and, if the query has parents, "query".

        Example:
            >>> sorted(k_gram(2, 1).to_networkx().edges(), key=str)
            [(0, 1), (1, 'query')]
        """
        import networkx as nx

        digraph = nx.DiGraph()
        digraph.add_nodes_from(range(self.n_positions))
        digraph.add_edges_from(self.edges)
        digraph.add_edges_from((parent, QUERY) for parent in self.query_parents or ())
        return digraph

    def to_edge_list(self, path: str | Path) -> None:
        """Write the text file that `from_edge_list` reads back to an equal graph.

        Raises:
            GraphError: The file cannot be written.
        """
        connected = {end for edge in self.edges for end in edge} | set(self.query_parents or ())
        lines = [
            f"# {self.n_positions} positions, one 'parent child' or isolated position per line",
            *(f"{root}" for root in self.roots if root not in connected),
            *(f"{parent} {child}" for parent, child in self.edges),
            *(f"{parent} {QUERY}" for parent in self.query_parents or ()),
        ]
        try:
            Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise GraphError(f"{path}: cannot be written: {_reason(error)}") from error


# --- Presets: n counts positions, never the query ----------------------------------------------


def chain(n: int) -> CausalGraph:
    """The Markov chain: p(i) = i - 1.

    Raises:
        GraphError: n is not a whole number from 1 to `MAX_POSITIONS`; so for every preset.

    Example:
        >>> chain(4).parent_array()
        (-1, 0, 1, 2)
    """
    return lag_chain(n, 1)


def lag_chain(n: int, lag: int) -> CausalGraph:
    """Each position depends on the one `lag` before it: p(i) = i - lag; the first `lag` are roots.

    Raises:
        GraphError: The lag is not a whole number of at least 1.

    Example:
        >>> lag_chain(5, 2).parent_array()
        (-1, -1, 0, 1, 2)
    """
    size, lag = _positions(n), _count(lag, "lag")
    return CausalGraph.from_parents([max(i - lag, -1) for i in range(size)])


def icl_pairs(n: int) -> CausalGraph:
    """In-context learning of (input, output) pairs: odd i → i - 1, every even i is a root.

    Example:
        >>> icl_pairs(5).parent_array()
        (-1, 0, -1, 2, -1)
    """
    return CausalGraph.from_parents([i - 1 if i % 2 else -1 for i in range(_positions(n))])


def random_tree(n: int, *, generator: "torch.Generator") -> CausalGraph:
    """A random recursive tree: position 0 is the root, p(i) is uniform in {0, …, i-1}.

    Raises:
        GraphError: The generator is not a torch.Generator on the CPU; so for every random preset.

    Example:
        >>> import torch
        >>> random_tree(9, generator=torch.Generator().manual_seed(0)).roots
        (0,)
    """
    draw = _sampler(generator)
    return CausalGraph.from_parents([draw(0, i) if i else -1 for i in range(_positions(n))])


def random_forest(n: int, *, edge_probability: float, generator: "torch.Generator") -> CausalGraph:
    """A `random_tree` of which each edge is kept, independently, with `edge_probability`.

    Raises:
        GraphError: The probability is not a number from 0 to 1.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> random_forest(3, edge_probability=0.0, generator=generator).roots
        (0, 1, 2)
    """
    probability = _probability(edge_probability, "edge_probability")
    tree = random_tree(n, generator=generator).parent_array()

    import torch

    kept = torch.rand(len(tree), generator=generator, dtype=torch.float64) < probability
    return CausalGraph.from_parents(
        [parent if keep else -1 for parent, keep in zip(tree, kept.tolist(), strict=True)]
    )


def random_parents(n: int, *, generator: "torch.Generator") -> CausalGraph:
    """The paper's random graph: p(i) is uniform in {-1, 0, …, i-1}, where -1 makes i a root.

    Example:
        >>> import torch
        >>> random_parents(1, generator=torch.Generator()).parent_array()
        (-1,)
    """
    draw = _sampler(generator)
    return CausalGraph.from_parents([draw(-1, i) for i in range(_positions(n))])


def star(n: int) -> CausalGraph:
    """Every position but the first depends on the first: p(i) = 0.

    Example:
        >>> star(4).parent_array()
        (-1, 0, 0, 0)
    """
    return CausalGraph.from_parents([0 if i else -1 for i in range(_positions(n))])


def binary_tree(n: int) -> CausalGraph:
    """The complete binary tree in breadth-first order: p(i) = ⌊(i-1)/2⌋.

    Example:
        >>> binary_tree(6).parent_array()
        (-1, 0, 0, 1, 1, 2)
    """
    return CausalGraph.from_parents([(i - 1) // 2 for i in range(_positions(n))])


def interleaved_chains(n: int, n_chains: int, *, generator: "torch.Generator") -> CausalGraph:
    """Several Markov chains shuffled together: p(i) is the previous position of i's own chain.

    One position per chain is set aside at random, so that no chain is empty (n < n_chains leaves
    n chains of one position); every other position joins a chain chosen uniformly.

    Raises:
        GraphError: n_chains is not a whole number of at least 1.

    Example:
        >>> import torch
        >>> len(interleaved_chains(9, 3, generator=torch.Generator().manual_seed(0)).roots)
        3
    """
    size, n_chains, draw = _positions(n), _count(n_chains, "n_chains"), _sampler(generator)

    import torch

    chain_of = [draw(0, n_chains) for _ in range(size)]
    set_aside = torch.randperm(size, generator=generator)[:n_chains].tolist()
    for chain_index, position in enumerate(set_aside):
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
    rows = [sorted({(i - 1) // 2, i - 1}) for i in range(1, _positions(n) + 1)]
    return CausalGraph.from_parents([-1, *rows[:-1]], query_parents=rows[-1])


def k_gram(n: int, k: int) -> CausalGraph:
    """In-context k-grams: p(i) = {i-1, …, i-k}, the first k are roots; the query sits at i = n.

    Raises:
        GraphError: k is not a whole number from 1 to n.

    Example:
        >>> k_gram(4, 2)
        CausalGraph(parents=((), (), (0, 1), (1, 2)), query_parents=(2, 3))
    """
    size = _positions(n)
    k = _count(k, "k", largest=size)
    return CausalGraph.from_parents(
        [range(i - k, i) if i >= k else () for i in range(size)],
        query_parents=range(size - k, size),
    )


def manual(
    parents: Iterable[int | Iterable[int]], *, query_parents: Iterable[int] | None = None
) -> CausalGraph:
    """The graph written out by hand, as `CausalGraph.from_parents` reads it.

    Example:
        >>> manual([-1, 0, 0, 1, 2]).levels
        ((0,), (1, 2), (3, 4))
    """
    return CausalGraph.from_parents(parents, query_parents=query_parents)


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
"""The presets that a size, options and a generator describe, by name."""


def build_preset(
    name: str, n_positions: int, *, generator: "torch.Generator | None" = None, **options: object
) -> CausalGraph:
    """Build the preset of that name; one that is not random leaves the generator untouched.

    Args:
        name: A key of `PRESETS`.
        n_positions: The number of positions, a query not counted.
        generator: The source of randomness, required by the random presets.
        options: The other arguments of the preset, all of them required.

    Raises:
        GraphError: The name is unknown; an option is missing, does not apply or is out of range.

    Example:
        >>> build_preset("lag_chain", 4, lag=2).parent_array()
        (-1, -1, 0, 1)
        >>> build_preset("chian", 4)
        Traceback (most recent call last):
        mechcausal.graphs.GraphError: unknown graph preset 'chian' (did you mean 'chain'?): ...
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise GraphError(f"unknown graph preset {name!r}{hint}: allowed are {', '.join(PRESETS)}")
    accepted = list(inspect.signature(PRESETS[name]).parameters)[1:]
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


# --- Checks ------------------------------------------------------------------------------------


def _is_integer(value: object) -> TypeGuard[int]:
    """Whether the value is an integer, numpy's included; a truth value is not one here."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _count(value: object, what: str, *, largest: int = MAX_POSITIONS) -> int:
    if not (_is_integer(value) and 1 <= value <= largest):
        raise GraphError(
            f"{what} must be a whole number from 1 to {largest}, got {reprlib.repr(value)}"
        )
    return int(value)


def _positions(n: object) -> int:
    return _count(n, "the number of positions")


def _probability(value: object, what: str) -> float:
    if isinstance(value, bool) or not (isinstance(value, Real) and 0.0 <= float(value) <= 1.0):
        raise GraphError(f"{what} must be a number from 0 to 1, got {reprlib.repr(value)}")
    return float(value)


def _sampler(generator: object) -> Callable[[int, int], int]:
    """A function that draws an integer uniformly from low, …, high - 1."""
    import torch

    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise GraphError(f"generator must be a torch.Generator on the CPU, got {generator!r}")
    return lambda low, high: int(torch.randint(low, high, (), generator=generator))


def _as_tuple(value: object, what: str) -> tuple[Any, ...]:
    """The items of any iterable but a text; one too many is enough to see that it is too long."""
    with suppress(TypeError):
        if not isinstance(value, str | bytes) and isinstance(value, Iterable):
            return tuple(islice(value, MAX_POSITIONS + 1))
    raise GraphError(f"{what} must be a list of integers, got {reprlib.repr(value)}")


def _checked_parents(row: object, child: str) -> tuple[int, ...]:
    """The parents of one child, sorted; whether they come before it is `_order_fault`'s to say."""
    parents = _as_tuple(row, f"the parents of {child}")
    for parent in parents:
        if not _is_integer(parent):
            raise GraphError(f"parent {reprlib.repr(parent)} of {child} is not an integer")
        if parent < 0:
            raise GraphError(
                f"parent {parent} of {child} is out of range:"
                " positions start at 0, a root has no parents"
            )
    ascending = sorted(int(parent) for parent in parents)
    for parent, following in pairwise(ascending):
        if parent == following:
            raise GraphError(f"parent {parent} of {child} is given twice")
    return tuple(ascending)


def _not_before(parent: int, child: str, place: int) -> str:
    return f"parent {parent} of {child} does not come before it: every parent must be < {place}"


def _order_fault(edges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], str] | None:
    """An edge that does not point from earlier to later and the sentence that says so, if any."""
    forward = [(parent, child) for parent, child in edges if parent >= child]
    if not forward:
        return None

    import networkx as nx

    # Inside a strongly connected component a cycle is found without ever turning back; searching
    # the whole graph can take quadratic time.
    digraph = nx.DiGraph(edges)
    loops = [
        component
        for component in nx.strongly_connected_components(digraph)
        if len(component) > 1 or any(digraph.has_edge(node, node) for node in component)
    ]
    if not loops:
        parent, child = forward[0]
        return forward[0], _not_before(parent, f"position {child}", child)
    component = min(loops, key=min)
    cycle = nx.find_cycle(digraph.subgraph(component), min(component))
    start = min(range(len(cycle)), key=lambda k: cycle[k][0])
    cycle = cycle[start:] + cycle[:start]
    names = [str(parent) for parent, _ in cycle]
    if len(names) > 10:
        names[8:-1] = ["…"]
    path = " → ".join([*names, names[0]])
    fault = next((parent, child) for parent, child in cycle if parent >= child)
    return fault, f"cycle {path}: every parent must come before its child"


# --- Edge-list files ---------------------------------------------------------------------------


def _read_text(path: str | Path) -> str:
    source = Path(path)
    try:
        # A device or a pipe could block or never end.
        if source.exists() and not source.is_file():
            raise OSError("not a plain file")
        with source.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise GraphError(f"{path}: cannot be read: {_reason(error)}") from error
    if len(data) > MAX_FILE_BYTES:
        raise GraphError(
            f"{path}: more than {MAX_FILE_BYTES} bytes, the most an edge list may have"
        )
    if b"\0" not in data:
        with suppress(UnicodeDecodeError):
            return data.decode("utf-8-sig")
    raise GraphError(f"{path}: not a text file: an edge list is UTF-8 text")


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _parse_line(content: str, where: str) -> tuple[int] | tuple[int, int | str]:
    """The position, or the (parent, child) pair, that a line without its comment names."""
    separated = content.replace("->", ",")
    fields = separated.split(",") if "," in separated else separated.split()
    if len(fields) > 2:
        raise GraphError(
            f"{where}: found {len(fields)} fields, {reprlib.repr(content)}:"
            " allowed are 'parent child' or a lone position"
        )
    parent = _parse_position(fields[0].strip(), where)
    if len(fields) == 1:
        return (parent,)
    child = fields[1].strip()
    return parent, child if child == QUERY else _parse_position(child, where, f" or {QUERY!r}")


def _parse_position(field: str, where: str, alternative: str = "") -> int:
    # Counting the digits first keeps a number of a million digits from being converted at all.
    digits = field.lstrip("0") or field[:1]
    short = len(digits) <= len(str(MAX_POSITIONS))
    if not (short and digits.isascii() and digits.isdigit() and int(digits) < MAX_POSITIONS):
        raise GraphError(
            f"{where}: found {reprlib.repr(field)}:"
            f" allowed are positions from 0 to {MAX_POSITIONS - 1}{alternative}"
        )
    return int(digits)
