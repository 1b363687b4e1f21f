"""What `detect` can be pointed at, and what it refuses: one line each, and nothing is unpickled."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    ResNetConfig,
)

from mechcausal.models.adapter import load_model, save_model
from mechcausal.studies.detection import detect
from mechcausal.studies.targets import TargetError, load_target
from mechcausal.training.checkpoints import checkpoint_folders
from mechcausal.training.run import RunResult
from probes import InductionScores, attach
from probes.heads.stimuli import fitting_repeat_lengths
from probes.reading.padding import real_positions
from tests.hugging_face import BOS, malicious_pickle, save_gpt2
from tests.probes.wired import blank
from tests.refusals import raises_one_line


def refusal(target: Path | str, **options: Any) -> str:
    """The one line with which a target is refused, which names it."""
    with raises_one_line(TargetError) as caught:
        load_target(str(target), **options)
    message = str(caught.value)
    assert str(target) in message
    return message


# --- Runs ---


def test_a_run_stands_for_its_final_weights_and_a_step_for_its_checkpoint(
    lean_run: RunResult,
) -> None:
    final = load_target(str(lean_run.folder))
    assert (final.name, final.folder) == (str(lean_run.folder), lean_run.folder)
    assert final.predicts_every_token
    assert final.bos == 0
    weights = dict(final.model.named_parameters())
    for name, value in lean_run.experiment.hooked.named_parameters():
        assert torch.equal(weights[name], value)
    assert list(checkpoint_folders(lean_run.folder)) == [0, 2, 4]
    start, middle, end = (load_target(str(lean_run.folder), step=step) for step in (0, 2, 4))
    assert middle.name == f"{lean_run.folder}, step 2"
    assert middle.folder == lean_run.folder
    saved = load_model(lean_run.folder / "checkpoints" / "00000002")
    assert torch.equal(middle.model.embed.W_E, saved.embed.W_E)
    assert torch.equal(end.model.embed.W_E, final.model.embed.W_E)
    assert not torch.equal(start.model.embed.W_E, final.model.embed.W_E)


def test_a_step_without_a_checkpoint_is_refused(lean_run: RunResult, tmp_path: Path) -> None:
    assert "no checkpoint at step 3; there are: 0, 2, 4" in refusal(lean_run.folder, step=3)
    save_model(blank(1, 1), tmp_path / "saved")
    for target in (tmp_path / "saved", "gpt2"):
        assert "--step goes with a run" in refusal(target, step=0)
    # What a run with these options leaves until it ends: no weights, no checkpoints.
    (tmp_path / "recipe.toml").write_bytes((lean_run.folder / "recipe.toml").read_bytes())
    assert "the run did not end" in refusal(tmp_path)
    assert "there are: none" in refusal(tmp_path, step=0)


def test_a_causal_graph_run_predicts_its_last_token_alone(graph_run: RunResult) -> None:
    target = load_target(str(graph_run.folder))
    assert not target.predicts_every_token
    assert target.bos is None


# --- Models ---


def test_any_saved_hooked_transformer_is_loaded(tmp_path: Path) -> None:
    model = blank(2, 3)
    save_model(model, tmp_path / "model")
    target = load_target(str(tmp_path / "model"))
    assert (target.folder, target.bos, target.predicts_every_token) == (None, None, True)
    tokens = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(target.model(tokens), model(tokens))


@pytest.mark.parametrize("kind", ["tokens alone", "with tokenizer", "sharded"])
def test_a_hugging_face_folder_gives_the_same_logits(tmp_path: Path, kind: str) -> None:
    has_tokenizer = kind == "with tokenizer"
    original = save_gpt2(tmp_path, tokenizer=has_tokenizer)
    if kind == "sharded":
        (tmp_path / "model.safetensors").unlink()
        original.save_pretrained(tmp_path, max_shard_size="3KB")
        assert (tmp_path / "model.safetensors.index.json").is_file()
    target = load_target(str(tmp_path))
    assert target.name == str(tmp_path)
    assert target.bos == ("auto" if has_tokenizer else None)
    assert target.predicts_every_token
    if has_tokenizer:
        assert target.model.tokenizer.bos_token_id == BOS
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        expected = original(tokens).logits
        torch.testing.assert_close(target.model(tokens), expected, atol=1e-5, rtol=1e-4)


def test_a_model_that_reads_both_ways_predicts_no_next_token(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=8, vocab_size=30, max_position_embeddings=32)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    target = load_target(str(tmp_path))
    assert not target.predicts_every_token
    detection = detect(target)
    assert detection.in_context is None
    assert "in_context" not in detection.to_dict()
    # All keys of a block repeated twice are visible; one of them scores.
    lengths = fitting_repeat_lengths(32, 30)
    expected = [1 / (2 * lengths[i % len(lengths)]) for i in range(detection.scores.sequences)]
    uniform = detection.scores.uniform_baseline[0, 0].item()
    assert uniform == pytest.approx(sum(expected) / len(expected))
    with pytest.raises(ValueError, match="--ablate needs next-token predictions"):
        detect(target, ablate=True)


@pytest.mark.parametrize("family", [Qwen2ForCausalLM, Qwen3ForCausalLM])
def test_a_small_model_with_large_defaults_in_its_config_is_loaded(
    tmp_path: Path, family: Any
) -> None:
    """Such as `max_window_layers = 28`, whatever the number of layers."""
    config = family.config_class(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    original = family(config).eval()
    original.save_pretrained(tmp_path)
    tokens = torch.arange(10).unsqueeze(0)
    target = load_target(str(tmp_path))
    assert target.predicts_every_token
    with torch.no_grad():
        expected = original(tokens).logits
        torch.testing.assert_close(target.model(tokens), expected, atol=1e-4, rtol=1e-3)


def test_a_made_up_tokenizer_says_nothing_about_padding(tmp_path: Path) -> None:
    save_gpt2(tmp_path)
    model = load_target(str(tmp_path)).model
    tokens = torch.tensor([[0, 5, 6, 0, 5]])
    with attach(model, InductionScores()) as (scores,):
        model(tokens)
    assert scores.reading().sel(score="duplicate_token").values.isfinite().all()
    assert real_positions(model, tokens) is None


# --- Nothing is unpickled, and no code that comes with a model is run ---


def plant(folder: Path, way: str) -> Path:
    """A model's folder from which a careless loader would unpickle; the file that tells of it.

    For pickles under other names see test_pickles.py.
    """
    save_gpt2(folder)
    weights = folder / "model.safetensors"
    marker = malicious_pickle(folder / "pytorch_model.bin")
    if way == "no safetensors":
        weights.unlink()
    elif way == "other safetensors":
        weights.rename(folder / "adapter.safetensors")
    elif way == "config":
        edited_config(transformers_weights="pytorch_model.bin")(folder)
    elif way == "index":
        weights.rename(folder / "shard.safetensors")
        index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "pytorch_model.bin"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return marker


WAYS = {
    "no safetensors": "pytorch_model.bin is a pickle, which is never opened",
    "other safetensors": "pickle",
    "config": "pickle",
    "index": "pickle",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_pickle_is_refused_and_not_opened(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = plant(tmp_path, way)

    def load(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", load)
    message = refusal(tmp_path)
    assert WAYS[way] in message
    assert "torch.load" not in message
    assert not marker.exists()


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    save_gpt2(tmp_path)
    marker = tmp_path / "was_run"
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    edited_config(model_type="evil", auto_map=names)(tmp_path)
    (tmp_path / "code.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    assert "not loaded by transformers" in refusal(tmp_path)
    assert not marker.exists()


# --- Damaged models, and what is none ---

Damage: TypeAlias = Callable[[Path], object]


def edited_config(**values: Any) -> Damage:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def written_config(content: bytes) -> Damage:
    return lambda folder: (folder / "config.json").write_bytes(content)


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def torn(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])


def with_two_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["config"]["n_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))


def save_blank(folder: Path) -> None:
    save_model(blank(1, 2), folder)


UNREADABLE = "not readable as JSON"
UNKNOWN = "neither written by save_model nor by Hugging Face"
UNSUPPORTED = "not loaded by transformers"
DAMAGED: dict[str, tuple[Damage, Damage, str]] = {
    "saved, no config": (save_blank, removed("config.json"), "config.json"),
    "saved, no weights": (save_blank, removed("model.safetensors"), "model.safetensors"),
    "saved, layers without weights": (save_blank, with_two_layers, "blocks.1"),
    "no config": (save_gpt2, removed("config.json"), "config.json"),
    "no weights": (save_gpt2, removed("model.safetensors"), "no model.safetensors"),
    "torn": (save_gpt2, torn, UNSUPPORTED),
    "too many layers": (save_gpt2, edited_config(n_layer=10**9), "n_layer"),
    "missing weights": (
        save_gpt2,
        edited_config(n_layer=3),
        "12 of the model's weights are missing: transformer.h.2.",
    ),
    "images": (save_gpt2, written_config(ResNetConfig().to_json_string().encode()), UNSUPPORTED),
    "unknown type": (save_gpt2, written_config(b'{"model_type": "no_such_model"}'), UNSUPPORTED),
    "type no name": (save_gpt2, written_config(b'{"model_type": 3}'), UNSUPPORTED),
    "sizes do not fit": (save_gpt2, written_config(b'{"model_type": "gpt2"}'), UNSUPPORTED),
    "empty folder": (Path.exists, Path.exists, "no config.json or recipe.toml"),
    **{
        f"foreign {text!r}": (written_config(text), Path.exists, UNKNOWN)
        for text in (b"{}", b"[]", b"3", b'{"a": 1}', b'{"format": "other"}')
    },
    **{
        f"no JSON {text[:4]!r}": (written_config(text), Path.exists, UNREADABLE)
        for text in (b"", b"{", b"\xff\xfe", b"[" * 100_000)
    },
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_folder_without_a_usable_model_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    make, damage, message = DAMAGED[name]
    make(tmp_path)
    damage(tmp_path)
    assert message in refusal(tmp_path)


def test_names_without_a_model_are_refused_in_one_line(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent").endswith("absent: no such folder")
    message = refusal("no-such-owner/no-such-model")
    assert "no folder of that name, and not fetched from Hugging Face" in message
    marker = malicious_pickle(tmp_path / "model.pt")
    assert "give the folder" in refusal(tmp_path / "model.pt")
    assert not marker.exists()
    for target in ("x" * 5000, "a b c", "../no/such/folder", "a\0b"):
        with raises_one_line(TargetError):
            load_target(target)
