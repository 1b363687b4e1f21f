"""The disentangled transformer: its two forms are the paper's definition, and names are places."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from mechcausal.graphs import CausalGraph, chain, icl_pairs, k_gram, random_tree, two_parents
from mechcausal.models.disentangled import DisentangledTransformer, stream_widths
from tests.oracles import seeded

SIZES: list[tuple[int, int, tuple[int, ...]]] = [
    (10, 20, (1, 1)),
    (5, 32, (2, 1)),
    (4, 12, (3, 1)),
    (2, 5, (2, 1, 2)),
    (3, 6, (3,)),
]


def random_model(
    vocab_size: int, length: int, heads: tuple[int, ...], seed: int = 0
) -> DisentangledTransformer:
    model = DisentangledTransformer(vocab_size, length, heads)
    model.initialise(scale=0.5, generator=seeded(seed))
    with torch.no_grad():
        model.W.copy_(torch.randn(model.W.shape, generator=seeded(seed + 1)))
    return model


def random_tokens(model: DisentangledTransformer, n: int = 16, seed: int = 5) -> Tensor:
    shape = (n, model.sequence_length)
    return torch.randint(model.vocab_size, shape, generator=seeded(seed))


def definition(tokens: Tensor, attention: list[Tensor], readout: Tensor, vocab_size: int) -> Tensor:
    """Logits of the last position, word for word: every head's attn(h; A) h beside h."""
    batch, length = tokens.shape
    positions = torch.eye(length, dtype=readout.dtype).expand(batch, -1, -1)
    h = torch.cat([one_hot(tokens, vocab_size).to(readout.dtype), positions], dim=2)
    mask = torch.full((length, length), -torch.inf, dtype=readout.dtype).triu(1)
    for heads in attention:
        h = torch.cat([h, *(torch.softmax(h @ A @ h.mT + mask, dim=2) @ h for A in heads)], dim=2)
    return h[:, -1] @ readout


def gradients(model: DisentangledTransformer) -> list[Tensor]:
    """The gradients as they lie in the parameters, idle heads and blocks included."""
    gradients = []
    for parameter in model.parameters_by_name.values():
        assert parameter.grad is not None
        gradients.append(parameter.grad.clone())
    model.hooked.zero_grad()
    return gradients


def loss(prediction: Tensor) -> Tensor:
    """A label of its own for each sequence, so that no gradient cancels by symmetry."""
    target = torch.rand(prediction.shape, generator=seeded(9)).to(prediction.dtype)
    return -(target * (prediction + 1e-3).log()).sum(1).mean()


def check_close(actual: Tensor, expected: Tensor, *, floor: float = 1e-8) -> None:
    """Equal to 1e-5 of the norm; the floor is for what all but cancels."""
    error = (actual.detach().double() - expected.detach().double()).norm()
    assert error < 1e-5 * expected.detach().double().norm() + floor


def check_both_forms(model: DisentangledTransformer, *, floor: float = 1e-8) -> None:
    tokens = random_tokens(model)
    outputs, slopes = [], []
    for compute in (lambda x: model.probabilities(model.hooked(x)), model):
        output = compute(tokens)
        loss(output).backward()
        outputs.append(output)
        slopes.append(gradients(model))
    check_close(outputs[1], outputs[0])
    for closed, wired in zip(slopes[1], slopes[0], strict=True):
        check_close(closed, wired, floor=floor)


def check_definition(model: DisentangledTransformer, *, floor: float = 1e-8) -> None:
    tokens = random_tokens(model)
    exact = [model.A(layer).detach().double().requires_grad_() for layer in range(len(model.heads))]
    readout = model.W.detach().double().requires_grad_()
    logits = definition(tokens, exact, readout, model.vocab_size)
    loss(logits.softmax(1)).backward()
    check_close(model.logits(tokens), logits, floor=1e-6 * float(readout.detach().norm()))
    prediction = model(tokens)
    check_close(prediction, logits.softmax(1))
    loss(prediction).backward()
    *of_attention, of_readout = gradients(model)
    check_close(of_readout, readout.grad, floor=floor)
    for layer, (weight, gradient) in enumerate(zip(exact, of_attention, strict=True)):
        width = model.widths[layer]
        used = gradient[: model.heads[layer], :width, :width]
        check_close(used, weight.grad, floor=floor)
        # Whatever is not A gets nothing: idle heads, and streams that come later.
        assert gradient.count_nonzero() == used.count_nonzero()


