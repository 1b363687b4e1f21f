"""What `detect` can be pointed at, and what it refuses: one line each, and nothing is unpickled."""

import json
import pickle
from pathlib import Path
from typing import Any

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
from mechcausal.recipes import parse_recipe
from mechcausal.studies.detection import detect
from mechcausal.studies.targets import TargetError, load_target
from mechcausal.training.checkpoints import checkpoint_folders
from mechcausal.training.run import RunResult, train
from probes import InductionScores, attach
from probes.heads.stimuli import fitting_repeat_lengths
from probes.reading.padding import real_positions
from tests.hugging_face import BOS, malicious_pickle, save_gpt2
from tests.probes.wired import blank

LEAN = {
    "name": "lean",
    "task": {"kind": "repeated_tokens", "vocab_size": 12, "repeat_lengths": [3, 5]},
    "model": {"kind": "standard", "n_heads": 2, "d_model": 8},
    "training": {
        "algorithm": "joint",
        "batch_size": 4,
        "joint": {"steps": 4, "optimizer": "adam", "lr": 0.01},
    },
    "evaluation": {"n_sequences": 4},
    "probing": {"every": 2, "dense": 0, "images": 0, "report": False},
    "checkpoints": {"schedule": "probes"},
    "wandb": {"mode": "disabled"},
}


