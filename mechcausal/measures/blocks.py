"""How a disentangled transformer's weight norm is distributed over the named blocks of A and W.

Some directions of A and W do not affect the output. They are projected out first, so that equal
functions have equal shares. The entries of a stream sum to 1 (tokens and positions are one-hot,
copies are averages of these). So, for every pair of a query and a key stream of A:

- A constant added to one row within a key stream shifts all scores equally, and the softmax removes
  it. So every row is centred over each key stream, and every row of W over the vocabulary.
- The mean over the rows of a query stream depends only on the key, and no prediction shows which
  stream holds it. It is assigned to the position rows; in W it is the bias of the logits.
- Position rows are zeroed where a query never meets the key: for later keys, for position 0 (one
  key, so no choice), and, in the last layer and W, for every query but the last position.
- Position T - 1 occurs in the query and the key at once or not at all. So for this position the
  entries (copy a, copy b) and (copy b, copy a) are interchangeable; their sum is assigned to the
  first of the two.

For generic weights these are all such directions. Invariances of particular weights, for example
if one stream is a function of another, are not removed.
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

    `|block|^2 / |matrix|^2`, after the projection described in the module. Names are
    `blocks/A1.0/query:key` (layers from 1 as in the paper, heads from 0) and `blocks/W/stream`,
    with the model's stream names. The shares of a matrix sum to 1; they are NaN if it is 0.

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
    """Share of the weights in the blocks of the paper's solution, from 0 to 1.

    The mean over A1, A2 and W of the share of the squared norm (summed over a layer's heads) that
    lies in `solution_blocks`. NaN if one of the three is 0; W is 0 before training.

    Raises:
        ValueError: the model does not have two layers.

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
    """Names of the blocks that hold the paper's solution, as in `block_shares`.

    A1 attends to parents by position. A2 compares the copied tokens with the query's token. For
    several parents it compares them with the tokens copied for the query, and its
    position:position block excludes the query's own position. W reads the token that layer 2
    attends to.

    Raises:
        ValueError: the model does not have two layers.

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
    """Rise of the loss when a block of A or W is set to 0, for each block.

    Unlike a share of the norm, the effect ignores rows that rarely occur. But it is not invariant:
    different weights that compute the same function may have different effects.

    Args:
        model: restored afterwards, even if `loss` raises.
        loss: returns the current model's loss in nats.

    Returns:
        The rise in nats, by the names of `block_shares`.

    Example:
        >>> from mechcausal.graphs import chain
        >>> model = DisentangledTransformer(vocab_size=3, sequence_length=6)
        >>> model.set_ideal(chain(5))
        >>> tokens = torch.tensor([[0, 1, 2, 0, 1, 0]])
        >>> effects = block_effects(model, lambda: -model(tokens)[0, 1].log().item())
        >>> [name for name, rise in effects.items() if abs(rise) > 0.01]
        ['blocks/A1.0/position:position', 'blocks/A2.0/token:0.0/token', 'blocks/W/1.0/token']
    """
    baseline = loss()
    effects = {}
    for name, block in _named_blocks(model):
        before = block.clone()
        try:
            block.zero_()
            effects[name] = loss() - baseline
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
    """Squared norm of the visible part of every block, by matrix and block."""
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
    """The part of A that affects the attention patterns (see the module)."""
    streams = model.streams(layer)
    seen = _seen(matrix, streams, last=layer == len(model.heads) - 1)
    visible = _centred(matrix, seen, streams, streams)
    for kept, moved in _twins(streams):
        hidden = torch.zeros_like(matrix)
        hidden[kept], hidden[moved] = 1, -1
        hidden = _centred(hidden, seen, streams, streams)
        if hidden[moved] != 0:
            visible = visible - visible[moved] / hidden[moved] * hidden
    return visible


def _centred(matrix: Matrix, seen: Matrix, rows: Streams, columns: Streams) -> Matrix:
    """Subtract row means; move means over the rows of a stream to the position rows."""
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
    """1 at entries of A that some query with at least two keys uses, 0 elsewhere."""
    seen = torch.ones_like(matrix)
    position_rows = seen[streams["position"]]
    for name, stream in streams.items():
        if name.endswith("position"):
            position_rows[:, stream] = position_rows[:, stream].tril()
    position_rows[: -1 if last else 1] = 0
    return seen


def _twins(streams: Streams) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of entries for position T - 1 of which only the sum affects the scores: (first, other).

    In a copied stream, the entry of position T - 1 is the product of the copying heads' attention
    from T - 1 to itself. So entries whose streams have the same heads, in any order, have the same
    factor.
    """
    first: dict[tuple[str, ...], tuple[int, int]] = {}
    ends = [(name, stream.stop - 1) for name, stream in streams.items() if "position" in name]
    for (query, row), (key, column) in product(ends, ends):
        heads = tuple(sorted((*query.split("/")[:-1], *key.split("/")[:-1])))
        kept = first.setdefault(heads, (row, column))
        if kept != (row, column):
            yield kept, (row, column)