@pytest.mark.parametrize(("vocab_size", "length", "heads"), SIZES)
def test_closed_form_hooked_transformer_and_definition_are_one_function(
    vocab_size: int, length: int, heads: tuple[int, ...]
) -> None:
    model = random_model(vocab_size, length, heads)
    check_both_forms(model)
    check_definition(model)


@settings(max_examples=30)
@given(
    vocab_size=st.integers(2, 4),
    length=st.integers(1, 6),
    heads=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 1000),
)
def test_all_forms_agree_on_any_small_model(
    vocab_size: int, length: int, heads: tuple[int, ...], seed: int
) -> None:
    model = random_model(vocab_size, length, heads, seed)
    model.hooked.double()  # three layers multiply what float32 rounds, on each processor otherwise
    check_both_forms(model, floor=1e-6)
    check_definition(model, floor=1e-6)


def test_the_definition_by_hand() -> None:
    """One layer, two tokens, two positions: the query attends to tokens alike with weight e^2."""
    model = DisentangledTransformer(2, 2, heads=(1,))
    with torch.no_grad():
        model.block(0, 0, "token", "token").copy_(2 * torch.eye(2))
        model.readout("0.0/token").copy_(torch.eye(2))
    share = 1 / (1 + math.exp(-2))
    expected = torch.tensor([[0.0, 1.0], [1 - share, share]])
    torch.testing.assert_close(model.logits(torch.tensor([[1, 1], [0, 1]])), expected)


# --- Names ---


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (1, 2), (2, 1, 2), (3,)])
def test_streams_partition_the_width(heads: tuple[int, ...]) -> None:
    model = DisentangledTransformer(3, 5, heads)
    assert model.widths == stream_widths(3, 5, heads)
    for layer, width in enumerate(model.widths):
        places = list(model.streams(layer).values())
        covered = [i for columns in places for i in range(columns.start, columns.stop)]
        assert covered == list(range(width))
        assert all(columns.stop - columns.start in (3, 5) for columns in places)
    assert len(model.streams(len(heads))) == 2 * math.prod(n + 1 for n in heads)


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (2, 1, 2)])
def test_every_name_addresses_what_it_says(heads: tuple[int, ...]) -> None:
    """Heads that look at one earlier position each: names are paths through them."""
    model, length = DisentangledTransformer(4, 9, heads), 9
    steps = {}
    with torch.no_grad():
        for layer, n_heads in enumerate(heads):
            for head in range(n_heads):
                steps[f"{layer}.{head}"] = back = 1 + layer + 2 * head
                block = model.block(layer, head, "position", "position")
                for i in range(length):
                    block[i, max(0, i - back)] = 100.0
    tokens = random_tokens(model)
    _, cache = model.hooked.run_with_cache(tokens)
    for layer in range(len(heads) + 1):
        last = layer == len(heads)
        name = f"blocks.{layer - last}.hook_resid_{'post' if last else 'pre'}"
        for stream, columns in model.streams(layer).items():
            *path, kind = stream.split("/")
            seen = torch.arange(length)
            for reader in path:
                seen = (seen - steps[reader]).clamp(min=0)
            expected = one_hot(tokens[:, seen], 4) if kind == "token" else one_hot(seen, length)
            part = cache[name][..., columns]
            torch.testing.assert_close(part, expected.float().expand_as(part), msg=stream)
    # What the readout is given is what its names say.
    stream = list(model.streams(len(heads)))[-2]
    with torch.no_grad():
        model.readout(stream).copy_(torch.eye(4))
    seen_last = length - 1
    for reader in stream.split("/")[:-1]:
        seen_last = max(0, seen_last - steps[reader])
    torch.testing.assert_close(model.logits(tokens), one_hot(tokens[:, seen_last], 4).float())


