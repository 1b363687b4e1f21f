"""Checkpoints: all that a run needs to go on as if it had never stopped.

One folder a checkpoint, `checkpoints/<step>`, that appears whole or not at all:

    model.safetensors, config.json   the weights, as `save_model` writes them
    state.safetensors                the optimizer's and every generator's state
    checkpoint.json                  step, stage, recipe, versions, and a checksum of each file

A checkpoint of step k was taken before the batch of step k was drawn. Reading one unpickles
nothing, and refuses whatever its checksums do not vouch for.
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mechcausal import __version__
from mechcausal.models.file_names import CONFIG_FILE, WEIGHTS_FILE
from mechcausal.recipes import recipe_to_dict
from mechcausal.support.files import write_folder_atomically
from mechcausal.support.messages import excerpt
from mechcausal.training.experiments import Experiment, Generators

CHECKPOINTS_FOLDER = "checkpoints"
STATE_FILE = "state.safetensors"
MANIFEST_FILE = "checkpoint.json"
FORMAT = "mechcausal-checkpoint-1"

_FILES = (CONFIG_FILE, WEIGHTS_FILE, STATE_FILE)
_GENERATORS = ("data", "evaluation", "theory")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line that names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read, its checksums verified.

    Attributes:
        folder: where it lies.
        step: steps that had been done.
        stage: name of the stage that the next step belongs to.
        recipe: the run's recipe as plain values.
        environment: versions, device and threads of the process that wrote it.
        weights: parameters by name.
        optimizer: state of every parameter of the stage, by its number and the state's name; empty
            where the stage had not begun.
        generators: state of each generator, by name.
    """

    folder: Path
    step: int
    stage: str
    recipe: dict[str, Any]
    environment: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]
    generators: dict[str, Tensor]

    def restore(
        self, experiment: Experiment, optimizer: torch.optim.Optimizer, generators: Generators
    ) -> None:
        """Put everything back.

        Raises:
            CheckpointError: the weights or the optimizer's state belong to another model.
        """
        parameters = dict(experiment.hooked.named_parameters())
        try:
            if odd := sorted(set(parameters) ^ set(self.weights)):
                raise ValueError(f"{odd[0]} is not in both")
            experiment.hooked.load_state_dict(self.weights, strict=False)
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            for number, state in self.optimizer.items():
                for name, value in state.items():
                    if value.ndim and value.shape != trained[number].shape:
                        raise ValueError(f"the optimizer's {name} has another shape")
            held = optimizer.state_dict()
            optimizer.load_state_dict({**held, "state": self.optimizer})
            for name, value in self.generators.items():
                getattr(generators, name).set_state(value)
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            reason = excerpt(error, 200)
            raise CheckpointError(f"{self.folder}: does not fit the recipe: {reason}") from None


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers of a run may depend on beside its recipe."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "mechcausal": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": f"{device} ({kind})",
        "threads": torch.get_num_threads(),
    }


