"""Models in Hugging Face's format: only safetensors are read, and their own code is never run."""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mechcausal.models import CONFIG_FILE, WEIGHTS_FILE
from mechcausal.models.adapter import ModelFileError, read_config, read_shapes
from mechcausal.support.messages import excerpt, first_line

# Allowed for any Hugging Face config, however few weights it comes with: entries of attention
# masks, and layers (some configs hold layer counts that no weights belong to).
_FREE_ENTRIES = 2**26
_FREE_LAYERS = 512
_MAX_VOCABULARY = 10_000_000
_INVENTED_BOS = "<|endoftext|>"  # also the real one of GPT-2 and others
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


class TargetError(ValueError):
    """A model cannot be loaded or run; the message is one line that names it."""


def read_model_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json; refuses weights that are not safetensors.

    Raises:
        ModelFileError: there is no config, or it is not JSON.
        TargetError: the config is not Hugging Face's, or the weights are not safetensors.
    """
    config = read_config(folder / CONFIG_FILE)
    if not isinstance(config, dict) or "model_type" not in config:
        raise TargetError(
            f"{folder / CONFIG_FILE}: neither written by save_model nor by Hugging Face"
        )
    _check_weights(folder, config)
    return config


def _check_weights(path: Path, config: dict[str, Any]) -> None:
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
        shards = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if not shards:
            raise TargetError(f"{path}: no {WEIGHTS_FILE}, the only weights that are read")
    other = next((shard for shard in shards if not str(shard).endswith(".safetensors")), None)
    if other is not None:
        raise TargetError(
            f"{path}: weights are read from safetensors alone: "
            f"{excerpt(other)} is a pickle, which is never opened"
        )
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise TargetError(f"{path}: weights named outside of the folder: {excerpt(shard)}")


@contextmanager
def loading(failure: str) -> Iterator[None]:
    """Let transformers load something: it prints nothing, and its errors become one line.

    Args:
        failure: the beginning of the message, before the reason.

    Raises:
        TargetError: the block raised an exception.
    """
    from transformers.utils import logging as hf_logging

    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers_logging: Any = hf_logging
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # the libraries may raise anything: give the user one line
        raise TargetError(f"{failure}: {excerpt(first_line(error), 120)}") from None
    finally:
        if shows_progress:
            transformers_logging.enable_progress_bar()


def load_complete(model_class: Any, source: str, **options: Any) -> Any:
    """Load a model from safetensors; by default transformers fills missing weights at random.

    Raises:
        ValueError: weights are missing.
    """
    model, info = model_class.from_pretrained(
        source, use_safetensors=True, output_loading_info=True, **options
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{len(missing)} of the model's weights are missing: {missing[0]}, ...")
    return model


def load_bridge(source: str, *, device: str, has_tokenizer: bool) -> nn.Module:
    """A TransformerBridge from a folder or a model's name.

    Args:
        source: the folder or the name.
        device: device of the model.
        has_tokenizer: whether a tokenizer comes with the model.

    Raises:
        TargetError: it cannot be loaded, or not be fetched.
    """
    from transformer_lens.model_bridge import TransformerBridge

    failure = f"{source}: not loaded by transformers"
    if not Path(source).is_dir():
        failure = f"{source}: no folder of that name, and not fetched from Hugging Face"
    with loading(failure):
        options: dict[str, Any] = {}
        if not has_tokenizer:
            options["tokenizer"] = _placeholder_tokenizer(Path(source))
        model = TransformerBridge.boot_transformers(
            source, device=device, model_class=_CompleteModel, **options
        )
        if has_tokenizer and _has_invented_bos(model, source):
            model.cfg.default_prepend_bos = False
    if not has_tokenizer:
        model.tokenizer = None  # the placeholder's BOS and PAD mean nothing
    return model


def _has_invented_bos(model: Any, source: str) -> bool:
    """Whether TransformerLens gave the BOS to a tokenizer that has neither BOS nor EOS.

    The model does not know it: it is the unknown token, or a new one.
    """
    from transformers import AutoTokenizer

    if getattr(model.tokenizer, "bos_token", None) != _INVENTED_BOS:
        return False
    auto_tokenizer: Any = AutoTokenizer
    own = auto_tokenizer.from_pretrained(source, trust_remote_code=False)
    return own.bos_token is None and own.eos_token is None


class _CompleteModel:
    """Loads a bridge's model class with `load_complete`."""

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
        return load_complete(model_class, source, config=config, **options)


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
