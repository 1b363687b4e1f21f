"""Function-vector heads of wired models, and every number against a loop."""

import json
from typing import Any

import pytest
import torch

from probes import FewShotTask, ProbeError, function_vectors
from probes.heads.few_shot import draw_prompts, random_mappings
from probes.reading.passes import batch_rows
from tests.probes.families import tiny
from tests.probes.wired import planted
from tests.probes.wired_tasks import N, wired_tasks

Build = Any


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= 10 else []) for n in range(50)]
)
def test_the_wired_head_is_named_and_no_other(seed: int):
    wired = wired_tasks(seed)
    vectors = function_vectors(wired.model, wired.tasks, n_shots=4, n_prompts=8)
    assert vectors.heads() == [wired.vector]
    assert vectors.does_tasks
    assert vectors.right > 0.9
    assert vectors.row(wired.vector)["own"] > 0.4
    for decoy in wired.decoys:
        assert abs(vectors.row(decoy)["effect"]) < 0.1


def test_induction_heads_solve_random_mappings_and_are_no_function_vector_heads():
    wiring = planted(0, n_layers=3, n_heads=4)
    vectors = function_vectors(wiring.model, n_shots=4, n_prompts=8)
    assert vectors.right > 0.5 > vectors.shuffled  # it copies the answer that it is shown
    assert vectors.heads() == []
    assert abs(vectors.row(wiring.induction)["effect"]) < 0.1


def test_where_answers_differ_the_means_are_of_other_items():
    wired = wired_tasks(2)
    tasks = [
        FewShotTask("low", tuple(range(5)), tuple(N + x for x in range(5))),
        FewShotTask("high", tuple(range(1, 6)), tuple(N + (x + 1) % N for x in range(1, 6))),
    ]
    vectors = function_vectors(wired.model, tasks, n_shots=4, n_prompts=8)
    assert vectors.heads() == [wired.vector]


def test_a_model_that_does_not_do_the_tasks_has_none(build: Build):
    vectors = function_vectors(build(d_vocab=20), n_shots=4)
    assert not vectors.does_tasks
    assert vectors.heads() == []


def test_effects_against_a_loop():
    wired = wired_tasks(1)
    model = wired.model.double()
    tasks = wired.tasks[:2]
    options: dict[str, Any] = {"n_shots": 3, "n_prompts": 4, "bos": None}
    n_bytes = 64 * 2**20 // batch_rows(model, 7, 64 * 2**20, logits=True) * 6
    assert batch_rows(model, 7, n_bytes, logits=True) in (5, 6)  # each head has four prompts
    vectors = function_vectors(model, tasks, **options, max_batch_bytes=n_bytes)
    at_once = function_vectors(model, tasks, **options)
    torch.testing.assert_close(vectors.effect, at_once.effect)
    torch.testing.assert_close(vectors.own, at_once.own)
    source = torch.Generator().manual_seed(0)
    seen, tried = [], []
    drawing: dict[str, Any] = options | {"shows_query": False, "generator": source}
    for task in tasks:
        order = torch.randperm(N, generator=source).tolist()
        seen.append(draw_prompts(task, order, **drawing))
        tried.append(draw_prompts(task, order, **drawing))
    layer, head = wired.vector
    means = []
    for prompts in seen:
        _, cache = model.run_with_cache(prompts.right)
        means.append(cache["z", layer][:, -1, head].mean(0))
    rises: dict[str, list[Any]] = {"own": [], "other": []}
    for number, prompts in enumerate(tried):
        before = model(prompts.shuffled)[:, -1].softmax(-1)
        for name, mean in (("own", means[number]), ("other", means[1 - number])):

            def swap(z: Any, hook: Any, mean: Any = mean) -> Any:
                z[:, -1, head] = mean
                return z

            hooks = [(f"blocks.{layer}.attn.hook_z", swap)]
            after = model.run_with_hooks(prompts.shuffled, fwd_hooks=hooks)[:, -1].softmax(-1)
            rises[name] += [
                (after - before)[i, answer].item() for i, answer in enumerate(prompts.answers)
            ]
    row = vectors.row(wired.vector)
    assert row["own"] == pytest.approx(sum(rises["own"]) / 8, abs=1e-9)
    assert row["other"] == pytest.approx(sum(rises["other"]) / 8, abs=1e-9)
    differences = torch.tensor(rises["own"]) - torch.tensor(rises["other"])
    assert row["stderr"] == pytest.approx((differences.std() / 8**0.5).item(), abs=1e-6)


