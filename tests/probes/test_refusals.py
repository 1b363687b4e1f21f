"""What the instruments refuse: the kind of error, and one line that says what is allowed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mechcausal.models.adapter import HookedTransformer
from probes import (
    Activation,
    AttentionGradient,
    AttentionPattern,
    LabelledTensor,
    ProbeError,
    ablation_effects,
    attach,
    attention_by_class,
    copying_score,
    edit_attention,
    k_composition,
    knock_out,
    loss_by_position,
    make_uniform,
    mean_ablate,
    order_sensitivity,
    positional_share,
    redirect,
    repeated_tokens,
    replace_pattern,
    score_heads,
    track_formation,
    tree_projection,
)
from probes.reading.passes import token_losses
from tests.probes.conftest import Build
from tests.refusals import raises_one_line

VALUES = torch.arange(12.0).reshape(2, 3, 2)
LABELLED = LabelledTensor("scores", VALUES, ("layer", "head", "key"), {"layer": (3, 5)})


def draw(**sizes: int) -> Tensor:
    usual = {"batch": 1, "repeat_length": 2, "vocab_size": 3, "n_repeats": 2}
    return repeated_tokens(**usual | sizes, generator=torch.Generator())


def by_class(classes: Tensor, **options: Any) -> Any:
    return attention_by_class(torch.full((2, 1, 3, 3), 1 / 3), classes, **options)


# Each row: the call without a model, and its message; the error is a ValueError.
WRONG_VALUES: list[tuple[Callable[[], Any], str]] = [
    (lambda: knock_out([(1, 2)]), r"\(query 1, key 2\) is not allowed"),
    (lambda: knock_out([(1, -1)]), r"\(query 1, key -1\) is not allowed"),
    (lambda: redirect([(2, 0, 3)]), r"\(query 2, key 3\) is not allowed"),
    (lambda: make_uniform([-1]), "query -1"),
    (lambda: replace_pattern(torch.ones(2, 2)), "row sums that differ from 1 by up to 1"),
    (lambda: replace_pattern(torch.tensor([[2.0, -1.0]])), "lowest weight of -1"),
    (lambda: replace_pattern(torch.full((2, 2), torch.nan)), "weights must be >= 0"),
    (lambda: replace_pattern(torch.ones(1, 1, 1, 1, 1)), "5 axes; at most 4"),
    *(
        (lambda scale=scale: AttentionGradient(loss_scale=scale), "must be a finite number above 0")
        for scale in (0, -1.0, torch.nan, torch.inf)
    ),
    (lambda: Activation("resid"), "hook is 'resid'; allowed: resid_pre, resid_mid"),
    (lambda: Activation("z", reduce=torch.mean), "a function as reduce needs axes"),
    (lambda: Activation("z", axes=("head",)), "a function as reduce needs axes"),
    *(
        (lambda name=name: draw(**{name: 0}), f"{name} is 0; it must be at least 1")
        for name in ("batch", "repeat_length", "vocab_size", "n_repeats")
    ),
    (lambda: draw(vocab_size=1, bos=0), "no token remains"),
    *(
        (lambda classes=classes, options=options: by_class(classes, **options), message)
        for classes, options, message in (
            (
                torch.zeros(4, 4).long(),
                {},
                r"\(4, 4\); 2 sequences of 3 tokens need \(3, 3\)",
            ),
            (torch.zeros(3, 3, 3).long(), {}, r"need \(3, 3\) or \(2, 3, 3\) \(query, key\)"),
            (torch.zeros(3, 3), {}, "classes are of type torch.float32; expected integers"),
            (torch.ones(3, 3).bool(), {}, "classes are of type torch.bool; expected integers"),
            (torch.full((3, 3), -2), {}, "classes hold -2; allowed are 0 and above, and -1"),
            (torch.full((3, 3), -1), {}, "no query sees a key with a class of 0 or above"),
            (torch.zeros(3, 3).long().fill_diagonal_(-1).tril(), {"causal": True}, "later keys"),
            (torch.zeros(3, 3).long(), {"tokens": torch.zeros(2, 3).long()}, "go with a model"),
            (torch.zeros(3, 3).long(), {"layers": 0}, "go with a model"),
            (
                torch.zeros(3, 3).long(),
                {"attention_mask": torch.ones(2, 4)},
                r"the attention mask has shape \(2, 4\), the pattern's sequences \(2, 3\)",
            ),
        )
    ),
    (
        lambda: attention_by_class(torch.eye(3), torch.zeros(3, 3).long()),
        r"the pattern has shape \(3, 3\) and type torch.float32; expected",
    ),
    (
        lambda: attention_by_class(LABELLED, torch.zeros(3, 3).long()),
        r"scores has axes \('layer', 'head', 'key'\)",
    ),
    (lambda: LABELLED.sel(layer=0), r"scores has no layer 0; it has \(3, 5\)"),
    (lambda: LABELLED.sel(head=3), "scores has no head 3; it has 0 to 2"),
    (lambda: LABELLED.sel(query=0), "scores has no axis 'query'; its axes are"),
    (lambda: LABELLED.mean("query"), "no axis 'query'"),
    (lambda: LabelledTensor("scores", VALUES, ("layer", "head")), "3 dimensions"),
    (lambda: LabelledTensor("scores", VALUES, ("layer", "layer", "head")), "3 dimensions"),
    (
        lambda: LabelledTensor("scores", VALUES, ("layer", "head", "key"), {"layer": (1,)}),
        "cannot label axis 'layer'",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG_VALUES)
def test_a_wrong_value_is_refused_in_one_line(call: Callable[[], Any], message: str):
    with raises_one_line(ValueError, match=message):
        call()


def edited(model: HookedTransformer, layer: int, edit: Any) -> None:
    with edit_attention(model, {layer: edit}):
        model(torch.tensor([[0, 1, 1], [1, 0, 1]]))


def attached(model: nn.Module, *probes: Any) -> None:
    with attach(model, *probes):
        pass


def ablated(model: HookedTransformer, head: tuple[int, int]) -> None:
    with mean_ablate(model, [head]):
        pass


untyped_effects: Any = ablation_effects
ROW = torch.arange(7)[None]
LONG = torch.zeros(1, 13, dtype=torch.int64)

# Each row: a call with a model of two layers and two heads, context 12 and 7 tokens; its error.
WRONG_FOR_A_MODEL: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (
        lambda m: score_heads(m, n_sequences=0),
        ValueError,
        "n_sequences is 0; it must be at least 1",
    ),
    (lambda m: score_heads(m, threshold=0.0), ValueError, "threshold is 0.0"),
    (lambda m: score_heads(m, threshold=1.5), ValueError, "threshold is 1.5"),
    (
        lambda m: score_heads(m, repeat_lengths=(4, 2)),
        ValueError,
        r"repeat_lengths are \[4, 2\]; each must be at least 3",
    ),
    (lambda m: score_heads(m, repeat_lengths=()), ValueError, "repeat_lengths are"),
    (lambda m: score_heads(m, max_batch_bytes=0), ValueError, "max_batch_bytes is 0"),
    (
        lambda m: score_heads(m, repeat_lengths=(3, 9)),
        ProbeError,
        "two repeats of 9 tokens: 18 pos",
    ),
    (lambda m: score_heads(m, ROW + 5), ProbeError, "vocabulary from 0 to 6"),
    (lambda m: score_heads(m, LONG), ProbeError, "13 tokens do not fit the context of 12"),
    (lambda m: score_heads(m, ROW), ProbeError, "no token recurs"),
    (lambda m: score_heads(m, bos=7), ProbeError, "bos is 7"),
    (lambda m: score_heads(m.unembed), ProbeError, "Unembed has no hook points"),
    (lambda m: attached(m.unembed), ProbeError, "Unembed has no hook points"),
    (lambda m: attached(nn.Linear(2, 2)), ProbeError, "Linear has no hook points"),
    (
        lambda m: attached(m, AttentionPattern(2)),
        ProbeError,
        "layer 2 does not exist: the model has 2",
    ),
    (lambda m: attached(m, AttentionPattern(-1)), ProbeError, "layer -1 does not exist"),
    (lambda m: attached(m, AttentionPattern([])), ProbeError, "layers is empty"),
    (lambda m: attached(m, Activation("post")), ProbeError, "has no hook point 'post'"),
    (
        lambda m: ablation_effects(m, [(1, 2)]),
        ProbeError,
        "head 2 does not exist: layer 1 has 2 heads",
    ),
    (lambda m: ablated(m, (5, 0)), ProbeError, "layer 5 does not exist"),
    (lambda m: ablation_effects(m, [(0, 0)], tokens=ROW), ProbeError, "no pair of tokens recurs"),
    (
        lambda m: ablation_effects(m, [(0, 0)], tokens={"text": ROW}),
        ProbeError,
        "no pair of tokens recurs in batch 'text'",
    ),
    (lambda m: ablation_effects(m, [(0, 0)], tokens={}), ValueError, r"batches are named \[\]"),
    (
        lambda m: ablation_effects(m, [(0, 0)], tokens={"control": ROW}),
        ValueError,
        r"named \['control'\]; give at least one, and none named 'control'",
    ),
    (
        lambda m: ablation_effects(m, [], tokens={"a": ROW}, attention_mask={"b": ROW}),
        ValueError,
        r"attention masks by the same names, \['a'\]",
    ),
    (
        lambda m: untyped_effects(m, [(0, 0)], tokens=ROW, attention_mask={"a": ROW}),
        ValueError,
        "attention masks by name go with batches of tokens by name",
    ),
    (
        lambda m: attention_by_class(m, torch.zeros(7, 7).long()),
        ValueError,
        "attention_by_class of a model needs tokens",
    ),
    (
        lambda m: attention_by_class(m, torch.zeros(6, 6).long(), ROW),
        ValueError,
        r"classes have shape \(6, 6\); 1 sequences of 7 tokens need \(7, 7\)",
    ),
    (lambda m: positional_share(m, ROW), ValueError, "positional_share got one sequence"),
    (
        lambda m: positional_share(m, torch.zeros(4, 1).long()),
        ValueError,
        "sequences of 1 tokens are too short: some query must see two keys",
    ),
    (lambda m: positional_share(m, LONG), ProbeError, "do not fit the context"),
    (
        lambda m: order_sensitivity(m, ROW[:, :2]),
        ValueError,
        "a sequence of 2 tokens is too short: besides the last, which stays, it needs two",
    ),
    (
        lambda m: order_sensitivity(m, ROW[:, :3], keep_first=True),
        ValueError,
        "a sequence of 3 tokens is too short: besides the first and the last, which stay",
    ),
    (lambda m: order_sensitivity(m, ROW, n_permutations=0), ValueError, "n_permutations is 0"),
    (
        lambda m: tree_projection(m, ROW),
        ProbeError,
        "HookedTransformer attends to earlier tokens alone: tree_projection needs a bidirectional",
    ),
    (lambda m: ablation_effects(m, [(0, 0)], n_sequences=0), ValueError, "n_sequences is 0"),
    (
        lambda m: k_composition(m, [(1, 7)]),
        ProbeError,
        "head 7 does not exist: layer 1 has 2 heads",
    ),
    (lambda m: k_composition(m, [(9, 0)]), ProbeError, "layer 9 does not exist"),
    (lambda m: copying_score(m, 5), ProbeError, "layer 5 does not exist"),
    (lambda m: token_losses(m, LONG[:, :1]), ValueError, "at least two"),
    (lambda m: edited(m, 3, make_uniform([0])), ProbeError, "layer 3 does not exist"),
    (
        lambda m: edited(m, 0, make_uniform([3])),
        ProbeError,
        "query 3 does not exist: the pattern has 3",
    ),
    (
        lambda m: edited(m, 0, make_uniform([2], -1)),
        ProbeError,
        "head -1 does not exist: the pattern",
    ),
    (
        lambda m: edited(m, 0, knock_out([(2, 0)], 3)),
        ProbeError,
        "head 3 does not exist: the pattern",
    ),
    (
        lambda m: edited(m, 0, replace_pattern(torch.eye(2))),
        ProbeError,
        r"\(2, 2\) cannot replace one of shape \(2, 2, 3, 3\)",
    ),
    (
        lambda m: edited(m, 0, lambda pattern: pattern[:1]),
        ProbeError,
        r"shape from \(2, 2, 3, 3\) to \(1, 2, 3, 3\)",
    ),
    (lambda m: track_formation([]), ValueError, "no checkpoints"),
    (lambda m: track_formation([(0, m), (0, m)]), ValueError, "step 0 is given twice"),
    (lambda m: track_formation([(-1, m)]), ValueError, "step -1 is negative"),
    (
        lambda m: track_formation([(0, m)], score="fame"),
        ValueError,
        "no score 'fame'; there are pre",
    ),
    (lambda m: track_formation([(0, m)], confidence=1.0), ValueError, "confidence is 1"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG_FOR_A_MODEL)
def test_what_does_not_fit_a_model_is_refused_in_one_line(
    model: HookedTransformer, call: Callable[[Any], Any], error: type[Exception], message: str
):
    with raises_one_line(error, match=message):
        call(model)


@pytest.mark.parametrize(
    ("sizes", "call", "message"),
    [
        ({"n_ctx": 5}, score_heads, "a context of 5 is too short for two repeats of 3"),
        (
            {"n_ctx": 6},
            lambda m: score_heads(m, bos=0),
            r"a context of 6 .* 7 positions are needed",
        ),
        ({"attention_dir": "bidirectional"}, loss_by_position, "attends to later tokens"),
        (
            {"attention_dir": "bidirectional"},
            lambda m: ablation_effects(m, [(0, 0)]),
            "attends to later tokens",
        ),
        (
            {"attention_dir": "bidirectional"},
            lambda m: tree_projection(m, ROW, from_layer=2),
            "layer 2 does not exist",
        ),
        ({"d_vocab_out": 5}, lambda m: order_sensitivity(m, ROW), "needs logits for every token"),
        ({"d_vocab_out": 5}, loss_by_position, "a loss needs logits for every token"),
        ({"d_vocab_out": 3}, lambda m: copying_score(m, 0), "7 tokens go in, 3 come out"),
    ],
)
def test_a_model_of_the_wrong_kind_is_refused_in_one_line(
    build: Build, sizes: dict[str, Any], call: Callable[[Any], Any], message: str
):
    with raises_one_line(ProbeError, match=message):
        call(build(**sizes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: tree_projection(m, ROW, start=2, stop=4),
            "start 2 and stop 4 leave 2 of 7 tokens; a tree needs at least three",
        ),
        (lambda m: tree_projection(m, ROW, stop=-6), "leave 1 of 7 tokens"),
        (
            lambda m: tree_projection(m, ROW, attention_mask=(ROW > 0).long()),
            "sequences hold padding: tree_projection needs sequences of one length",
        ),
        (lambda m: tree_projection(m, ROW).recall([]), "recall needs at least one true bracket"),
        (
            lambda m: attention_by_class(m, torch.zeros(7, 7).long(), ROW, causal=True),
            "causal is True, but this attention goes to later keys too",
        ),
    ],
)
def test_what_does_not_fit_a_bidirectional_model_is_refused_in_one_line(
    build: Build, call: Callable[[Any], Any], message: str
):
    with pytest.raises(ValueError, match=message) as caught:
        call(build(attention_dir="bidirectional"))
    assert len(str(caught.value).splitlines()) == 1


def test_checkpoints_of_different_models_are_refused(build: Build, model: HookedTransformer):
    with pytest.raises(ProbeError, match="checkpoints differ"):
        track_formation([(0, model), (5, build(n_heads=3))], n_sequences=2)


def test_a_layer_without_attention_is_named(model: HookedTransformer):
    del model.hook_dict["blocks.1.attn.hook_pattern"]
    with pytest.raises(ProbeError, match=r"layer 1 has no attention; layers that have: \[0\]"):
        attached(model, AttentionPattern([0, 1]))
    del model.hook_dict["blocks.0.attn.hook_pattern"]
    with pytest.raises(ProbeError, match="HookedTransformer has no attention"):
        attached(model, AttentionPattern())