def write_checkpoint(
    folder: Path,
    *,
    step: int,
    stage: str,
    experiment: Experiment,
    optimizer: torch.optim.Optimizer,
    generators: Generators,
) -> None:
    """Write a checkpoint to a folder, in place of one that is there.

    Raises:
        OSError: it cannot be written; what was there is left.
    """
    tensors = {
        f"optimizer/{number}/{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    for name in _GENERATORS:
        tensors[f"generator/{name}"] = getattr(generators, name).get_state()
    with write_folder_atomically(folder) as place:
        experiment.save_model(place)
        (place / STATE_FILE).write_bytes(save(tensors))
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "step": step,
            "stage": stage,
            "recipe": recipe_to_dict(experiment.recipe),
            "environment": environment(generators.data.device),
            "files": {name: _digest((place / name).read_bytes()) for name in _FILES},
        }
        manifest["sha256"] = _digest(_canonical(manifest))
        (place / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a checkpoint, and verify that every byte of it is as it was written.

    Raises:
        CheckpointError: a file is missing, truncated, changed or foreign; one line that names it.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST_FILE)
    contents = {}
    for name in _FILES:
        contents[name] = _read(folder / name)
        if _digest(contents[name]) != manifest.files.get(name):
            raise CheckpointError(
                f"{folder / name}: damaged: its checksum is not that of {MANIFEST_FILE}"
            )
    try:
        weights, state = load(contents[WEIGHTS_FILE]), load(contents[STATE_FILE])
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: not safetensors: {excerpt(error, 200)}") from None
    optimizer: dict[int, dict[str, Tensor]] = {}
    generators: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match key.split("/"):
            case ["optimizer", number, name] if number.isdecimal():
                optimizer.setdefault(int(number), {})[name] = tensor
            case ["generator", name] if name in _GENERATORS:
                generators[name] = tensor
            case _:
                raise CheckpointError(
                    f"{folder / STATE_FILE}: holds {excerpt(key)}: not understood"
                )
    return Checkpoint(
        folder=folder,
        step=manifest.step,
        stage=manifest.stage,
        recipe=manifest.recipe,
        environment=manifest.environment,
        weights=weights,
        optimizer=optimizer,
        generators=generators,
    )


def checkpoint_folders(run: Path) -> dict[int, Path]:
    """The checkpoints of a run folder by step, in order; unread."""
    folders = sorted((run / CHECKPOINTS_FOLDER).glob("*"))
    return {int(folder.name): folder for folder in folders if folder.name.isdecimal()}


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / CHECKPOINTS_FOLDER / f"{step:08d}"


def newest_checkpoint(run: Path, warnings: list[str]) -> Checkpoint | None:
    """The newest good checkpoint of a run; a bad one is named in the warnings and passed over."""
    for step, folder in reversed(checkpoint_folders(run).items()):
        try:
            checkpoint = read_checkpoint(folder)
        except CheckpointError as error:
            warnings.append(f"{error}; the checkpoint before it is used")
            continue
        if checkpoint.step != step:
            warnings.append(f"{folder}: holds step {checkpoint.step}; the one before it is used")
            continue
        return checkpoint
    return None


def prune(run: Path, *, keep: int, kept: set[int]) -> None:
    """Delete checkpoints other than the newest and those of some steps.

    Args:
        run: the run folder.
        keep: how many of the newest are kept.
        kept: steps whose checkpoints are kept beside.
    """
    found = checkpoint_folders(run)
    for step in sorted(set(found) - kept)[:-keep]:
        shutil.rmtree(found[step], ignore_errors=True)


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], *, prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Where two nested dicts of plain values differ: dotted path -> (before, after).

    Example:
        >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
        {'a.b': (1, 3)}
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*before, *after}):
        one, other = before.get(key), after.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= differences(one, other, prefix=f"{prefix}{key}.")
        elif one != other:
            found[f"{prefix}{key}"] = (one, other)
    return found


@dataclass(frozen=True)
class _Manifest:
    """checkpoint.json."""

    step: Annotated[int, Field(ge=0)]
    stage: str
    recipe: dict[str, Any]
    environment: dict[str, Any]
    files: dict[str, str]


_MANIFEST = TypeAdapter(_Manifest)


def _read_manifest(path: Path) -> _Manifest:
    try:
        manifest = json.loads(_read(path))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: damaged: not readable as JSON") from None
    if not isinstance(manifest, dict) or manifest.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this program ({FORMAT})")
    claimed = manifest.pop("sha256", None)
    if claimed != _digest(_canonical({"format": FORMAT, **manifest})):
        raise CheckpointError(f"{path}: damaged: its content does not match its checksum")
    try:
        return _MANIFEST.validate_json(json.dumps(manifest), strict=True)
    except ValidationError:
        raise CheckpointError(f"{path}: not a checkpoint of this program ({FORMAT})") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
