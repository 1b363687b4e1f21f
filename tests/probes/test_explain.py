"""Explanations: confirmed by a separate run, within the budget, minimal where promised."""

import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from mechcausal.models.adapter import HookedTransformer
from probes import ProbeError, explain
from probes.causal_discovery import Explanation
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
    position = -1 if node is None else node
    candidates = [p for p in range(7) if p != node]
    smallest = brute_minimum(model, tokens, position, candidates)
    for method in METHODS:
        options: dict[str, Any] = {"replacement": PAD, "method": method, "node": node}
        spy = Spy(model, position)
        result = explain(model, tokens, logits=spy, budget=400, **options)
        assert result == explain(model, tokens, budget=400, **options)
        assert result.method == method
        assert len(set(spy.seen)) == len(spy.seen) <= result.calls <= 400
        assert result.calls - len(spy.seen) == (method not in ("occlusion", "exhaustive"))
        if not result.found:
            assert (result.size, result.new_prediction, result.tokens) == (0, None, ())
            assert smallest == 0 or method in ("attention", "occlusion")
            continue
        changed = tokens.clone()
        changed[list(result.positions)] = PAD
        with torch.no_grad():
            before = int(model(tokens[None])[0, position].argmax())
            after = int(model(changed[None])[0, position].argmax())
        assert (result.prediction, result.new_prediction) == (before, after)
        assert before != after
        assert result.tokens == tuple(tokens[list(result.positions)].tolist())
        assert result.size >= smallest
        assert set(result.positions) <= set(candidates)
        if method == "exhaustive":
            assert result.size == smallest
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
    result = explain(model, random_tokens(1), replacement=PAD, logits=stubborn, **options)
    assert not result.found
    assert len(set(seen)) == len(seen) <= result.calls <= budget


def explain_chain(causes: set[int], length: int, **options: Any) -> Explanation:
    """Explain a prediction that changes only when all causes are PAD, a little with each.

    Every token depends on the one before with weight 0.8: A = (I - G)^-1, scaled by row.
    """

    def logits(tokens: Tensor) -> Tensor:
        gone = sum((tokens[:, p] == PAD).double() for p in causes)
        assert isinstance(gone, Tensor)
        flip = (gone == len(causes)).double()
        return torch.stack([1 - gone / 100 - 2 * flip, torch.zeros_like(gone)], 1)

    def attention(tokens: Tensor) -> Tensor:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        pattern = (0.8 ** distance.double()).tril()
        return (pattern / pattern.sum(-1, keepdim=True))[None]

    options = {"replacement": PAD, "node": length - 1, "n_eff": 1000, **options}
    tokens = torch.arange(1, length + 1)
    return explain(nn.Identity(), tokens, logits=logits, attention=attention, **options)


def test_the_search_goes_outwards_in_the_discovered_graph() -> None:
    calls = []
    for cause in (6, 5, 3, 0):
        result = explain_chain({cause}, 8, n_eff=1_000_000, batch_size=1, max_size=1)
        assert result.positions == (cause,)
        assert result.graphs[0].distances(7)[cause] == 7 - cause
        calls.append(result.calls)
    assert calls == [3, 4, 6, 9]


def test_a_budget_too_small_for_all_sets_still_gives_one_without_a_spare_token() -> None:
    causes = {2, 3, 5, 8, 11, 13}
    for method in ("causal", "random"):
        result = explain_chain(causes, 16, method=method, budget=120)
        assert set(result.positions) == causes
        assert result.calls <= 120
    assert not explain_chain(causes, 16, method="exhaustive", budget=120).found


def test_occlusion_takes_the_tokens_with_the_largest_effect() -> None:
    result = explain_chain({1, 4, 6}, 8, method="occlusion")
    assert result.positions == (1, 4, 6)
    assert result.calls <= 1 + 7 + 8


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


def test_tokens_that_the_replacement_leaves_alone_are_no_candidates() -> None:
    model = random_model(3)
    tokens = torch.tensor([5, PAD, 7, 9, PAD, 3])

    def one_less(tokens: Tensor, marked: Tensor) -> Tensor:
        return torch.where(marked & (tokens > 0), tokens - 1, tokens)

    for method in METHODS:
        for replacement in (PAD, one_less):
            spy = Spy(model, -1)
            options: dict[str, Any] = {"method": method, "logits": spy, "budget": 200}
            result = explain(model, tokens, replacement=replacement, **options)
            assert not {1, 4} & set(result.positions)
            assert len(set(spy.seen)) == len(spy.seen)
        for nothing in (torch.tensor([PAD, PAD, 4]), torch.tensor([4])):
            result = explain(model, nothing, replacement=PAD, node=-1, method=method)
            assert (result.found, result.calls) == (False, 1)


def test_a_bridge_is_explained(tmp_path: Path) -> None:
    save_gpt2(tmp_path, tokenizer=True)
    with warnings.catch_warnings(action="ignore"):
        model = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    tokens = torch.randint(1, VOCAB - 1, (6,), generator=torch.Generator().manual_seed(0))
    result = explain(model, tokens, replacement=PAD, n_eff=64)
    assert [graph.nodes for graph in result.graphs] == [tuple(range(7))] * 2
    if result.found:
        changed = tokens.clone()
        changed[list(result.positions)] = PAD
        with torch.no_grad():
            assert int(model(changed[None])[0, -1].argmax()) == result.new_prediction


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
    ({"positions": (0, 1)}, ValueError, "pass candidates="),
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
