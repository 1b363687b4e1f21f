"""What `detect` can be pointed at: a run, a saved HookedTransformer, or a Hugging Face model.

Nothing is unpickled: weights are read from safetensors alone, and code that comes with a Hugging
Face model is never run.
"""

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mechcausal.models.adapter import (
    CONFIG_FILE,
    FORMAT,
    WEIGHTS_FILE,
    ModelFileError,
    build_from_files,
)
from mechcausal.models.loading import KINDS
from mechcausal.tracking import RECIPE_FILE
from mechcausal.training import CHECKPOINTS_FOLDER, MODEL_FOLDER
from probes.stimuli import Bos

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


class TargetError(ValueError):
    """A target that cannot be loaded; the message is one line that names it."""


@dataclass(frozen=True)
class Target:
    """A model to look at.

    Attributes:
        name: what the user called it, with the step of a checkpoint.
        model: a HookedTransformer or TransformerBridge.
        bos: token that its sequences start with, None for none, "auto" for what its tokenizer asks.
        folder: the run folder, where there is one.
        predicts_every_token: False for models that give probabilities for their query alone.
    """

    name: str
    model: nn.Module
    bos: Bos
    folder: Path | None = None
    predicts_every_token: bool = True


def load_target(target: str, *, step: int | None = None, device: str = "cpu") -> Target:
    """Load a model.

    Args:
        target: a run folder; a folder that `save_model` wrote; a folder with a Hugging Face model
            in safetensors; or the name of a Hugging Face model.
        step: a checkpoint of a run folder, its final weights when absent.
        device: where to put it.

    Raises:
        TargetError: not there, not readable, or not fetched; the message names it.
    """
    path = Path(target)
    try:
        if path.is_file():
            raise TargetError(f"{target}: a file; give the folder of a model or a run")
        is_run = (path / RECIPE_FILE).is_file()
    except OSError as error:  # too long a name, a folder that may not be entered
        raise TargetError(f"{target}: {error.strerror or error}") from None
    if not path.exists() and (target.count("/") > 1 or target.startswith((".", "/", "~"))):
        raise TargetError(f"{target}: no such folder")
    if step is not None and not is_run:
        raise TargetError(f"{target}: --step goes with a run folder, and this is none")
    try:
        if is_run:
            folder = checkpoint_folder(path, step)
            name = target if step is None else f"{target}, step {step}"
            return _saved(folder, name, device, run=path)
        if path.is_dir():
            return _from_folder(path, target, device)
    except ModelFileError as error:
        raise TargetError(str(error)) from None
    return _hugging_face(target, target, device, has_tokenizer=True)


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints of a run folder by step, in order."""
    folders = sorted((run / CHECKPOINTS_FOLDER).glob("*"))
    return {int(folder.name): folder for folder in folders if folder.name.isdigit()}


def checkpoint_folder(run: Path, step: int | None) -> Path:
    """The folder of a run's final weights, or of those at a step.

    Raises:
        TargetError: there are none.
    """
    if step is None:
        if not (run / MODEL_FOLDER).is_dir():
            raise TargetError(f"{run}: no final weights ({MODEL_FOLDER}/): the run did not end")
        return run / MODEL_FOLDER
    found = checkpoints(run)
    if step not in found:
        there = ", ".join(map(str, found)) or "none (probing.checkpoints was off)"
        raise TargetError(f"{run}: no checkpoint at step {step}; there are: {there}")
    return found[step]


def _saved(folder: Path, name: str, device: str, *, run: Path | None = None) -> Target:
    model, extra = build_from_files(folder, device=device)
    bos = extra.get("bos")
    # Models of a causal graph say what follows the last position alone.
    language_model = "bos" in extra or extra.get("kind") not in {kind.kind for kind in KINDS}
    return Target(name, model, bos if isinstance(bos, int) else None, run, language_model)


def _from_folder(path: Path, name: str, device: str) -> Target:
    config_path = path / CONFIG_FILE
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TargetError(f"{path}: no {CONFIG_FILE} or {RECIPE_FILE} in it: no model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"{config_path}: not readable as JSON: {error}") from None
    if isinstance(config, dict) and config.get("format") == FORMAT:
        return _saved(path, name, device)
    if not isinstance(config, dict) or "model_type" not in config:
        raise TargetError(f"{config_path}: neither written by save_model nor by Hugging Face")
    check_weights(path, config)
    has_tokenizer = any((path / file).is_file() for file in TOKENIZER_FILES)
    return _hugging_face(str(path), name, device, has_tokenizer=has_tokenizer)


def check_weights(path: Path, config: dict[str, Any]) -> None:
    """Refuse a folder in which transformers would reach for anything but safetensors.

    Raises:
        TargetError: no weights, or a pickle among them.
    """
    index = path / f"{WEIGHTS_FILE}.index.json"
    shards: list[Any] = []
    if "transformers_weights" in config:  # names a file of its own, whatever its kind
        shards = [config["transformers_weights"]]
    elif not (path / WEIGHTS_FILE).is_file() and index.is_file():
        try:
            shards = [*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()]
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise TargetError(f"{index}: not an index of weights") from None
    elif not (path / WEIGHTS_FILE).is_file():
        shards = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        if not shards:
            raise TargetError(f"{path}: weights are read from {WEIGHTS_FILE} alone: none there")
    other = next((shard for shard in shards if not str(shard).endswith(".safetensors")), None)
    if other is not None:
        raise TargetError(
            f"{path}: weights are read from safetensors alone: "
            f"{other} is a pickle, which is never opened"
        )


def _hugging_face(source: str, name: str, device: str, *, has_tokenizer: bool) -> Target:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers.utils import logging as its_logging

    is_folder = Path(source).is_dir()
    options: dict[str, Any] = {}
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers_logging: Any = its_logging
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not has_tokenizer:
                options["tokenizer"] = _placeholder_tokenizer(Path(source))
            model = TransformerBridge.boot_transformers(
                source, device=device, model_class=_WholeModel, **options
            )
    except Exception as error:  # whatever the libraries raise: the user gets one line
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        if is_folder:
            raise TargetError(f"{name}: not loaded by transformers: {reason}") from None
        raise TargetError(
            f"{name}: no folder of that name, and not fetched from Hugging Face: {reason}"
        ) from None
    finally:
        if shows_progress:
            transformers_logging.enable_progress_bar()
    return Target(name, model, "auto" if has_tokenizer else None)


class _WholeModel:
    """Loads the class that a bridge would take, from safetensors, and only if no weight is missing.

    transformers alone would open a pickle where there is nothing else, and fill in random weights.
    """

    @staticmethod
    def from_pretrained(source: str, *, config: Any, **options: Any) -> Any:
        """The model.

        Raises:
            ValueError: weights are missing.
        """
        from transformer_lens.model_bridge.sources import transformers as bridge

        architecture = bridge.determine_architecture_from_hf_config(config)
        model_class: Any = bridge.get_hf_model_class_for_architecture(architecture)
        options |= {"use_safetensors": True, "output_loading_info": True}
        model, found = model_class.from_pretrained(source, config=config, **options)
        missing = sorted(found["missing_keys"])
        if missing:
            raise ValueError(
                f"{len(missing)} of the model's weights are missing: {missing[0]}, ..."
            )
        return model


def _placeholder_tokenizer(folder: Path) -> Any:
    """A bridge wants a tokenizer, also where tokens are given as numbers: token i is called i."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, PreTrainedTokenizerFast

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    words = WordLevel({str(i): i for i in range(config.vocab_size)}, unk_token="0")
    # Without a BOS: a bridge would load a tokenizer that has one anew, from a file.
    special = {f"{kind}_token": "0" for kind in ("eos", "pad", "unk")}
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=Tokenizer(words), **special)