def test_prompts_hold_the_right_and_the_shifted_answers():
    task = FewShotTask("double", (1, 2, 3, 4, 5), (11, 12, 13, 14, 15))
    source = torch.Generator().manual_seed(0)
    drawing: dict[str, Any] = {"n_prompts": 20, "n_shots": 3, "bos": 0, "generator": source}
    for shows_query in (False, True):
        prompts = draw_prompts(
            task, [1, 2], shows_query=shows_query, between=(7,), after=(8, 9), **drawing
        )
        for right, shuffled, answer in zip(
            prompts.right.tolist(), prompts.shuffled.tolist(), prompts.answers.tolist(), strict=True
        ):
            assert len(right) == len(shuffled) == 1 + 3 * 5 + 2
            assert (right[0], right[-1], right[-2] + 10) == (0, 7, answer)
            assert answer in (12, 13)
            items, labels, moved = right[1:-2:5], right[3:-2:5], shuffled[3:-2:5]
            assert labels == [item + 10 for item in items]
            assert sorted(moved) == sorted(labels)
            assert all(a != b for a, b in zip(labels, moved, strict=True))
            assert shuffled[1:-2:5] == items
            assert (right[-2] in items) == shows_query


def test_random_mappings_share_items_and_answers():
    tasks = random_mappings(range(9), n_items=4, n_tasks=3, generator=torch.Generator())
    assert len({task.items for task in tasks}) == 1
    assert len({frozenset(task.answers) for task in tasks}) == 1
    assert not set(tasks[0].items) & set(tasks[0].answers)


def test_bad_input_is_refused(build: Build):
    model = build(d_vocab=20)
    task = FewShotTask("one", (1, 2, 3, 4), (5, 6, 7, 8))
    with pytest.raises(ValueError, match="one task has no other"):
        function_vectors(model, [task])
    with pytest.raises(ValueError, match="n_shots is 4; these tasks allow at most 3"):
        function_vectors(model, [task, task], n_shots=4)
    with pytest.raises(ValueError, match="n_prompts is 0"):
        function_vectors(model, n_prompts=0)
    with pytest.raises(ValueError, match="need 8 tokens, there are 7"):
        function_vectors(build(d_vocab=7), n_shots=4)
    with pytest.raises(ValueError, match="four different items"):
        FewShotTask("two", (1, 2), (3, 4))
    with pytest.raises(ValueError, match="same answer to every item"):
        FewShotTask("flat", (1, 2, 3, 4), (5, 5, 5, 5))
    other = FewShotTask("far", (1, 2, 3, 30), (5, 6, 7, 8))
    with pytest.raises(ProbeError, match="tokens run from 1 to 30"):
        function_vectors(model, [other, other], n_shots=3)
    with pytest.raises(ProbeError, match="do not fit the context of 12"):
        function_vectors(model, n_shots=6)
    with pytest.raises(ProbeError, match="later tokens"):
        function_vectors(tiny("BERT"), n_shots=4)


def test_exports(build: Build):
    vectors = function_vectors(build(d_vocab=20), n_shots=4, n_prompts=2)
    content = json.loads(vectors.to_json())
    assert len(content["heads"]) == 4
    effects = [row["effect"] for row in content["heads"]]
    assert effects == sorted(effects, reverse=True)
    assert "no head" in repr(vectors)
