"""The closed form, the wired HookedTransformer and the formula itself are one function."""

import pytest
import torch
from torch import Tensor

from mechcausal.graphs import CausalGraph, chain, icl_pairs, random_tree
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.tasks import Batch, SingleParentTask, soft_cross_entropy
from mechcausal.tasks.priors import DirichletPrior, FixedTransition
from tests.oracles import forest, seeded

SIZES = [(2, 4), (3, 20), (10, 20), (10, 100)]


def random_model(vocab_size: int, length: int, seed: int = 0) -> SimplifiedTransformer:
    model, generator = SimplifiedTransformer(vocab_size, length), seeded(seed)
    with torch.no_grad():
        model.A1.copy_(torch.randn(length, length, generator=generator))
        model.A2.copy_(2 * torch.randn(vocab_size, vocab_size, generator=generator))
    return model


def random_batch(vocab_size: int, length: int, n_sequences: int = 64) -> Batch:
    task = SingleParentTask(chain(length - 1), DirichletPrior.symmetric(0.5, vocab_size))
    return task.sample(n_sequences, generator=seeded(1))


def blocks(model: SimplifiedTransformer) -> tuple[Tensor, Tensor]:
    """The gradients of A1 and A2 as they lie in the parameters."""
    s, t = model.vocab_size, model.sequence_length
    first, second = (model.parameters_by_name[name].grad for name in ("A1", "A2"))
    assert first is not None
    assert second is not None
    return first[0, s : s + t, :t].clone(), second[0, :s, :s].T.clone()


def formula(A1: Tensor, A2: Tensor, tokens: Tensor) -> Tensor:
    """`X^T softmax(softmax(causal_mask(A1)) X A2 x_query)` for one sequence, word for word."""
    length = len(tokens)
    X = torch.nn.functional.one_hot(tokens, len(A2)).to(A1.dtype)
    mask = torch.full((length, length), -torch.inf, dtype=A1.dtype).triu(1)
    return X.T @ torch.softmax(torch.softmax(A1 + mask, dim=1) @ X @ A2 @ X[-1], dim=0)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(("vocab_size", "length"), SIZES)
def test_closed_form_hooked_transformer_and_formula_are_one_function(
    vocab_size: int, length: int
) -> None:
    model, batch = random_model(vocab_size, length), random_batch(vocab_size, length)
    outputs, gradients = [], []
    for compute in (lambda x: model.hooked(x)[:, -1], model):
        model.hooked.zero_grad()
        output = compute(batch.tokens)
        soft_cross_entropy(output, batch.target, epsilon=1e-3).backward()
        outputs.append(output.detach())
        gradients.append(blocks(model))
    A1, A2 = (block.detach().double().requires_grad_() for block in (model.A1, model.A2))
    expected = torch.stack([formula(A1, A2, tokens) for tokens in batch.tokens])
    soft_cross_entropy(expected, batch.target.double(), epsilon=1e-3).backward()
    hooked, closed = outputs
    assert (hooked - closed).abs().max() < 1e-6
    assert (closed - expected).abs().max() < 1e-6
    torch.testing.assert_close(closed.sum(1), torch.ones(64))
    for wired, ours, exact in zip(*gradients, (A1.grad, A2.grad), strict=True):
        assert relative_error(ours, wired) < 1e-6
        assert relative_error(ours.double(), exact) < 2e-6


def test_the_formula_by_hand() -> None:
    """Two tokens, three positions, A1 one-hot: layer 2 compares the query with position 0."""
    model = SimplifiedTransformer(2, 3)
    with torch.no_grad():
        model.A1[1, 0] = model.A1[2, 0] = 100.0
        model.A2.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    # Copies of tokens (1, 0, 1): 1, 1, 1. All match the query with 3: uniform attention.
    torch.testing.assert_close(model(torch.tensor([[1, 0, 1]])), torch.tensor([[1 / 3, 2 / 3]]))
    with torch.no_grad():
        model.A1[1, 0], model.A1[1, 1] = 0.0, 100.0
    # Copies 1, 0, 1: matches 3, 0, 3.
    weight = torch.tensor([3.0, 0.0, 3.0]).softmax(0)
    expected = torch.tensor([[weight[1], weight[0] + weight[2]]])
    torch.testing.assert_close(model(torch.tensor([[1, 0, 1]])), expected)


def test_blocks_are_views_of_the_parameters() -> None:
    model = SimplifiedTransformer(3, 5)
    with torch.no_grad():
        model.A1[4, 2] = 7.0
        model.A2[0, 1] = 9.0  # copied token 0, query token 1
    assert model.hooked.blocks[0].attn.W_Q[0, 3 + 4, 2] == 7.0
    assert model.hooked.blocks[1].attn.W_Q[0, 1, 0] == 9.0
    with torch.no_grad():
        model.hooked.blocks[0].attn.W_Q[0, 3 + 1, 0] = 5.0
    assert model.A1[1, 0] == 5.0


def test_initialisation_is_that_of_algorithm_1() -> None:
    model = random_model(3, 5)
    model.initialise(beta0=0.5)
    assert torch.equal(model.A1, torch.zeros(5, 5))
    assert torch.equal(model.A2, 0.5 * torch.eye(3))
    expected = torch.ones(5, 5).tril() / torch.arange(1, 6).unsqueeze(1)
    torch.testing.assert_close(model.attention1(), expected)


@pytest.mark.parametrize("graph", [chain(19), icl_pairs(19), random_tree(19, generator=seeded(1))])
def test_the_ideal_solution_attends_to_parents(graph: CausalGraph) -> None:
    model = SimplifiedTransformer(10, 20)
    model.set_ideal(graph)
    attention = model.attention1()
    for parent, child in graph.edges:
        assert attention[child, parent] > 1 - 1e-6


def test_the_ideal_solution_predicts_what_follows_from_the_sequence() -> None:
    """Every token has one successor: nearly all that is to be known is read off the context."""
    rows = tuple(tuple(float(p) for p in row) for row in torch.eye(5).roll(1, dims=1).tolist())
    task = SingleParentTask(chain(19), FixedTransition(rows))
    batch = task.sample(500, generator=seeded(2))
    model = SimplifiedTransformer(5, 20)
    model.initialise(beta0=1.0)
    start = soft_cross_entropy(model(batch.tokens), batch.target, epsilon=1e-3).item()
    model.set_ideal(task.graph)
    assert start > 1.0
    assert soft_cross_entropy(model(batch.tokens), batch.target, epsilon=1e-3).item() < 0.1


def test_the_ideal_solution_finds_the_successors_of_the_query() -> None:
    model = SimplifiedTransformer(4, 7)
    model.set_ideal(forest(-1, 0, 1, -1, 1, 0))
    # Positions 2 and 4 have a parent that holds 1, and 1 and 5 one that holds 0.
    f = model(torch.tensor([[0, 1, 2, 3, 0, 3, 1]]))
    torch.testing.assert_close(f, torch.tensor([[0.5, 0.0, 0.5, 0.0]]))


def test_the_ideal_solution_refuses_a_graph_of_another_length() -> None:
    with pytest.raises(ValueError, match="sequences of 5 tokens, the model of 6"):
        SimplifiedTransformer(3, 6).set_ideal(chain(4))
