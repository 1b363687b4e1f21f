"""A tracked run against an untracked one, and everything that may go wrong while tracking."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mechcausal.models.adapter import HookedTransformer
from probes import ProbeError, ProbeWarning, Tracker, score_heads
from tests.oracles import seeded
from tests.probes.conftest import Build
from tests.probes.families import FAMILIES, tiny

TOKENS = torch.randint(7, (40, 10), generator=seeded(1))


@pytest.fixture
def with_dropout(build: Build) -> Callable[[], HookedTransformer]:
    """A model whose forward pass draws random numbers, in evaluation mode too."""

    def make() -> HookedTransformer:
        model = build(n_ctx=10)
        model.blocks[0].attn.W_K.data.mul_(0.1)
        model.add_hook("blocks.0.hook_attn_out", lambda x, hook: nn.functional.dropout(x, 0.1))
        return model

    return make


def wrapped_ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def checkpointed(model: HookedTransformer) -> nn.Module:
    """Every block computes its activations again in the backward pass."""
    for block in model.blocks:
        forward = block.forward

        def again(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        block.forward = again  # type: ignore[method-assign]
    return model


@contextmanager
def one_process() -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def train(
    model: nn.Module, track: Callable[[int], object], *, accumulation: int, autocast: bool
) -> list[Any]:
    """Some steps of a loop; whatever a look could have disturbed."""
    torch.manual_seed(0)
    generator = seeded(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    mixed: Any = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    observed: list[Any] = []
    model.train()
    for step in range(4):
        for part in range(accumulation):
            tokens = torch.randint(7, (8, 10), generator=generator)
            with mixed:
                loss = model(tokens, return_type="loss")
            (loss / accumulation).backward()
            if part < accumulation - 1:
                track(step)  # in mid-accumulation, with gradients half made
        observed += [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        track(step)
        observed.append([module.training for module in model.modules()])
        observed.append([parameter.requires_grad for parameter in model.parameters()])
        observed.append(torch.get_rng_state())
    return [*observed, *(parameter.detach().clone() for parameter in model.parameters())]


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (lambda model: model, {"accumulation": 1, "autocast": False}),
        (lambda model: model, {"accumulation": 2, "autocast": False}),
        (lambda model: model, {"accumulation": 1, "autocast": True}),
        (compiled, {"accumulation": 1, "autocast": False}),
        (checkpointed, {"accumulation": 1, "autocast": False}),
        (wrapped_ddp, {"accumulation": 2, "autocast": False}),
    ],
    ids=["plain", "accumulation", "autocast", "compiled", "checkpointed", "ddp"],
)
def test_training_goes_on_as_if_nobody_looked(
    with_dropout: Callable[[], HookedTransformer], wrap: Any, options: dict[str, Any]
) -> None:
    with one_process() if wrap is wrapped_ddp else nullcontext():
        alone = train(wrap(with_dropout()), lambda step: None, **options)
        model = wrap(with_dropout())
        track = Tracker(model, TOKENS, every=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ProbeWarning)
            watched = train(model, track, **options)
    assert [look.step for look in track.looks] == [0, 1, 2]
    for expected, actual in zip(alone, watched, strict=True):
        if isinstance(expected, Tensor):
            assert torch.equal(expected, actual)
        else:
            assert expected == actual


def test_looks_read_the_model_as_it_is(model: HookedTransformer) -> None:
    track = Tracker(model, TOKENS, every=5, layers=(0, 1))
    before = track(0)
    for block in model.blocks:
        block.attn.W_Q.data.mul_(0.01)
    after = track(5)
    assert before is not None
    assert after is not None
    scores = score_heads(model, generator=seeded())
    assert after.scores is not None
    assert torch.equal(after.scores.prefix_matching, scores.prefix_matching)
    assert before.figures != after.figures
    assert after.figures["prefix_matching/max"] == scores.prefix_matching.max().item()
    assert {f"gradient/layer{i}/signal_to_noise" for i in (0, 1)} <= set(after.figures)
    # Only the last look keeps its matrices.
    assert track.looks[0].descent is None
    assert track.looks[1].descent is not None
    assert track.looks[1].descent.shape == {"layer": 2, "query": 10, "key": 10}


def test_looks_are_dense_at_first(model: HookedTransformer) -> None:
    track = Tracker(model, TOKENS, every=20)
    assert [step for step in range(61) if track.due(step)] == [0, 1, 2, 4, 8, 16, 20, 40, 60]
    sparse = Tracker(model, TOKENS, every=20, dense=False)
    assert [step for step in range(61) if sparse.due(step)] == [0, 20, 40, 60]
    assert track(3) is None
    assert track(4) is not None
    assert track(4) is None  # a step is looked at once


def test_figures_reach_the_log_function_under_the_callers_step(model: HookedTransformer) -> None:
    rows: list[dict[str, float]] = []
    track = Tracker(model, TOKENS, every=5, log=rows.append, prefix="mine/", step_key="update")
    track(5)
    assert rows == [{"update": 5, **{f"mine/{k}": v for k, v in track.looks[0].figures.items()}}]

    calls = []
    track = Tracker(model, TOKENS, every=5, log=lambda row, commit=True: calls.append(commit))
    track(5)
    assert calls == [False]  # the caller's next row takes it along: W&B's steps stay the caller's


def test_what_fails_warns_once_and_never_stops_training(model: HookedTransformer) -> None:
    def log(row: dict[str, float]) -> None:
        raise ConnectionError("no\nnetwork")

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return logits.sum((1, 2))

    track = Tracker(model, TOKENS, every=1, log=log, loss=loss)
    with pytest.warns(ProbeWarning) as caught:
        looks = [track(step) for step in range(3)]
    assert [str(warning.message) for warning in caught] == [
        "tracking goes on without the gradient: the loss must be a scalar tensor, found (2,): "
        "take its mean",
        "tracking goes on without the log function: no network",
    ]
    assert all(look is not None and look.scores is not None for look in looks)


def test_state_dict_continues_the_curves(model: HookedTransformer) -> None:
    track = Tracker(model, TOKENS, every=2)
    for step in range(5):
        track(step)
    file = io.BytesIO()
    torch.save(track.state_dict(), file)
    file.seek(0)
    resumed = Tracker(model, TOKENS, every=2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed(4) is None
    resumed(6)
    assert [look.step for look in resumed.looks] == [0, 1, 2, 4, 6]
    formation = resumed.formation()
    assert formation.steps == (0, 1, 2, 4, 6)
    assert torch.equal(formation.scores[:4], track.formation().scores)
    assert list(resumed.to_frame()["step"]) == [0, 1, 2, 4, 6]
    with pytest.raises(ValueError, match="not the state of a tracker"):
        resumed.load_state_dict({"steps": []})


def test_pictures_show_what_was_read(model: HookedTransformer) -> None:
    track = Tracker(model, TOKENS, every=2, prefix="p/")
    assert track.pictures() == {}
    for step in range(3):
        track(step)
    pictures = track.pictures()
    assert set(pictures) == {"p/heads", "p/agreement", "p/gradient"}
    curves = {trace.name: trace for trace in pictures["p/heads"].data}
    assert set(curves) == {"L0H0", "L0H1", "L1H0", "L1H1"}
    assert list(curves["L1H0"].x) == [0, 1, 2]
    gradient, information = pictures["p/gradient"].data
    assert (len(gradient.z), len(gradient.z[0])) == (len(information.z), len(information.z[0]))
    assert gradient.z[0][1] != gradient.z[0][1]  # the future is empty


def test_padding_counts_neither_in_passes_nor_in_information(build: Build) -> None:
    model, with_tokenizer = build(), build()
    tokens = torch.randint(6, (400, 10), generator=seeded(4))
    tokens[::2, 7:] = 6
    by_mask = Tracker(model, tokens, every=1, attention_mask=tokens != 6)
    with_tokenizer.tokenizer = SimpleNamespace(  # type: ignore[assignment]
        pad_token_id=6, bos_token_id=0, padding_side="right"
    )
    by_tokenizer = Tracker(with_tokenizer, tokens, every=1)
    figures = []
    for track in (by_mask, by_tokenizer):
        look = track(0)
        assert look is not None
        # Head scores have sequences of their own, which begin with the tokenizer's BOS.
        on_tokens = {k: v for k, v in look.figures.items() if k.startswith(("gradient", "in_con"))}
        figures.append(on_tokens)
        assert track.information is not None
        # Half of the last tokens would be PAD together: that is no information.
        assert track.information.chi2[9, 8] < 0.3
    assert figures[0] == pytest.approx(figures[1], nan_ok=True)
    assert figures[0]


def test_long_sequences_are_compared_by_lag(build: Build) -> None:
    model = build(n_ctx=80)
    tokens = torch.randint(7, (40, 80), generator=seeded(3))
    track = Tracker(model, tokens, every=1)
    look = track(0)
    assert look is not None
    assert track.information is not None
    assert (track.information.by, len(track.information.chi2)) == ("lag", 32)
    assert track.information.correction == "jackknife"  # positions are pooled: enough pairs
    assert "gradient/layer0/signal_to_noise" in look.figures
    assert "gradient/layer0/edge_hits" not in look.figures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0; it must be at least 1"),
        ({"every": 1, "n_sequences": 1}, "n_sequences is 1"),
        ({"every": 1, "tokens": TOKENS[:1]}, "at least two held-out sequences"),
        ({"every": 1, "tokens": TOKENS + 1}, "tokens run from 1 to 7, the model's vocabulary"),
        ({"every": 1, "tokens": TOKENS.repeat(1, 2)}, "do not fit the context of 12"),
        ({"every": 1, "layers": 5}, "layer 5 does not exist"),
    ],
)
def test_bad_input_gets_one_clear_line(
    model: HookedTransformer, options: dict[str, Any], message: str
) -> None:
    tokens = options.pop("tokens", TOKENS)
    with pytest.raises((ValueError, ProbeError), match=re.escape(message)):
        Tracker(model, tokens, **options)


def test_sharded_models_are_refused_with_the_reason(model: HookedTransformer) -> None:
    from torch.distributed.fsdp import fully_shard

    with one_process():
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        with pytest.raises(ProbeError, match=r"FSDP.*no process holds whole weights"):
            Tracker(model, TOKENS, every=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:(?!tracking goes on)")
def test_a_look_works_on_every_family_or_says_why_not(family: str) -> None:
    model = tiny(family)
    tokens = torch.randint(1, 11, (32, 12), generator=seeded())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ProbeWarning)
        look = Tracker(model, tokens, every=1)(0)
    reasons = [str(w.message) for w in caught if str(w.message).startswith("tracking goes on")]
    assert look is not None
    assert look.scores is not None
    assert look.descent is not None
    if family == "BERT":  # it sees the token it would have to predict
        assert len(reasons) == 1
        assert "in-context loss" in reasons[0]
    else:
        assert reasons == []
        assert "in_context/score" in look.figures
