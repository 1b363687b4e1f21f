"""The one place that touches TransformerLens classes: building, saving and loading models.

Hook names come from `probes.hook_names`; everything else in the laboratory goes through here.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformer_lens import HookedTransformer, HookedTransformerConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = "mechcausal-hooked-transformer-1"


class ModelFileError(ValueError):
    """A model folder that cannot be read; the message is one line that names the file."""


def build_hooked(config: HookedTransformerConfig) -> HookedTransformer:
    """A HookedTransformer, without the deprecation notice of TransformerLens 3.9."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"transformer_lens")
        warnings.filterwarnings("ignore", message=r".*HookedTransformer.*deprecated.*")
        return HookedTransformer(config, move_to_device=True)


def wired_config(
    vocab_size: int,
    sequence_length: int,
    *,
    n_layers: int,
    n_heads: int,
    d_model: int,
    d_head: int,
    device: str,
) -> HookedTransformerConfig:
    """The config of a model whose weights are set by hand: attention alone, no norm, no scale."""
    return HookedTransformerConfig(
        n_layers=n_layers,
        n_heads=n_heads,
        d_model=d_model,
        d_head=d_head,
        d_vocab=vocab_size,
        d_vocab_out=vocab_size,
        n_ctx=sequence_length,
        attn_only=True,
        normalization_type=None,
        use_attn_scale=False,
        positional_embedding_type="standard",
        attention_dir="causal",
        default_prepend_bos=False,
        init_weights=False,
        seed=None,
        device=device,
    )


def save_model(
    model: HookedTransformer, folder: str | Path, *, extra: dict[str, Any] | None = None
) -> None:
    """Write `config.json` and `model.safetensors` for any HookedTransformer.

    Args:
        model: the model; its tokenizer, if any, is not saved.
        folder: made if absent.
        extra: JSON values kept in the config under "extra" (which closed form, its sizes, ...).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        key: value
        for key, value in model.cfg.to_dict().items()
        if isinstance(value, bool | int | float | str | list | dict | None)
    }
    config["dtype"] = str(model.cfg.dtype).removeprefix("torch.")
    content = {"format": FORMAT, "config": config, "extra": extra or {}}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    weights = {name: value.detach().cpu().contiguous() for name, value in _weights(model).items()}
    (folder / WEIGHTS_FILE).write_bytes(save(weights))


def load_model(folder: str | Path, *, device: str = "cpu") -> HookedTransformer:
    """Read a model that `save_model` wrote; nothing is unpickled.

    Raises:
        ModelFileError: a missing, foreign or damaged file, or weights that do not fit the config.
    """
    return build_from_files(folder, device=device)[0]


def build_from_files(
    folder: str | Path, *, device: str = "cpu"
) -> tuple[HookedTransformer, dict[str, Any]]:
    """The model in a folder and the `extra` values that were saved with it.

    Raises:
        ModelFileError: see `load_model`.
    """
    config_path, weights_path = Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE
    try:
        content = json.loads(config_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{config_path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{config_path}: not readable as JSON: {error}") from None
    try:
        weights = load_file(weights_path)
    except FileNotFoundError:
        raise ModelFileError(f"{weights_path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{weights_path}: not a safetensors file: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelFileError(f"{config_path}: not a config that save_model wrote ({FORMAT})")
    try:
        values = dict(content["config"])
        values["dtype"] = getattr(torch, values["dtype"])
        values["device"] = device
        # Building would fetch the tokenizer, and run its code where the config trusts it.
        values["tokenizer_name"] = None
        extra = dict(content.get("extra", {}))
        model = build_hooked(HookedTransformerConfig(**values))
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFileError(f"{config_path}: does not describe {weights_path}: {reason}") from None
    # Buffers (masks) are made by the config; parameters must all be there, and nothing else.
    absent = sorted(set(missing) & set(dict(model.named_parameters())))
    if absent or unexpected:
        detail = f"missing {absent[:3]}" if absent else f"unexpected {sorted(unexpected)[:3]}"
        raise ModelFileError(f"{weights_path}: weights do not fit {config_path}: {detail}")
    return model, extra


def _weights(model: HookedTransformer) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())
