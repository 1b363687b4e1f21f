"""Where a disentangled transformer's weights lie: the share of each named block in A and W.

Parts of A and W that no prediction can show are taken away first, so that weights that compute the
same have the same shares. The entries of a stream sum to 1 (tokens and positions are one-hot,
copies are averages of those). So for every pair of a query and a key stream of A

- a number added to all keys of a stream, in one row, adds the same to the scores of all keys, and
  softmax removes it: every row is centred over each key stream, rows of W over the vocabulary;
- what is the same in all rows of a query stream depends on the key alone, and could as well stand
  in the rows of another stream: it is counted in the rows of the positions, and so is the same
  in W, the bias of the logits: the other streams keep what differs between their rows;
- rows of positions do not meet all keys: not those of later positions, not any in the row of
  position 0, which sees one key, and in the last layer and W the last position is the only query;
- position T - 1 occurs in a query and a key at once, or not at all. There, reading copy b of it
  with the query's copy a is the same as the other way round: it counts where a comes first.

For random weights nothing else is hidden. (What these weights happen to hide, as where one stream
is a function of another, is counted as it is.)
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.models.disentangled import DisentangledTransformer

_PREFIX = "blocks/"

Matrix = Float[Tensor, "row column"]
Streams = Mapping[str, slice]


def block_shares(model: DisentangledTransformer) -> dict[str, float]:
    """Share of the squared Frobenius norm of each head's A, and of W, in each of its blocks.

    `|block|^2 / |matrix|^2` of what predictions can show (see the module). Names are
    `blocks/A1.0/query:key`, layers from 1 as in the paper, heads from 0, and `blocks/W/stream`;
    streams are the model's.
    The shares of a matrix sum to 1; NaN where the whole matrix is 0.

    Example:
        >>> from mechcausal.graphs import chain
        >>> model = DisentangledTransformer(vocab_size=3, sequence_length=6)
        >>> model.set_ideal(chain(5))
        >>> shares = block_shares(model)
        >>> [name for name, share in shares.items() if share > 0.99]
        ['blocks/A1.0/position:position', 'blocks/A2.0/token:0.0/token', 'blocks/W/1.0/token']
    """
    shares = {}
    for matrix, squares in _squares(model).items():
        total = sum(squares.values())
        for block, square in squares.items():
            shares[f"{_PREFIX}{matrix}/{block}"] = square / total if total else math.nan
    return shares


def solution_share(model: DisentangledTransformer, graph: CausalGraph) -> float:
    """How much of the weights lies in the blocks of the paper's solution: 1 is all, 0 nothing.

    The mean over A1, A2 and W of the share of the squared norm, a layer's heads taken together,
    that lies in `solution_blocks`; NaN where one of the three is 0, as W is before training.

    Raises:
        ValueError: the model has another number of layers than two.

    Example:
        >>> from mechcausal.graphs import two_parents
        >>> model = DisentangledTransformer(vocab_size=3, sequence_length=6, heads=(2, 1))
        >>> model.set_ideal(two_parents(6))
        >>> round(solution_share(model, two_parents(6)), 6)
        1.0
    """
    blocks = solution_blocks(model, graph)
    inside = {"A1": 0.0, "A2": 0.0, "W": 0.0}
    total = dict(inside)
    for matrix, squares in _squares(model).items():
        part = matrix.split(".")[0]
        for block, square in squares.items():
            total[part] += square
            inside[part] += square if f"{_PREFIX}{matrix}/{block}" in blocks else 0.0
    if not all(total.values()):
        return math.nan
    return sum(inside[part] / total[part] for part in total) / len(total)


def solution_blocks(model: DisentangledTransformer, graph: CausalGraph) -> tuple[str, ...]:
    """Names of the blocks that hold the paper's solution, as `block_shares` has them.

    A1 finds parents by position. A2 compares the token copied by any head l with the query's
    token, or, where the graph names the query's parents, with those that any head l' copied for
    the query; then position:position too, by which the query's row is no example itself. W reads
    the token that layer 2 attends to.

    Raises:
        ValueError: the model has another number of layers than two.

    Example:
        >>> from mechcausal.graphs import chain
        >>> model = DisentangledTransformer(vocab_size=3, sequence_length=6)
        >>> solution_blocks(model, chain(5))
        ('blocks/A1.0/position:position', 'blocks/A2.0/token:0.0/token', 'blocks/W/1.0/token')
    """
    if len(model.heads) != 2:
        raise ValueError(
            f"heads is {list(model.heads)}: the solution has 2 layers, not {len(model.heads)}"
        )
    first, second = (range(n_heads) for n_heads in model.heads)
    copied = [f"0.{head}/token" for head in first]
    several = graph.query_parents is not None
    pairs = [f"{query}:{key}" for query in (copied if several else ["token"]) for key in copied]
    pairs += ["position:position"] * several
    names = [f"A1.{head}/position:position" for head in first]
    names += [f"A2.{head}/{pair}" for head in second for pair in pairs]
    names += [f"W/1.{head}/token" for head in second]
    return tuple(_PREFIX + name for name in names)


@torch.no_grad()
def block_effects(model: DisentangledTransformer, loss: Callable[[], float]) -> dict[str, float]:
    """Rise of the loss when a block of A or W is set to 0, for each block: what it is used for.

    A share of the norm may lie in rows that hardly occur; an effect on the loss may not. But it is
    an effect of the weights as they are: others that compute the same may have another.

    Args:
        model: left as it was, by an exception in `loss` too.
        loss: of the model as it is, nats.

    Returns:
        The rise by the names of `block_shares`.

    Example:
        >>> from mechcausal.graphs import chain
        >>> model = DisentangledTransformer(vocab_size=3, sequence_length=6)
        >>> model.set_ideal(chain(5))
        >>> tokens = torch.tensor([[0, 1, 2, 0, 1, 0]])
        >>> effects = block_effects(model, lambda: -model(tokens)[0, 1].log().item())
        >>> [name for name, rise in effects.items() if abs(rise) > 0.01]
        ['blocks/A1.0/position:position', 'blocks/A2.0/token:0.0/token', 'blocks/W/1.0/token']
    """
    whole = loss()
    effects = {}
    for name, block in _named_blocks(model):
        before = block.clone()
        try:
            block.zero_()
            effects[name] = loss() - whole
        finally:
            block.copy_(before)
    return effects


def _named_blocks(model: DisentangledTransformer) -> Iterator[tuple[str, Tensor]]:
    for layer, n_heads in enumerate(model.heads):
        streams = model.streams(layer)
        for head in range(n_heads):
            for query, key in product(streams, streams):
                name = f"{_PREFIX}A{layer + 1}.{head}/{query}:{key}"
                yield name, model.block(layer, head, query, key)
    for stream in model.streams(len(model.heads)):
        yield f"{_PREFIX}W/{stream}", model.readout(stream)


def _squares(model: DisentangledTransformer) -> dict[str, dict[str, float]]:
    """Squared norm of what can be seen of every block, by matrix and block."""
    squares = {}
    for layer in range(len(model.heads)):
        streams = model.streams(layer)
        for head, matrix in enumerate(_plain(model.A(layer))):
            visible = _visible(matrix, model, layer)
            squares[f"A{layer + 1}.{head}"] = {
                f"{query}:{key}": float(visible[rows, columns].square().sum())
                for query, rows in streams.items()
                for key, columns in streams.items()
            }
    last = len(model.heads)
    seen = torch.ones_like(_plain(model.W))
    seen[model.streams(last)["position"]][:-1] = 0
    vocabulary = {"vocabulary": slice(0, model.vocab_size)}
    readout = _centred(_plain(model.W), seen, model.streams(last), vocabulary)
    squares["W"] = {
        name: float(readout[rows].square().sum()) for name, rows in model.streams(last).items()
    }
    return squares


def _plain(weight: Tensor) -> Tensor:
    return weight.detach().double().cpu()


def _visible(matrix: Matrix, model: DisentangledTransformer, layer: int) -> Matrix:
    """Of all matrices that give a head the same patterns the one with nothing hidden in it."""
    streams = model.streams(layer)
    seen = _seen(matrix, streams, last=layer == len(model.heads) - 1)
    visible = _centred(matrix, seen, streams, streams)
    for kept, moved in _twins(streams):
        unseen = torch.zeros_like(matrix)
        unseen[kept], unseen[moved] = 1, -1
        unseen = _centred(unseen, seen, streams, streams)
        if unseen[moved] != 0:
            visible = visible - visible[moved] / unseen[moved] * unseen
    return visible


def _centred(matrix: Matrix, seen: Matrix, rows: Streams, columns: Streams) -> Matrix:
    """Row means away, and means over all rows of a stream moved to the rows of the positions."""
    matrix = matrix * seen
    for name, stream in rows.items():
        if name != "position":
            mean = matrix[stream].mean(0)
            matrix[stream] -= mean
            matrix[rows["position"]] += mean * seen[rows["position"]]
    for stream in columns.values():
        count = seen[:, stream].sum(1, keepdim=True).clamp(min=1)
        mean = matrix[:, stream].sum(1, keepdim=True) / count
        matrix[:, stream] -= mean * seen[:, stream]
    return matrix


def _seen(matrix: Matrix, streams: Streams, *, last: bool) -> Matrix:
    """1 at entries of A that a query and a key can meet in, where there is a choice of keys."""
    seen = torch.ones_like(matrix)
    of_positions = seen[streams["position"]]
    for name, stream in streams.items():
        if name.endswith("position"):
            of_positions[:, stream] = of_positions[:, stream].tril()
    of_positions[: -1 if last else 1] = 0
    return seen


def _twins(streams: Streams) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Entries for position T - 1 of which only the sum counts: the first of a kind, and another.

    A stream that heads have copied holds, for position T - 1, the product of their attention from
    it to itself; so the heads of both streams, in any order, tell what an entry is multiplied with.
    """
    first: dict[tuple[str, ...], tuple[int, int]] = {}
    ends = [(name, stream.stop - 1) for name, stream in streams.items() if "position" in name]
    for (query, row), (key, column) in product(ends, ends):
        heads = tuple(sorted((*query.split("/")[:-1], *key.split("/")[:-1])))
        kept = first.setdefault(heads, (row, column))
        if kept != (row, column):
            yield kept, (row, column)