def test_blocks_are_views_that_change_both_forms() -> None:
    model = random_model(3, 6, (2, 1))
    tokens = random_tokens(model)
    places: list[tuple[int, int, str, str]] = [
        (layer, head, query, key)
        for layer, head in ((0, 0), (0, 1), (1, 0))
        for query in list(model.streams(layer))[:3]
        for key in list(model.streams(layer))[-2:]
    ]
    before = model(tokens).detach()
    for block in places:
        with torch.no_grad():
            model.block(*block)[:, 0] += 1.0
        after = model(tokens).detach()
        hooked = model.probabilities(model.hooked(tokens))
        assert (after - before).abs().max() > 1e-5, block
        torch.testing.assert_close(after, hooked, atol=1e-6, rtol=1e-4)
        before = after
    for stream in model.streams(2):
        with torch.no_grad():
            model.readout(stream)[0, 0] += 1.0
        start = model.streams(2)[stream].start
        assert model.hooked.unembed.W_U[start, 0] == model.readout(stream)[0, 0]
    assert (
        model.hooked.blocks[0].attn.W_Q[1, 3 + 2, 3 + 1]
        == model.block(0, 1, "position", "position")[2, 1]
    )


def test_a_name_that_a_layer_does_not_read_is_refused() -> None:
    model = DisentangledTransformer(3, 4, (2, 1))
    for layer, name in ((0, "0.0/token"), (1, "0.2/token"), (1, "1.0/token"), (0, "tokens")):
        with pytest.raises(KeyError):
            model.block(layer, 0, name, "token")
    with pytest.raises(KeyError):
        model.readout("2.0/token")


@pytest.mark.parametrize("heads", [(), (0,), (1, 0), (-1, 1)])
def test_layers_without_heads_are_refused(heads: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="every layer needs at least one head"):
        DisentangledTransformer(3, 4, heads)


# --- Training ---


