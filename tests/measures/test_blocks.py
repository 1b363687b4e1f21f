"""Shares of blocks on the paper's solution, by loops, and under what no prediction can show."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechcausal.graphs import CausalGraph, chain, icl_pairs, k_gram, two_parents
from mechcausal.measures import blocks
from mechcausal.measures.blocks import block_effects, block_shares, solution_blocks, solution_share
from mechcausal.models.disentangled import DisentangledTransformer
from tests.oracles import seeded


def random_model(
    heads: tuple[int, ...] = (2, 1), *, seed: int = 0, vocab_size: int = 3, length: int = 5
) -> DisentangledTransformer:
    model = DisentangledTransformer(vocab_size, length, heads)
    model.initialise(scale=1.0, generator=seeded(seed))
    with torch.no_grad():
        model.W.copy_(torch.randn(model.W.shape, generator=seeded(seed + 1)))
    return model


@pytest.mark.parametrize("graph", [chain(5), icl_pairs(5)])
def test_the_single_parent_solution_lies_in_three_blocks(graph: CausalGraph) -> None:
    model = DisentangledTransformer(vocab_size=3, sequence_length=6)
    model.set_ideal(graph)
    shares = block_shares(model)
    held = {"A1.0/position:position", "A2.0/token:0.0/token", "W/1.0/token"}
    assert {f"blocks/{name}" for name in held} == set(solution_blocks(model, graph))
    for name, share in shares.items():
        assert share == pytest.approx(float(name.removeprefix("blocks/") in held), abs=1e-12)
    assert solution_share(model, graph) == pytest.approx(1.0)


@pytest.mark.parametrize(("graph", "n_heads"), [(two_parents(7), 2), (k_gram(7, 3), 3)])
def test_the_solution_of_several_parents_lies_in_its_blocks(
    graph: CausalGraph, n_heads: int
) -> None:
    model = DisentangledTransformer(vocab_size=3, sequence_length=7, heads=(n_heads, 1))
    model.set_ideal(graph)
    assert solution_share(model, graph) == pytest.approx(1.0)
    shares = block_shares(model)
    for head in range(n_heads):
        assert shares[f"blocks/A1.{head}/position:position"] == pytest.approx(1.0)
        assert shares[f"blocks/A2.0/0.{head}/token:0.{head}/token"] > 0.01
    assert len(solution_blocks(model, graph)) == n_heads + (n_heads**2 + 1) + 1


def hidden_and_conditions(
    model: DisentangledTransformer, layer: int
) -> tuple[list[Tensor], list[Tensor]]:
    """By loops: changes of A that nothing shows, and what is 0 once they are taken away."""
    streams, length = model.streams(layer), model.sequence_length
    width, last = model.widths[layer], layer == len(model.heads) - 1
    names = list(streams)
    indices = {name: range(stream.start, stream.stop) for name, stream in streams.items()}
    hidden, conditions = [], []

    def entries(*cells: tuple[int, int, float]) -> Tensor:
        matrix = torch.zeros(width, width, dtype=torch.float64)
        for row, column, value in cells:
            matrix[row, column] += value
        return matrix

    def met(row: int, key: str) -> list[int]:
        """Columns of a stream that a row may meet."""
        if row not in indices["position"]:
            return list(indices[key])
        position = row - indices["position"][0]
        if position < (length - 1 if last else 1):
            return []
        return [c for n, c in enumerate(indices[key]) if "position" not in key or n <= position]

    for row in range(width):
        for key in names:
            columns = met(row, key)
            hidden += [entries((row, c, 1.0)) for c in indices[key] if c not in columns]
            conditions += [entries((row, c, 1.0)) for c in indices[key] if c not in columns]
            if columns:
                hidden.append(entries(*((row, c, 1.0) for c in columns)))
                conditions.append(entries(*((row, c, 1.0) for c in columns)))
    for query in names:
        if query != "position":
            for column in range(width):
                ours = [(row, column, 1.0) for row in indices[query]]
                theirs = [(row, column, -1.0) for row in indices["position"]]
                hidden.append(entries(*ours, *theirs))
                conditions.append(entries(*ours))
    copies = [name for name in names if "position" in name]
    for earlier, later in itertools.combinations(copies, 2):
        if len(model.heads) == 2:  # deeper models hold more of these
            a, b = indices[earlier][-1], indices[later][-1]
            hidden.append(entries((a, b, 1.0), (b, a, -1.0)))
            conditions.append(entries((b, a, 1.0)))
    return hidden, conditions


def flat(matrices: list[Tensor]) -> Tensor:
    return torch.stack(matrices).flatten(1)


@pytest.mark.parametrize("heads", [(1,), (1, 1), (2, 1)])
def test_shares_are_those_of_the_weights_without_what_is_hidden(heads: tuple[int, ...]) -> None:
    """By solving for the hidden change that meets the conditions."""
    model = random_model(heads)
    shares = block_shares(model)
    for layer, n_heads in enumerate(heads):
        hidden, conditions = map(flat, hidden_and_conditions(model, layer))
        for head in range(n_heads):
            matrix = model.A(layer)[head].detach().double()
            system, value = conditions @ hidden.T, conditions @ matrix.flatten()
            change = torch.linalg.lstsq(system, value, driver="gelsd").solution @ hidden
            assert (conditions @ (matrix.flatten() - change)).abs().max() < 1e-9
            square = (matrix - change.view_as(matrix)).square()
            for query, rows in model.streams(layer).items():
                for key, columns in model.streams(layer).items():
                    share = float(square[rows, columns].sum() / square.sum())
                    drawn_share = shares.pop(f"blocks/A{layer + 1}.{head}/{query}:{key}")
                    assert drawn_share == pytest.approx(share, abs=1e-9)
    readout = model.W.detach().double().clone()
    streams = model.streams(len(heads))
    assert set(shares) == {f"blocks/W/{stream}" for stream in streams}
    assert sum(shares.values()) == pytest.approx(1.0)
    bias = sum(readout[rows].mean(0) for name, rows in streams.items() if name != "position")
    bias = bias + readout[streams["position"]][-1]  # of the last position
    for name, rows in streams.items():
        readout[rows] -= readout[rows].mean(0)
        if name == "position":
            readout[rows] = torch.stack([torch.zeros_like(bias)] * 4 + [bias])
    readout -= readout.mean(1, keepdim=True)
    for name, rows in streams.items():
        share = float(readout[rows].square().sum() / readout.square().sum())
        assert shares[f"blocks/W/{name}"] == pytest.approx(share, abs=1e-9)


def all_scores(model: DisentangledTransformer, layer: int) -> Tensor:
    """What maps a change of A to that of every score, less its mean over keys: by every sequence.

    The model's formula in float64, without the model.
    """
    size, length = model.vocab_size, model.sequence_length
    sequences = torch.tensor(list(itertools.product(range(size), repeat=length)))
    one_hot = torch.nn.functional.one_hot(sequences, size).double()
    stream = torch.cat([one_hot, torch.eye(length).double().expand(len(one_hot), -1, -1)], -1)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for earlier in range(layer):
        scores = stream.unsqueeze(1) @ model.A(earlier).detach().double() @ stream.unsqueeze(1).mT
        patterns = scores.masked_fill(future, -math.inf).softmax(-1)
        stream = torch.cat([stream, *(pattern @ stream for pattern in patterns.unbind(1))], -1)
    last, rows = layer == len(model.heads) - 1, []
    for query in range(length - 1 if last else 0, length):
        keys = stream[:, : query + 1] - stream[:, : query + 1].mean(1, keepdim=True)
        rows.append(torch.einsum("bq,bik->biqk", stream[:, query], keys).flatten(2).flatten(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("heads", [(1,), (1, 1), (2, 1)])
def test_everything_that_is_hidden_is_taken_away_and_nothing_else(heads: tuple[int, ...]) -> None:
    model = DisentangledTransformer(vocab_size=3, sequence_length=4, heads=heads)
    model.initialise(scale=1.5, generator=seeded(1))
    for layer, width in enumerate(model.widths[:-1]):
        scores = all_scores(model, layer)
        unit = torch.eye(width**2, dtype=torch.float64).view(-1, width, width)
        kept = flat([blocks._visible(entry, model, layer) for entry in unit]).T
        assert (scores @ kept - scores).abs().max() < 1e-12
        rank = int(torch.linalg.matrix_rank(scores, rtol=1e-9))
        assert int(torch.linalg.matrix_rank(kept)) == rank


def change_unseen(model: DisentangledTransformer, generator: torch.Generator) -> None:
    """Add what the module says no prediction can show, to every block."""

    def noise(*shape: int) -> Tensor:
        return 3 * torch.randn(*shape, generator=generator)

    last = len(model.heads) - 1
    with torch.no_grad():
        for layer, n_heads in enumerate(model.heads):
            streams = model.streams(layer)
            for head in range(n_heads):
                matrix = model.A(layer)[head]
                for query, rows in streams.items():
                    for key in streams:
                        block = model.block(layer, head, query, key)
                        block += noise(block.shape[0], 1)
                        if query == "position":
                            block[: -1 if layer == last else 1] += noise(1, block.shape[1])
                            if key.endswith("position"):
                                block += noise(*block.shape).triu(1)
                    shift = noise(1, matrix.shape[1])
                    matrix[rows] += shift
                    matrix[streams["token"]] -= shift
                copies = [stream.stop - 1 for name, stream in streams.items() if "position" in name]
                for a, b in itertools.combinations(copies, 2):
                    (turn,) = noise(1)
                    matrix[a, b] += turn
                    matrix[b, a] -= turn
        model.W.add_(noise(model.W.shape[0], 1))
        for rows in model.streams(len(model.heads)).values():
            shift = noise(1, model.vocab_size)
            model.W[rows] += shift
            model.W[: model.vocab_size] -= shift
        model.readout("position")[:-1] += noise(model.sequence_length - 1, model.vocab_size)


@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from([(1,), (1, 1), (2, 1), (1, 2), (1, 2, 1), (2, 2)]),
    vocab_size=st.integers(2, 4),
    length=st.integers(2, 6),
    seed=st.integers(0, 1000),
)
def test_weights_that_compute_the_same_have_the_same_shares(
    heads: tuple[int, ...], vocab_size: int, length: int, seed: int
) -> None:
    model = random_model(heads, seed=seed, vocab_size=vocab_size, length=length)
    tokens = torch.randint(vocab_size, (16, length), generator=seeded(3))
    before, prediction = block_shares(model), model(tokens).detach()
    change_unseen(model, seeded(seed + 9))
    torch.testing.assert_close(model(tokens), prediction, atol=1e-3, rtol=0.0)
    assert block_shares(model) == pytest.approx(before, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("graph", [chain(5), icl_pairs(5), two_parents(6)])
def test_a_shift_between_streams_leaves_the_solution_the_solution(graph: CausalGraph) -> None:
    model = DisentangledTransformer(vocab_size=3, sequence_length=6, heads=(2, 1))
    model.set_ideal(graph)
    tokens = torch.randint(3, (64, 6), generator=seeded(3))
    prediction = model(tokens).detach()
    with torch.no_grad():
        for layer in (0, 1):
            shift = 20 * torch.randn(model.widths[layer], generator=seeded(layer))
            model.A(layer)[0, model.streams(layer)["token"]] += shift
            model.A(layer)[0, model.streams(layer)["position"]] -= shift
        shift = 20 * torch.randn(3, generator=seeded(2))
        model.readout("1.0/position").add_(shift)
        model.readout("0.1/token").sub_(shift)
    torch.testing.assert_close(model(tokens), prediction, atol=1e-4, rtol=0.0)
    assert solution_share(model, graph) == pytest.approx(1.0, abs=1e-6)


def test_gradient_descent_from_zero_needs_no_centring() -> None:
    model = DisentangledTransformer(vocab_size=3, sequence_length=5)
    optimizer = torch.optim.SGD(model.parameters_by_name.values(), lr=1.0)
    for seed in range(20):
        tokens = torch.randint(3, (64, 5), generator=seeded(seed))
        optimizer.zero_grad()
        torch.nn.functional.nll_loss(model(tokens).log(), tokens[:, 2]).backward()
        optimizer.step()
    for layer in range(2):
        for key in model.streams(layer).values():
            assert model.A(layer)[..., key].sum(-1).abs().max() < 1e-5
    assert model.A(0).abs().max() > 1e-3
    assert model.W.sum(-1).abs().max() < 1e-5


def test_shares_of_a_zero_matrix_are_not_a_number() -> None:
    model = random_model((1, 1))
    with torch.no_grad():
        model.W.zero_()
    shares = block_shares(model)
    assert {math.isnan(v) for name, v in shares.items() if "/W/" in name} == {True}
    assert not any(math.isnan(v) for name, v in shares.items() if "/A" in name)
    assert math.isnan(solution_share(model, chain(4)))


def test_a_head_at_rest_does_not_hide_the_solution() -> None:
    model = DisentangledTransformer(vocab_size=3, sequence_length=6, heads=(2, 1))
    model.set_ideal(chain(5))
    assert math.isnan(block_shares(model)["blocks/A1.1/position:position"])
    assert solution_share(model, chain(5)) == pytest.approx(1.0)


def test_the_solution_needs_two_layers() -> None:
    with pytest.raises(ValueError, match=r"heads is \[1, 1, 1\]: .* 2 layers, not 3"):
        solution_share(random_model((1, 1, 1)), chain(4))


def test_block_effects_leave_the_model_as_it_was_and_survive_errors() -> None:
    model = DisentangledTransformer(3, 6, (2, 1))
    model.initialise(scale=0.5, generator=seeded())
    with torch.no_grad():
        model.W.normal_(generator=seeded(1))
    before = {name: value.clone() for name, value in model.parameters_by_name.items()}
    tokens = torch.randint(3, (50, 6), generator=seeded(2))

    def loss() -> float:
        return -model(tokens)[:, 0].log().mean().item()

    loss_before = loss()
    effects = block_effects(model, loss)
    assert set(effects) == set(block_shares(model))
    for name, value in model.parameters_by_name.items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        model.block(1, 0, "token", "0.1/token").zero_()
    assert loss() - loss_before == pytest.approx(effects["blocks/A2.0/token:0.1/token"], abs=1e-7)

    def fails() -> float:
        if calls:
            raise RuntimeError("no loss")
        calls.append(1)
        return 0.0

    calls: list[int] = []
    before = {name: value.clone() for name, value in model.parameters_by_name.items()}
    with pytest.raises(RuntimeError, match="no loss"):
        block_effects(model, fails)
    for name, value in model.parameters_by_name.items():
        assert torch.equal(value, before[name])
