"""Explanations: true by a run of their own, within the budget, minimal where they claim to be."""

import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from probes import ProbeError, explain
from probes.causal_discovery.explanation import METHODS
from probes.causal_discovery.explanation_search import by_size, outwards, shuffled
from tests.hugging_face import VOCAB, save_gpt2

PAD = 0


def random_model(seed: int, direction: str = "causal", **sizes: Any) -> HookedTransformer:
    config = {
        "n_layers": 2,
        "n_heads": 2,
        "d_model": 16,
        "d_head": 8,
        "n_ctx": 10,
        "d_vocab": 12,
        "attn_only": True,
        "device": "cpu",
        "seed": seed,
        "init_mode": "gpt2",
        "initializer_range": 0.6,
        "attention_dir": direction,
    }
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return HookedTransformer({**config, **sizes}).train()


def random_tokens(seed: int, length: int = 7) -> Tensor:
    return torch.randint(1, 12, (length,), generator=torch.Generator().manual_seed(seed))


class Spy:
    """Logits of one position, and every sequence that was run."""

    def __init__(self, model: nn.Module, node: int) -> None:
        self.model, self.node = model, node
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        self.seen += [tuple(row) for row in tokens.tolist()]
        output: Tensor = self.model(tokens)
        return output[:, self.node]