def test_the_start_is_a_scaled_normal_draw_that_the_generator_repeats() -> None:
    model, again = (DisentangledTransformer(6, 20, (2, 1)) for _ in range(2))
    with torch.no_grad():
        model.W.fill_(1.0)
    state = torch.get_rng_state()
    model.initialise(scale=0.1, generator=seeded(3))
    again.initialise(scale=0.2, generator=seeded(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.W.any()
    for layer in range(2):
        values = model.A(layer).detach().flatten() / 0.1
        assert abs(float(values.mean())) < 4 / len(values) ** 0.5
        assert abs(float(values.var()) - 1) < 4 * (2 / len(values)) ** 0.5
        torch.testing.assert_close(again.A(layer), 2 * model.A(layer))
    assert not torch.equal(model.A(0)[0], model.A(0)[1])
    assert not model.hooked.blocks[1].attn.W_Q[1].any()
    first = model.A(0).detach().clone()
    model.initialise(scale=0.1, generator=seeded(4))
    assert not torch.equal(model.A(0), first)
    model.initialise()
    assert not any(p.any() for p in model.parameters_by_name.values())
    with pytest.raises(ValueError, match="needs a generator"):
        model.initialise(scale=0.1)


def test_predictions_are_uniform_at_the_start() -> None:
    model = DisentangledTransformer(4, 6, (2, 1))
    model.initialise(scale=1.0, generator=seeded())
    torch.testing.assert_close(model(random_tokens(model)), torch.full((16, 4), 0.25))


# --- The hand-built solution ---


def followers(graph: CausalGraph, tokens: list[int]) -> list[int]:
    """Tokens that followed the query's context, position by position."""
    if graph.query_parents is None:
        context, last = [tokens[-1]], graph.n_positions
    else:  # the last row copies the query's parents: it is no example
        context, last = [tokens[p] for p in graph.query_parents], graph.n_positions - 1
    return [
        tokens[child]
        for child, parents in enumerate(graph.parents[:last])
        if parents and [tokens[parent] for parent in parents] == context
    ]


@pytest.mark.parametrize(
    ("graph", "heads"),
    [
        (chain(14), (1, 1)),
        (icl_pairs(14), (2, 1)),
        (random_tree(14, generator=seeded(2)), (1, 1)),
        (two_parents(15), (2, 1)),
        (k_gram(15, 2), (2, 1)),
        (k_gram(15, 3), (3, 1)),
    ],
    ids=["chain", "icl", "tree", "two_parents", "trigrams", "fourgrams"],
)
def test_the_ideal_solution_predicts_the_frequencies_of_its_context(
    graph: CausalGraph, heads: tuple[int, ...]
) -> None:
    """At a large beta the logits are gain times what followed the context, as shares."""
    model = DisentangledTransformer(3, 15, heads)
    model.set_ideal(graph, beta=400.0, gain=2.0)
    tokens = random_tokens(model, n=400)
    checked = 0
    for sequence, logits in zip(tokens.tolist(), model.logits(tokens).detach() / 2, strict=True):
        following = followers(graph, sequence)
        # Rows of roots see averages of what came before, which match where all of it is alike.
        single = graph.query_parents is None
        copies = {sequence[-1]} if single else {sequence[p] for p in graph.query_parents or ()}
        if not following or (sequence[0] in copies if single else len(copies) == 1):
            continue
        share = torch.tensor([following.count(token) / len(following) for token in range(3)])
        torch.testing.assert_close(logits, share, atol=1e-3, rtol=0.0)
        checked += 1
    assert checked > 50


@pytest.mark.parametrize("beta", [5.0, 40.0, 400.0])
def test_the_querys_own_row_is_no_example_in_the_ideal_solution(beta: float) -> None:
    model = DisentangledTransformer(3, 6, (2, 1))
    model.set_ideal(k_gram(6, 2), beta=beta, gain=1.0)
    # Its context (1, 2) is new, and the last position alone holds a 2: its share is its attention.
    shares = model.logits(torch.tensor([[0, 0, 0, 0, 1, 2]])).detach()[0]
    assert shares[2] < 1e-6
    assert shares[:2].sum() == pytest.approx(1.0)


def test_the_ideal_solution_is_the_same_in_the_hooked_transformer() -> None:
    model = DisentangledTransformer(3, 8, (2, 1))
    model.set_ideal(two_parents(8))
    tokens = random_tokens(model)
    hooked = model.probabilities(model.hooked(tokens))
    torch.testing.assert_close(model(tokens), hooked, atol=1e-6, rtol=1e-5)
    pattern = model.layer1_attention(tokens)
    assert pattern.shape == (16, 2, 8, 8)
    for head in range(2):
        for child, parents in enumerate(two_parents(8).parents[:-1]):
            if len(parents) == 2:
                assert pattern[:, head, child, parents[head]].min() > 1 - 1e-6
        assert pattern[:, head, -1, (two_parents(8).query_parents or ())[head]].min() > 1 - 1e-6


@pytest.mark.parametrize(
    ("graph", "heads", "part"),
    [
        (chain(5), (1, 1, 1), "needs 2 layers"),
        (chain(5), (1,), "needs 2 layers"),
        (two_parents(6), (1, 2), "2 heads in the first"),
        (k_gram(6, 3), (2, 1), "3 heads in the first"),
        (chain(6), (1, 1), "sequences of 7 tokens, the model of 6"),
        (two_parents(5), (2, 1), "sequences of 5 tokens, the model of 6"),
    ],
)
def test_the_ideal_solution_of_another_size_is_refused(
    graph: CausalGraph, heads: tuple[int, ...], part: str
) -> None:
    with pytest.raises(ValueError, match=part):
        DisentangledTransformer(3, 6, heads).set_ideal(graph)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_both_forms_agree_on_cuda(tmp_path: Path) -> None:
    model = DisentangledTransformer(3, 8, (2, 1), device="cuda")
    model.initialise(scale=0.5, generator=seeded())
    model.set_ideal(two_parents(8))
    tokens = torch.randint(3, (16, 8), generator=seeded()).cuda()
    hooked = model.probabilities(model.hooked(tokens))
    torch.testing.assert_close(model(tokens), hooked, atol=1e-5, rtol=1e-4)
    model.save(tmp_path)
    assert DisentangledTransformer.load(tmp_path).W.device.type == "cpu"
