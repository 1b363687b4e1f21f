"""The one place that touches TransformerLens classes: building, saving and loading models.

Hook names come from `probes.reading.hook_names`; everything else in the laboratory goes through here.
"""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from transformer_lens import HookedTransformer, HookedTransformerConfig

from mechcausal.models.file_names import CONFIG_FILE, WEIGHTS_FILE
from mechcausal.support.messages import excerpt

FORMAT = "mechcausal-hooked-transformer-1"
MAX_CONFIG_BYTES = 16 * 2**20
"""The largest config read."""
MAX_BUFFER_ENTRIES = 2**28
"""The most entries of masks and other tables that a config may ask for, beside the weights."""
_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


class ModelFileError(ValueError):
    """A model folder that cannot be read; the message is one line that names the file."""


def build_hooked(
    config: HookedTransformerConfig, *, move_to_device: bool = True
) -> HookedTransformer:
    """A HookedTransformer, without the deprecation notice of TransformerLens 3.9."""
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
    for path in (config_path, weights_path):
        check_inside(path)
    content = read_config(config_path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelFileError(f"{config_path}: not a config that save_model wrote ({FORMAT})")
    try:
        shapes = read_shapes(weights_path, floats=True)
        values = dict(content["config"])
        values["dtype"] = _DTYPES[values["dtype"]]
        # Building would fetch the tokenizer, and run its code where the config trusts it.
        values["tokenizer_name"] = None
        extra = dict(content.get("extra", {}))
        _check_types(values)
        _check_sizes(values, shapes)
        model = build_hooked(HookedTransformerConfig(**{**values, "device": device}))
        weights = load_file(weights_path)
        # Buffers are made by the config; that no parameter is missing was found out before.
        _, unexpected = model.load_state_dict(weights, strict=False)
    except ModelFileError:
        raise
    except FileNotFoundError:
        raise ModelFileError(f"{weights_path}: no such file") from None
    except (OSError, SafetensorError) as error:
        reason = excerpt(error, 80)
        raise ModelFileError(f"{weights_path}: not a safetensors file: {reason}") from None
    except Exception as error:  # whatever TransformerLens makes of values that make no sense
        reason = excerpt(error, 80) or type(error).__name__
        raise ModelFileError(f"{config_path}: does not describe {weights_path}: {reason}") from None
    if unexpected:
        detail = excerpt(f"unexpected {sorted(unexpected)[:3]}", 80)
        raise ModelFileError(f"{weights_path}: weights do not fit {config_path}: {detail}")
    return model, extra


def read_config(path: Path) -> Any:
    """The JSON in a file.

    Raises:
        ModelFileError: not there, larger than `MAX_CONFIG_BYTES`, or not JSON.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe could block, a device never end
            raise ModelFileError(f"{path}: not a plain file")
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise ModelFileError(f"{path}: more than {MAX_CONFIG_BYTES} bytes")
        return json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file") from None
    except ModelFileError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not readable as JSON: {excerpt(error, 80)}") from None


def check_inside(path: Path) -> None:
    """Refuse a file of a model's folder that is a link to somewhere else.

    Raises:
        ModelFileError: it leads out of its folder.
    """
    try:
        inside = path.resolve().is_relative_to(path.parent.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, a null character
        inside = False
    if not inside:
        raise ModelFileError(f"{path}: a link that leads out of its folder, which is not followed")


def read_shapes(path: Path, *, floats: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file's tensors, from its header alone.

    Args:
        path: of a safetensors file.
        floats: whether it may hold floating-point numbers alone.

    Raises:
        ModelFileError: no plain file, or a tensor that holds no floating-point numbers.
        SafetensorError, OSError: not such a file, or not readable.
    """
    if path.exists() and not path.is_file():
        raise ModelFileError(f"{path}: not a plain file")
    shapes = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (the file is no mapping)
            tensor = file.get_slice(name)
            if floats and "F" not in tensor.get_dtype():
                raise ModelFileError(
                    f"{path}: {excerpt(name)} is of type {excerpt(tensor.get_dtype())}, no float"
                )
            shapes[name] = tuple(tensor.get_shape())
    return shapes


def _check_types(values: Mapping[str, Any]) -> None:
    """Whether every value has its field's type: some are looked at in a forward pass alone."""
    hints = get_type_hints(HookedTransformerConfig)
    for name, value in values.items():
        if value is None or name == "dtype" or name not in hints:
            continue
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError:
            raise ValueError(f"{excerpt(name)} is {excerpt(json.dumps(value))}") from None


def _check_sizes(values: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Build the model without memory, and compare its shapes with the file's.

    Else a config of a few bytes could ask for any amount of memory.
    """
    # Every layer and every expert is a Python object: no more of them than the file has weights.
    counts = [values.get(name) or 0 for name in ("n_layers", "num_experts")]
    if any(count > len(shapes) for count in counts):
        raise ValueError(f"{max(counts)} layers or experts, but {len(shapes)} weights")
    with torch.device("meta"):
        config = HookedTransformerConfig(**{**values, "device": "meta"})
        model = build_hooked(config, move_to_device=False)
    for name, parameter in model.named_parameters():
        if name in shapes and tuple(parameter.shape) != shapes[name]:
            found, needed = shapes[name], tuple(parameter.shape)
            raise ValueError(f"{name} has the shape {found}, the config needs {needed}")
    absent = [name for name, _ in model.named_parameters() if name not in shapes]
    if absent:
        raise ValueError(f"missing {absent[:3]}")
    buffers = sum(math.prod(buffer.shape) for buffer in model.buffers())
    if buffers > MAX_BUFFER_ENTRIES:
        raise ValueError(f"masks of {buffers:,} entries")


def _weights(model: HookedTransformer) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())
