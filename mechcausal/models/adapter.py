"""Build, save and load TransformerLens models.

This module alone knows whether TransformerLens has a HookedTransformer (up to 3.x) or this package
brings its own (from 4.0 on); everything else imports `HookedTransformer` from here. Hook names come
from `probes.reading.hook_names`.
"""

import json
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from mechcausal.models import CONFIG_FILE, WEIGHTS_FILE
from mechcausal.models.wired_weights import plain_weights
from mechcausal.support.messages import excerpt

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:  # 4.x has neither
    from mechcausal.models.hooked_config import (  # type: ignore[assignment]
        HookedTransformerConfig,
    )
    from mechcausal.models.hooked_transformer import (  # type: ignore[assignment]
        HookedTransformer,
    )

__all__ = [
    "HookedTransformer",
    "HookedTransformerConfig",
    "ModelFileError",
    "build_hooked",
    "load_model",
    "load_with_extra",
    "read_config",
    "read_shapes",
    "save_model",
    "wired_config",
]

FORMAT = "mechcausal-hooked-transformer-1"
MAX_CONFIG_BYTES = 16 * 2**20
"""Larger configs are refused."""
_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


class ModelFileError(ValueError):
    """A model folder cannot be read; the message is one line that names the file."""


def build_hooked(
    config: HookedTransformerConfig, *, move_to_device: bool = True
) -> HookedTransformer:
    """Build a HookedTransformer without the deprecation warning of TransformerLens 3.9."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"transformer_lens")
        warnings.filterwarnings("ignore", message=r".*HookedTransformer.*deprecated.*")
        return HookedTransformer(config, move_to_device=move_to_device)


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
    """The config of an attention-only model with hand-set weights, without norm or scale."""
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
        model: its tokenizer, if any, is not saved.
        folder: created if absent.
        extra: JSON values stored in the config under "extra" (kind of model, its sizes, ...).
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
    named = plain_weights(model).items()
    weights = {name: value.cpu().contiguous() for name, value in named}
    (folder / WEIGHTS_FILE).write_bytes(save(weights))


def load_model(folder: str | Path, *, device: str = "cpu") -> HookedTransformer:
    """Read a model that `save_model` wrote; nothing is unpickled.

    Raises:
        ModelFileError: a file is missing, damaged or not from `save_model`, or the weights do not
            fit the config.
    """
    return load_with_extra(folder, device=device)[0]


def load_with_extra(
    folder: str | Path, *, device: str = "cpu"
) -> tuple[HookedTransformer, dict[str, Any]]:
    """Read a model and the `extra` values that were saved with it.

    Raises:
        ModelFileError: see `load_model`.
    """
    config_path, weights_path = Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE
    _check_inside(config_path)
    _check_inside(weights_path)
    content = read_config(config_path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelFileError(f"{config_path}: not a config that save_model wrote ({FORMAT})")
    shapes = read_shapes(weights_path, only_floats=True)
    try:
        # With a name, TransformerLens would download the tokenizer and might run its code.
        values = {**content["config"], "tokenizer_name": None}
        values["dtype"] = _DTYPES[values["dtype"]]
        extra = dict(content.get("extra", {}))
        _check_types(values)
        _check_shapes(values, shapes)
        model = build_hooked(HookedTransformerConfig(**{**values, "device": device}))
        # Not strict: the buffers are not in the file, and `_check_shapes` saw every parameter.
        model.load_state_dict(load_file(weights_path), strict=False)
    except Exception as error:  # TransformerLens raises many types for invalid values
        reason = excerpt(error, 80) or type(error).__name__
        raise ModelFileError(f"{config_path}: does not describe {weights_path}: {reason}") from None
    return model, extra


def read_config(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ModelFileError: missing, larger than `MAX_CONFIG_BYTES`, or not JSON.
    """
    _check_plain(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise ValueError(f"more than {MAX_CONFIG_BYTES} bytes")
        return json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not readable as JSON: {excerpt(error, 80)}") from None


def read_shapes(path: Path, *, only_floats: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors, read from its header only.

    Raises:
        ModelFileError: not a readable safetensors file, or (with `only_floats`) a tensor is not
            floating point.
    """
    _check_plain(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            dtypes = {name: tensor.get_dtype() for name, tensor in tensors.items()}
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
    except (OSError, SafetensorError) as error:
        reason = excerpt(error, 80)
        raise ModelFileError(f"{path}: not a safetensors file: {reason}") from None
    for name, dtype in dtypes.items():
        if only_floats and "F" not in dtype:
            raise ModelFileError(f"{path}: {excerpt(name)} has dtype {dtype}, allowed are floats")
    return shapes


def _check_inside(path: Path) -> None:
    """Refuse a file that is a link out of its model folder."""
    try:
        inside = path.resolve().is_relative_to(path.parent.resolve())
    except (OSError, RuntimeError, ValueError):  # a cycle of links, a null character
        inside = False
    if not inside:
        raise ModelFileError(f"{path}: links to a file outside of its folder")


def _check_plain(path: Path) -> None:
    """Refuse a missing file, and a folder, pipe or device: reading a pipe could block."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # e.g. a folder may not be entered
        raise ModelFileError(f"{path}: not readable: {excerpt(error, 80)}") from None
    if not stat.S_ISREG(mode):
        raise ModelFileError(f"{path}: not a plain file")


def _check_types(values: Mapping[str, Any]) -> None:
    """Check the type of every value: TransformerLens reads some only in a forward pass."""
    hints = get_type_hints(HookedTransformerConfig)
    for name, value in values.items():
        if value is None or name == "dtype" or name not in hints:
            continue
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError:
            raise ValueError(f"{excerpt(name)} is {excerpt(json.dumps(value))}") from None


def _check_shapes(values: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the file's shapes with those of the model, which is built on the meta device.

    Otherwise a small config could allocate any amount of memory.
    """
    # Layers and experts are Python objects even on the meta device: limit them by the weights.
    counts = [values.get(name) or 0 for name in ("n_layers", "num_experts")]
    if any(count > len(shapes) for count in counts):
        raise ValueError(f"{max(counts)} layers or experts, but {len(shapes)} weights")
    with torch.device("meta"):
        config = HookedTransformerConfig(**{**values, "device": "meta"})
        model = build_hooked(config, move_to_device=False)
    needed = {name: tuple(value.shape) for name, value in model.named_parameters()}
    for name in sorted(needed.keys() | shapes.keys()):
        if shapes.get(name) != needed.get(name):
            raise ValueError(
                f"{name} has the shape {shapes.get(name)}, the config needs {needed.get(name)}"
            )
