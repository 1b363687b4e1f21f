"""Tracking inside real training frameworks, with accumulation and checkpoints."""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from probes import ProbeError, Tracker
from probes.watching.shadow import Shadow
from tests.oracles import seeded
from tests.probes.conftest import Build
from tests.probes.families import HUGGING_FACE, VOCAB

HELD_OUT = torch.randint(VOCAB, (40, 10), generator=seeded(1))
SEQUENCES = torch.randint(VOCAB, (32, 10), generator=seeded(2))


def tiny_model(family: str) -> Any:
    model_class, config_class, sizes = HUGGING_FACE[family]
    library: Any = transformers
    config = getattr(library, config_class)(**sizes, vocab_size=VOCAB, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(library, model_class)(config)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers|lightning|torch")
        yield


# --- Following a live model ---


@pytest.mark.parametrize(
    "family", ["GPT-2", "Llama", "Gemma 2", "Phi-3", "OPT", "Pythia (GPT-NeoX)"]
)
def test_a_shadow_computes_what_the_live_model_does(family: str) -> None:
    live = tiny_model(family)
    state = {name: value.clone() for name, value in live.state_dict().items()}
    shadow = Shadow(live)
    for factor in (1.0, 1.3, 1.7):
        with torch.no_grad():
            for parameter in live.parameters():
                parameter.mul_(factor)
            shadow.sync(HELD_OUT[:2])
            live.eval()
            expected = live(input_ids=HELD_OUT).logits
            assert torch.allclose(shadow.bridge(HELD_OUT), expected, atol=1e-4, rtol=1e-4)
    assert list(live.state_dict()) == list(state)  # a bridge around it would rename its weights
    assert shadow.bridge.tokenizer is None


def test_a_model_that_nothing_can_read_is_refused() -> None:
    with pytest.raises(ProbeError, match="Linear has no hook points: probes read"):
        Tracker(nn.Linear(2, 2), HELD_OUT, every=1)


def test_a_plain_loop_tracks_a_hugging_face_model() -> None:
    model = tiny_model("GPT-2")
    track = Tracker(model, HELD_OUT, every=2)
    look = track(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    later = track(2)
    assert look is not None
    assert later is not None
    assert look.figures != later.figures


# --- Hugging Face Trainer ---


def hugging_face(folder: Path, *, tracked: bool, resume: bool = False) -> tuple[Any, Any]:
    from probes.watching.integrations.hugging_face import TrackerCallback

    data = [{"input_ids": row, "labels": row} for row in SEQUENCES]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=6,
        save_steps=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    trainer = transformers.Trainer(model=tiny_model("GPT-2"), args=arguments, train_dataset=data)
    callback = TrackerCallback(trainer, HELD_OUT, every=2)
    if tracked:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return trainer, callback.tracker


def test_the_trainer_is_tracked_resumed_and_left_alone(tmp_path: Path) -> None:
    alone, _ = hugging_face(tmp_path / "alone", tracked=False)
    trainer, tracker = hugging_face(tmp_path / "tracked", tracked=True)
    for expected, actual in zip(alone.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(expected, actual)
    assert [look.step for look in tracker.looks] == [0, 1, 2, 4, 6]
    logged = [row for row in trainer.state.log_history if "probes/prefix_matching/max" in row]
    assert [row["global_step"] for row in logged] == [0, 1, 2, 4, 6]
    # The checkpoint is an ordinary one, with the looks beside it.
    saved = tmp_path / "tracked" / "checkpoint-3"
    transformers.GPT2LMHeadModel.from_pretrained(saved)
    _, resumed = hugging_face(tmp_path / "tracked", tracked=True, resume=True)
    assert [look.step for look in resumed.looks] == [0, 1, 2, 4, 6]
    for before, after in zip(tracker.looks, resumed.looks, strict=True):
        assert after.figures == pytest.approx(before.figures, nan_ok=True)


# --- Lightning ---


def lightning_run(folder: Path, model: nn.Module, *, tracked: bool, resume: bool = False) -> Any:
    import lightning.pytorch as pl

    from probes.watching.integrations.lightning import TrackerCallback

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss: Tensor = self.model(batch, return_type="loss")
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    callback = TrackerCallback(lambda module: module.model, HELD_OUT, every=2)
    checkpoints = pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=6,
        accumulate_grad_batches=2,
        callbacks=[checkpoints, *([callback] if tracked else [])],
        logger=pl.loggers.CSVLogger(folder),
        log_every_n_steps=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader: Any = torch.utils.data.DataLoader(SEQUENCES, batch_size=4)
    path = next(folder.glob("*step=3.ckpt")) if resume else None
    trainer.fit(Module(), loader, ckpt_path=path, weights_only=False)
    return callback.tracker


def test_lightning_is_tracked_resumed_and_left_alone(tmp_path: Path, build: Build) -> None:
    first = build(d_vocab=VOCAB)
    alone, tracked = copy.deepcopy(first), copy.deepcopy(first)
    lightning_run(tmp_path / "alone", alone, tracked=False)
    tracker = lightning_run(tmp_path / "tracked", tracked, tracked=True)
    for expected, actual in zip(alone.parameters(), tracked.parameters(), strict=True):
        assert torch.equal(expected, actual)
    assert [look.step for look in tracker.looks] == [0, 1, 2, 4, 6]
    [table] = (tmp_path / "tracked").rglob("metrics.csv")
    assert "probes/prefix_matching/max" in table.read_text().splitlines()[0]
    resumed = lightning_run(tmp_path / "tracked", first, tracked=True, resume=True)
    assert [look.step for look in resumed.looks] == [0, 1, 2, 4, 6]
    # Lightning begins the epoch's data anew, so only the looks of the checkpoint are the same.
    for before, after in zip(tracker.looks[:3], resumed.looks[:3], strict=True):
        assert after.figures == pytest.approx(before.figures, nan_ok=True)
