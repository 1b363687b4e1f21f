"""Load a model to probe: from a run, a saved HookedTransformer, or a Hugging Face model.

Only safetensors are read, nothing is unpickled, and a Hugging Face model's own code is never run.
"""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mechcausal.models import CONFIG_FILE, WEIGHTS_FILE
from mechcausal.models.adapter import (
    FORMAT,
    ModelFileError,
    load_with_extra,
    read_config,
    read_shapes,
)
from mechcausal.models.loading import kind_of
from mechcausal.records.run_folder import MODEL_FOLDER, RECIPE_FILE
from mechcausal.support.messages import excerpt, first_line
from mechcausal.training.checkpoints import checkpoint_folders
from probes import ProbeError
from probes.heads.stimuli import Bos
from probes.reading.passes import attends_ahead

# Allowed for any Hugging Face config, however few weights it comes with: entries of attention
# masks, and layers (some configs hold layer counts that no weights belong to).
_FREE_ENTRIES = 2**26
_FREE_LAYERS = 512
_MAX_VOCABULARY = 10_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


class TargetError(ValueError):
    """The target cannot be loaded or run; the message is one line that names it."""


@contextmanager
def running(name: str) -> Iterator[None]:
    """Turn errors from running a model in the block into a one-line TargetError.

    A model that loads may still not run: its parts may not fit together, or memory runs out.

    Args:
        name: name of the target.

    Raises:
        TargetError: the model cannot be run.
        ProbeError: raised by a probe, passed on unchanged.
    """
    try:
        yield
    except ProbeError:
        raise
    except (IndexError, MemoryError, RuntimeError) as error:
        raise TargetError(f"{name}: cannot be run: {first_line(error)}") from None


@dataclass(frozen=True)
class Target:
    """A model to probe.

    Attributes:
        name: name from the command line, with the step of a checkpoint.
        model: a HookedTransformer or TransformerBridge.
        bos: token that starts its sequences; None for none, "auto" for the tokenizer's choice.
        folder: the run folder, if the model comes from a run.
        predicts_every_token: whether it predicts the next token at every position. False for models
            that predict only at the query, and for models that attend to later tokens.
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
        step: step of a checkpoint in a run folder; the final weights when absent.
        device: device for the model.

    Raises:
        TargetError: it does not exist, cannot be read or cannot be fetched.
    """
    path = Path(target)
    try:
        if path.is_file():
            raise TargetError(f"{target}: a file; give the folder of a model or a run")
        is_run = (path / RECIPE_FILE).is_file()
    except OSError as error:  # e.g. the name is too long, or a folder may not be entered
        raise TargetError(f"{target}: {error.strerror or error}") from None
    if not path.exists() and (target.count("/") > 1 or target.startswith((".", "/", "~"))):
        raise TargetError(f"{target}: no such folder")
    if step is not None and not is_run:
        raise TargetError(f"{target}: --step goes with a run folder, and this is not one")
    try:
        if is_run:
            folder = _weights_folder(path, step)
            name = target if step is None else f"{target}, step {step}"
            return _load_saved(folder, name, device, run=path)
        if path.is_dir():
            return _from_folder(path, target, device)
    except ModelFileError as error:
        raise TargetError(str(error)) from None
    return _hugging_face(target, target, device, has_tokenizer=True)


def _weights_folder(run: Path, step: int | None) -> Path:
    """The folder of a run's final weights, or of a checkpoint's weights.

    Raises:
        TargetError: it does not exist.
    """
    if step is None:
        if not (run / MODEL_FOLDER).is_dir():
            raise TargetError(f"{run}: no final weights ({MODEL_FOLDER}/): the run did not end")
        return run / MODEL_FOLDER
    folders = checkpoint_folders(run)
    if step not in folders:
        available = ", ".join(map(str, folders)) or "none"
        raise TargetError(f"{run}: no checkpoint at step {step}; there are: {available}")
    return folders[step]


def _load_saved(folder: Path, name: str, device: str, *, run: Path | None = None) -> Target:
    model, extra = load_with_extra(folder, device=device)
    bos = extra.get("bos")
    kind = kind_of(extra)
    if kind is not None:
        kind.from_saved(folder, model, extra)  # checks the wiring
    # Models of a causal graph predict only at the last position.
    with running(name):
        is_language_model = ("bos" in extra or kind is None) and not attends_ahead(model)
    return Target(name, model, bos if isinstance(bos, int) else None, run, is_language_model)


def _from_folder(path: Path, name: str, device: str) -> Target:
    config_path = path / CONFIG_FILE
    if not config_path.exists():
        raise TargetError(f"{path}: no {CONFIG_FILE} or {RECIPE_FILE} in it: no model")
    config = read_config(config_path)
    if isinstance(config, dict) and config.get("format") == FORMAT:
        return _load_saved(path, name, device)
    if not isinstance(config, dict) or "model_type" not in config:
        raise TargetError(f"{config_path}: neither written by save_model nor by Hugging Face")
    check_weights(path, config)
    has_tokenizer = any((path / file).is_file() for file in TOKENIZER_FILES)
    return _hugging_face(str(path), name, device, has_tokenizer=has_tokenizer)