def brute_minimum(model: nn.Module, tokens: Tensor, node: int, candidates: list[int]) -> int:
    """The size of the smallest set that changes the prediction, 0 if none does; one run a set."""
    with torch.no_grad():
        before = int(model(tokens[None])[0, node].argmax())
        for size in range(1, len(candidates) + 1):
            for chosen in combinations(candidates, size):
                changed = tokens.clone()
                changed[list(chosen)] = PAD
                if int(model(changed[None])[0, node].argmax()) != before:
                    return size
    return 0


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("seed", range(4))
def test_every_set_changes_the_prediction_when_recomputed(seed: int, direction: str) -> None:
    model = random_model(seed, direction)
    tokens = random_tokens(seed)
    node = None if direction == "causal" else 2
    place = -1 if node is None else node
    candidates = [p for p in range(7) if p != node]
    smallest = brute_minimum(model, tokens, place, candidates)
    for method in METHODS:
        spy = Spy(model, place)
        found = explain(
            model, tokens, replacement=PAD, method=method, node=node, logits=spy, budget=400
        )
        assert found.method == method
        assert len(set(spy.seen)) == len(spy.seen) <= found.calls <= 400
        assert found.calls - len(spy.seen) == (method not in ("occlusion", "exhaustive"))
        if not found.found:
            assert (found.size, found.new_prediction, found.tokens) == (0, None, ())
            assert smallest == 0 or method in ("attention", "occlusion")
            continue
        changed = tokens.clone()
        changed[list(found.positions)] = PAD
        with torch.no_grad():
            before = int(model(tokens[None])[0, place].argmax())
            after = int(model(changed[None])[0, place].argmax())
        assert (found.prediction, found.new_prediction) == (before, after)
        assert before != after
        assert found.tokens == tuple(tokens[list(found.positions)].tolist())
        assert found.size >= smallest
        assert set(found.positions) <= set(candidates)
        if method == "exhaustive":
            assert found.size == smallest
    assert model.training
    assert not any(point._forward_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("budget", [3, 4, 7, 20, 61])
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("method", METHODS)
def test_the_budget_holds_where_nothing_changes_the_prediction(
    budget: int, batch_size: int, method: Any
) -> None:
    model = random_model(0)
    seen: list[tuple[int, ...]] = []

    def stubborn(tokens: Tensor) -> Tensor:
        seen.extend(map(tuple, tokens.tolist()))
        return torch.tensor([[0.0, 1.0]]).expand(len(tokens), -1)

    options: dict[str, Any] = {"budget": budget, "batch_size": batch_size, "method": method}
    found = explain(model, random_tokens(1), replacement=PAD, logits=stubborn, **options)
    assert not found.found
    assert len(set(seen)) == len(seen) <= found.calls <= budget


def needs(positions: set[int], length: int) -> Any:
    """Logits that change only when all of these positions are PAD, a little with each."""

    def logits(tokens: Tensor) -> Tensor:
        gone = sum((tokens[:, p] == PAD).double() for p in positions)
        assert isinstance(gone, Tensor)
        flip = (gone == len(positions)).double()
        return torch.stack([1 - gone / 100 - 2 * flip, torch.zeros_like(gone)], 1)

    return logits


def chain_attention(length: int) -> Any:
    """Every token depends on the one before, with weight 0.8: A = (I - G)^-1 scaled by row."""

    def attention(tokens: Tensor) -> Tensor:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        pattern = (0.8 ** distance.double()).tril()
        return (pattern / pattern.sum(-1, keepdim=True))[None]

    return attention


def test_the_search_goes_outwards_in_the_discovered_graph() -> None:
    length = 8
    common: dict[str, Any] = {"replacement": PAD, "node": 7, "n_eff": 1_000_000, "batch_size": 1}
    calls = []
    for cause in (6, 5, 3, 0):
        found = explain(
            nn.Identity(),
            torch.arange(1, 9),
            logits=needs({cause}, length),
            attention=chain_attention(length),
            max_size=1,
            **common,
        )
        assert found.positions == (cause,)
        assert found.graphs[0].distances(7)[cause] == 7 - cause
        calls.append(found.calls)
    assert calls == [3, 4, 6, 9]


def test_a_budget_too_small_for_all_sets_still_finds_one_without_a_spare_token() -> None:
    length, causes = 16, {2, 3, 5, 8, 11, 13}
    options: dict[str, Any] = {"replacement": PAD, "node": 15, "n_eff": 1000}
    for method in ("causal", "random"):
        found = explain(
            nn.Identity(),
            torch.arange(1, 17),
            logits=needs(causes, length),
            attention=chain_attention(length),
            method=method,
            budget=120,
            **options,
        )
        assert set(found.positions) == causes
        assert found.calls <= 120
    exhaustive = explain(
        nn.Identity(),
        torch.arange(1, 17),
        logits=needs(causes, length),
        attention=chain_attention(length),
        method="exhaustive",
        budget=120,
        **options,
    )
    assert not exhaustive.found


def test_occlusion_takes_the_tokens_with_the_largest_effect() -> None:
    found = explain(
        nn.Identity(),
        torch.arange(1, 9),
        replacement=PAD,
        node=7,
        method="occlusion",
        logits=needs({1, 4, 6}, 8),
        attention=chain_attention(8),
    )
    assert found.positions == (1, 4, 6)
    assert found.calls <= 1 + 7 + 8


def test_sets_go_outwards_each_once() -> None:
    rings = [[4, 1], [0], [2, 3, 5]]
    sets = list(outwards(rings, 6))
    assert len(sets) == len({frozenset(chosen) for chosen in sets}) == 2**6 - 1
    ring = {p: i for i, members in enumerate(rings) for p in members}
    costs = [len(chosen) + max(ring[p] for p in chosen) for chosen in sets]
    assert costs == sorted(costs)
    assert {frozenset(s) for s in outwards(rings, 2)} == {
        frozenset(s) for s in by_size(range(6), 2)
    }
    assert [len(r) for r in shuffled(rings, torch.Generator().manual_seed(0))] == [2, 1, 3]


def test_a_replacement_may_be_a_function_and_what_it_leaves_is_no_candidate() -> None:
    model = random_model(3)
    tokens = torch.tensor([5, PAD, 7, 9, PAD, 3])

    def one_less(tokens: Tensor, marked: Tensor) -> Tensor:
        return torch.where(marked & (tokens > 0), tokens - 1, tokens)

    for method in METHODS:
        spy = Spy(model, -1)
        options: dict[str, Any] = {"method": method, "logits": spy, "budget": 200}
        found = explain(model, tokens, replacement=one_less, **options)
        assert not {1, 4} & set(found.positions)
        assert len(set(spy.seen)) == len(spy.seen)
        padded = explain(model, tokens, replacement=PAD, method=method)
        assert not {1, 4} & set(padded.positions)


def test_without_anything_to_replace_nothing_is_found() -> None:
    model = random_model(0, "bidirectional")
    for tokens in (torch.tensor([PAD, PAD, 4]), torch.tensor([4])):
        for method in METHODS:
            found = explain(model, tokens, replacement=PAD, node=-1, method=method)
            assert (found.found, found.calls) == (False, 1)


def test_the_same_seed_gives_the_same_explanation() -> None:
    model, tokens = random_model(5), random_tokens(5)
    for method in METHODS:
        runs = [
            explain(
                model,
                tokens,
                replacement=PAD,
                method=method,
                generator=torch.Generator().manual_seed(3),
            )
            for _ in range(2)
        ]
        assert runs[0] == runs[1]


def test_a_bridge_is_explained_as_its_hooked_transformer(tmp_path: Path) -> None:
    save_gpt2(tmp_path, tokenizer=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    tokens = torch.randint(1, VOCAB - 1, (6,), generator=torch.Generator().manual_seed(0))
    found = explain(model, tokens, replacement=PAD, n_eff=64)
    assert [graph.nodes for graph in found.graphs] == [tuple(range(7))] * 2
    if found.found:
        changed = tokens.clone()
        changed[list(found.positions)] = PAD
        with torch.no_grad():
            assert int(model(changed[None])[0, -1].argmax()) == found.new_prediction


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"budget": 2}, ValueError, "budget is 2; at least 3"),
    ({"max_size": 0}, ValueError, "max_size is 0"),
    ({"batch_size": 0}, ValueError, "batch_size is 0"),
    ({"replacement": 12}, ValueError, "replacement is 12; tokens run from 0 to 11"),
    ({"replacement": -1}, ValueError, "replacement is -1"),
    ({"node": 7}, ValueError, "node is 7; the sequence has positions 0 to 6"),
    ({"candidates": [7]}, ValueError, "candidate 7"),
    ({"node": 3, "candidates": [3]}, ValueError, "candidate 3"),
    ({"layer": 2}, ProbeError, "layer 2 does not exist"),
    ({"heads": [2]}, ProbeError, "heads 0 to 1"),
    ({"heads": []}, ProbeError, "heads 0 to 1"),
    ({"n_eff": 3}, ValueError, "n_eff is 3"),
    ({"n_eff": float("nan")}, ValueError, "n_eff is nan"),
    ({"alpha": 0.0}, ValueError, "alpha is 0"),
    ({"tokens": torch.zeros(0, dtype=torch.int64)}, ValueError, "at least one"),
    ({"tokens": torch.tensor([3, 12])}, ProbeError, "vocabulary from 0 to 11"),
    ({"tokens": torch.ones(11, dtype=torch.int64)}, ProbeError, "context of 10"),
    ({"tokens": torch.ones(10, dtype=torch.int64)}, ProbeError, "context of 10"),
    ({"logits": lambda t: torch.zeros(len(t), 1)}, ProbeError, "at least two classes"),
    ({"logits": lambda t: torch.full((len(t), 2), torch.nan)}, ProbeError, "NaN"),
    ({"replacement": lambda t, m: t[:, 1:]}, ProbeError, "replacement returns shape"),
    ({"attention": lambda t: torch.eye(3)[None]}, ProbeError, "attention has shape"),
    ({"attention": lambda t: torch.zeros(1, 8, 8)}, ValueError, "sums to 0"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_input_is_refused(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = random_model(0)
    options = {"tokens": torch.arange(1, 8), "replacement": PAD, **changes}
    tokens = options.pop("tokens")
    with pytest.raises(kind, match=message.replace("(", r"\(")):
        explain(model, tokens, **options)