def refusal(target: Path | str, **options: Any) -> str:
    """The one line with which a target is refused, which names it."""
    with pytest.raises(TargetError) as caught:
        load_target(str(target), **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(target) in message
    return message


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run of four steps with checkpoints at 0, 2 and 4."""
    return train(parse_recipe(LEAN, source="test"), out=tmp_path_factory.mktemp("runs") / "run")


# --- Runs ---


def test_a_run_stands_for_its_final_weights(run: RunResult) -> None:
    target = load_target(str(run.folder))
    assert (target.name, target.folder) == (str(run.folder), run.folder)
    assert target.predicts_every_token
    assert target.bos == 0
    for name, value in run.experiment.hooked.named_parameters():
        assert torch.equal(dict(target.model.named_parameters())[name], value)


def test_a_run_and_a_step_stand_for_a_checkpoint(run: RunResult) -> None:
    assert list(checkpoint_folders(run.folder)) == [0, 2, 4]
    start, middle, end = (load_target(str(run.folder), step=step) for step in (0, 2, 4))
    assert middle.name == f"{run.folder}, step 2"
    assert middle.folder == run.folder
    saved = load_model(run.folder / "checkpoints" / "00000002")
    assert torch.equal(middle.model.embed.W_E, saved.embed.W_E)
    final = load_target(str(run.folder)).model.embed.W_E
    assert torch.equal(end.model.embed.W_E, final)
    assert not torch.equal(start.model.embed.W_E, final)


def test_a_step_without_a_checkpoint_names_those_there(run: RunResult) -> None:
    message = refusal(run.folder, step=3)
    assert "no checkpoint at step 3; there are: 0, 2, 4" in message


def test_a_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    recipe = parse_recipe(LEAN, source="test").with_overrides(checkpoints__schedule="none")
    train(recipe, out=tmp_path / "run")
    assert "there are: none" in refusal(tmp_path / "run", step=0)


def test_a_run_that_did_not_end_says_so(run: RunResult, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes((run.folder / "recipe.toml").read_bytes())
    assert "the run did not end" in refusal(tmp_path)


def test_a_causal_graph_run_predicts_its_last_token_alone(tmp_path: Path) -> None:
    data = {
        "graph": {"preset": "chain", "sequence_length": 8},
        "task": {"vocab_size": 3},
        "training": {"batch_size": 8, "stage1": {"steps": 1}, "stage2": {"steps": 0}},
        "evaluation": {"n_sequences": 8, "bayes_draws": 2, "theory_priors": 10},
        "wandb": {"mode": "disabled"},
    }
    train(parse_recipe(data, source="test"), out=tmp_path / "run")
    target = load_target(str(tmp_path / "run"))
    assert not target.predicts_every_token
    assert target.bos is None


# --- Folders of save_model ---


def test_any_saved_hooked_transformer_is_loaded(tmp_path: Path) -> None:
    model = blank(2, 3)
    save_model(model, tmp_path / "model")
    target = load_target(str(tmp_path / "model"))
    assert (target.folder, target.bos, target.predicts_every_token) == (None, None, True)
    tokens = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(target.model(tokens), model(tokens))


def test_a_step_goes_with_a_run_alone(tmp_path: Path) -> None:
    save_model(blank(1, 1), tmp_path)
    assert "--step goes with a run" in refusal(tmp_path, step=0)
    assert "--step goes with a run" in refusal("gpt2", step=0)


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors"])
def test_half_a_saved_model_is_refused(tmp_path: Path, absent: str) -> None:
    save_model(blank(1, 1), tmp_path)
    (tmp_path / absent).unlink()
    assert absent in refusal(tmp_path)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    save_model(blank(1, 2), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["config"]["n_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert "blocks.1" in refusal(tmp_path)


@pytest.mark.parametrize("maker", ["save_model", "hugging_face"])
def test_a_pickle_called_safetensors_is_refused_and_not_run(tmp_path: Path, maker: str) -> None:
    if maker == "save_model":
        save_model(blank(1, 1), tmp_path)
    else:
        save_gpt2(tmp_path)
    marker = malicious_pickle(tmp_path / "model.safetensors")
    assert refusal(tmp_path)
    assert not marker.exists()


# --- Hugging Face ---


@pytest.mark.parametrize("tokenizer", [False, True], ids=["tokens alone", "with tokenizer"])
def test_a_hugging_face_folder_gives_the_same_logits(tmp_path: Path, tokenizer: bool) -> None:
    original = save_gpt2(tmp_path, tokenizer=tokenizer)
    target = load_target(str(tmp_path))
    assert target.name == str(tmp_path)
    assert target.bos == ("auto" if tokenizer else None)
    assert target.predicts_every_token
    if tokenizer:
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
    found = detect(target)
    assert found.in_context is None
    assert "in_context" not in found.to_dict()
    # Every key is visible, one in a block repeated twice is the one looked for.
    lengths = fitting_repeat_lengths(32, 30)
    expected = [1 / (2 * lengths[i % len(lengths)]) for i in range(found.scores.sequences)]
    uniform = found.scores.uniform_baseline[0, 0].item()
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


def test_a_config_with_far_too_many_layers_is_refused_at_once(tmp_path: Path) -> None:
    save_gpt2(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 10**9}))
    assert "n_layer" in refusal(tmp_path)


def test_a_made_up_tokenizer_says_nothing_about_padding(tmp_path: Path) -> None:
    save_gpt2(tmp_path)
    model = load_target(str(tmp_path)).model
    tokens = torch.tensor([[0, 5, 6, 0, 5]])
    with attach(model, InductionScores()) as (scores,):
        model(tokens)
    assert scores.reading().sel(score="duplicate_token").values.isfinite().all()
    assert real_positions(model, tokens) is None


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.ckpt"])
def test_a_pickle_is_refused_as_weights_and_not_run(tmp_path: Path, name: str) -> None:
    save_gpt2(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    marker = malicious_pickle(tmp_path / name)
    assert f"{name} is a pickle, which is never opened" in refusal(tmp_path)
    assert not marker.exists()


def test_the_pickle_of_these_tests_does_run_when_it_is_opened(tmp_path: Path) -> None:
    marker = malicious_pickle(tmp_path / "pytorch_model.bin")
    pickle.loads((tmp_path / "pytorch_model.bin").read_bytes())
    assert marker.exists()


@pytest.mark.parametrize("way", ["other safetensors", "config", "index"])
def test_a_pickle_is_not_reached_by_a_detour(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files beside it, or names in JSON files, must not lead transformers to a pickle."""
    save_gpt2(tmp_path)
    marker = malicious_pickle(tmp_path / "pytorch_model.bin")
    weights = tmp_path / "model.safetensors"
    if way == "other safetensors":
        weights.rename(tmp_path / "adapter.safetensors")
    elif way == "config":
        config = json.loads((tmp_path / "config.json").read_text())
        config["transformers_weights"] = "pytorch_model.bin"
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        weights.rename(tmp_path / "shard.safetensors")
        index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "pytorch_model.bin"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    def load(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", load)
    message = refusal(tmp_path)
    assert "torch.load" not in message
    assert "pickle" in message
    assert not marker.exists()


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    save_gpt2(tmp_path)
    marker = tmp_path / "was_run"
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config |= {"model_type": "evil", "auto_map": names}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    assert "not loaded by transformers" in refusal(tmp_path)
    assert not marker.exists()


def test_a_sharded_model_is_loaded(tmp_path: Path) -> None:
    original = save_gpt2(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    original.save_pretrained(tmp_path, max_shard_size="3KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        logits = load_target(str(tmp_path)).model(tokens)
        torch.testing.assert_close(logits, original(tokens).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors"])
def test_half_a_hugging_face_model_is_refused(tmp_path: Path, absent: str) -> None:
    save_gpt2(tmp_path)
    (tmp_path / absent).unlink()
    assert {"config.json": absent, "model.safetensors": "none there"}[absent] in refusal(tmp_path)


def test_torn_weights_are_refused(tmp_path: Path) -> None:
    save_gpt2(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert "not loaded by transformers" in refusal(tmp_path)


@pytest.mark.parametrize(
    "config",
    [ResNetConfig(), {"model_type": "no_such_model"}, {"model_type": 3}, {"model_type": "gpt2"}],
    ids=["images", "unknown", "no name", "no sizes that fit"],
)
def test_an_architecture_that_is_not_supported_is_refused(tmp_path: Path, config: Any) -> None:
    save_gpt2(tmp_path)
    content = config if isinstance(config, dict) else json.loads(config.to_json_string())
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert "not loaded by transformers" in refusal(tmp_path)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    save_gpt2(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    message = refusal(tmp_path)
    assert "12 of the model's weights are missing: transformer.h.2." in message


def test_a_folder_that_is_not_there_is_not_looked_up(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent").endswith("absent: no such folder")


def test_a_name_that_cannot_be_fetched_is_refused_in_one_line() -> None:
    message = refusal("no-such-owner/no-such-model")
    assert "no folder of that name, and not fetched from Hugging Face" in message


# --- What is no model ---


def test_a_file_is_refused(tmp_path: Path) -> None:
    marker = malicious_pickle(tmp_path / "model.pt")
    assert "give the folder" in refusal(tmp_path / "model.pt")
    assert not marker.exists()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "no config.json or recipe.toml" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"a": 1}', '{"format": "other"}'])
def test_foreign_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    message = refusal(tmp_path)
    assert "neither written by save_model nor by Hugging Face" in message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert "not readable as JSON" in refusal(tmp_path)


@pytest.mark.parametrize("target", ["x" * 5000, "a b c", "../no/such/folder", "a\0b"])
def test_a_name_that_is_none_is_refused_in_one_line(target: str) -> None:
    with pytest.raises(TargetError) as caught:
        load_target(target)
    assert len(str(caught.value).splitlines()) == 1