def check_weights(path: Path, config: dict[str, Any]) -> None:
    """Refuse a folder from which transformers would load anything but safetensors.

    Raises:
        TargetError: there are no weights, or a pickle is among them.
    """
    index = path / f"{WEIGHTS_FILE}.index.json"
    shards: list[Any] = []
    if "transformers_weights" in config:  # may name any file, also a pickle
        shards = [config["transformers_weights"]]
    elif not (path / WEIGHTS_FILE).is_file() and index.is_file():
        try:
            shards = [*read_config(index)["weight_map"].values()]
        except (ModelFileError, KeyError, TypeError, AttributeError):
            raise TargetError(f"{index}: not an index of weights") from None
    elif not (path / WEIGHTS_FILE).is_file():
        shards = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        if not shards:
            raise TargetError(f"{path}: weights are read from {WEIGHTS_FILE} alone: none there")
    other = next((shard for shard in shards if not str(shard).endswith(".safetensors")), None)
    if other is not None:
        raise TargetError(
            f"{path}: weights are read from safetensors alone: "
            f"{excerpt(other)} is a pickle, which is never opened"
        )
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise TargetError(f"{path}: weights named outside of the folder: {excerpt(shard)}")


def _hugging_face(source: str, name: str, device: str, *, has_tokenizer: bool) -> Target:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers.utils import logging as hf_logging

    is_folder = Path(source).is_dir()
    options: dict[str, Any] = {}
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers_logging: Any = hf_logging
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not has_tokenizer:
                options["tokenizer"] = _placeholder_tokenizer(Path(source))
            model = TransformerBridge.boot_transformers(
                source, device=device, model_class=_CompleteModel, **options
            )
    except Exception as error:  # the libraries may raise anything: give the user one line
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = excerpt(lines[0], 120) if lines else type(error).__name__
        if is_folder:
            raise TargetError(f"{name}: not loaded by transformers: {reason}") from None
        raise TargetError(
            f"{name}: no folder of that name, and not fetched from Hugging Face: {reason}"
        ) from None
    finally:
        if shows_progress:
            transformers_logging.enable_progress_bar()
    if not has_tokenizer:
        model.tokenizer = None  # the placeholder's BOS and PAD mean nothing
    bos: Bos = "auto" if has_tokenizer else None
    with running(name):
        return Target(name, model, bos, predicts_every_token=not attends_ahead(model))


class _CompleteModel:
    """Loads a bridge's model class from safetensors, and only if no weight is missing.

    By default transformers would fall back to a pickle, and fill missing weights at random.
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
        if Path(source).is_dir():
            _check_sizes(Path(source), config, model_class)
        options |= {"use_safetensors": True, "output_loading_info": True}
        model, loading_info = model_class.from_pretrained(source, config=config, **options)
        missing = sorted(loading_info["missing_keys"])
        if missing:
            raise ValueError(
                f"{len(missing)} of the model's weights are missing: {missing[0]}, ..."
            )
        return model


def _check_sizes(folder: Path, config: Any, model_class: Any) -> None:
    """Before allocating anything, refuse a config that needs far more than its weights hold.

    Raises:
        ValueError: more layers, tokens or parameters than the weights can fill.
    """
    shapes = [
        shape for file in folder.glob("*.safetensors") for shape in read_shapes(file).values()
    ]
    stored = sum(map(math.prod, shapes))
    for name, value in config.to_dict().items():
        # Each layer costs a Python object and each token a word of a tokenizer.
        limit = None
        if "layer" in name:
            limit = max(len(shapes), _FREE_LAYERS)
        elif name == "vocab_size":
            limit = stored
        if limit is not None and isinstance(value, int) and value > limit:
            raise ValueError(f"{excerpt(name)} is {value}, but there are {len(shapes)} weights")
    with torch.device("meta"):
        model = model_class.from_config(config, trust_remote_code=False)
    needed = sum(value.numel() for value in (*model.parameters(), *model.buffers()))
    # Tied weights are stored once; masks of small models may be larger than their weights.
    if needed > 4 * stored + _FREE_ENTRIES:
        raise ValueError(f"the config needs {needed:,} numbers, the weights are {stored:,}")


def _placeholder_tokenizer(folder: Path) -> Any:
    """A tokenizer that calls token i "i": a bridge needs one even for tokens given as numbers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, PreTrainedTokenizerFast

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not 0 < config.vocab_size <= _MAX_VOCABULARY:
        raise ValueError(f"vocab_size is {config.vocab_size}, at most {_MAX_VOCABULARY} is allowed")
    words = WordLevel({str(i): i for i in range(config.vocab_size)}, unk_token="0")
    # No BOS token: a bridge reloads tokenizers that have one from a file.
    special = {f"{kind}_token": "0" for kind in ("eos", "pad", "unk")}
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=Tokenizer(words), **special)
