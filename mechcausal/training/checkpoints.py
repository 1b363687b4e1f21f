"""Checkpoints: everything a run needs to continue as if it had never stopped.

Each checkpoint is one folder, `checkpoints/<step>`, written atomically:

    model.safetensors, config.json   the weights, as `save_model` writes them
    state.safetensors                the state of the optimizer and of every generator, and the
                                     pattern that a clamp has frozen
    checkpoint.json                  step, stage, recipe, versions, and a checksum of each file

The checkpoint of step k is taken before the batch of step k is drawn. Reading a checkpoint never
unpickles, and refuses files whose checksums do not match.
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mechcausal import __version__
from mechcausal.models import CONFIG_FILE, WEIGHTS_FILE
from mechcausal.models.wired_weights import load_plain_weights
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
    """A checkpoint read from disk, its checksums verified.

    Attributes:
        folder: its folder.
        step: number of training steps done.
        stage: name of the stage that the next step belongs to.
        recipe: the run's recipe as plain values.
        environment: versions, device and threads of the process that wrote it.
        weights: parameters by name.
        optimizer: optimizer state, by number of the stage's parameter and name of the state; empty
            if the stage had not begun.
        generators: state of each generator, by name.
        clamp: the pattern that the run's clamp has frozen, by name.
    """

    folder: Path
    step: int
    stage: str
    recipe: dict[str, Any]
    environment: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]
    generators: dict[str, Tensor]
    clamp: dict[str, Tensor]

    def restore(
        self, experiment: Experiment, optimizer: torch.optim.Optimizer, generators: Generators
    ) -> None:
        """Restore weights, optimizer state and generators in place.

        Raises:
            CheckpointError: the weights or the optimizer's state belong to another model.
        """
        try:
            load_plain_weights(experiment.hooked, self.weights)
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            for number, state in self.optimizer.items():
                for name, value in state.items():
                    if value.ndim and value.shape != trained[number].shape:
                        raise ValueError(f"the optimizer's {name} has another shape")
            fresh_state = optimizer.state_dict()
            optimizer.load_state_dict({**fresh_state, "state": self.optimizer})
            for name, value in self.generators.items():
                getattr(generators, name).set_state(value)
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            reason = excerpt(error, 200)
            raise CheckpointError(f"{self.folder}: does not fit the recipe: {reason}") from None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads: what a run's numbers depend on besides its recipe."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "mechcausal": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transformer-lens": _lens_version(),
        "device": f"{device} ({kind})",
        "threads": torch.get_num_threads(),
    }


@cache  # read from the disk, which a run that is under way may not be able to do again
def _lens_version() -> str:
    return version("transformer-lens")


def write_checkpoint(
    folder: Path,
    *,
    step: int,
    stage: str,
    experiment: Experiment,
    optimizer: torch.optim.Optimizer,
    generators: Generators,
    clamp: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint to a folder, replacing an existing one.

    Raises:
        OSError: it cannot be written; an existing one is untouched.
    """
    tensors = {
        f"optimizer/{number}/{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    for name in _GENERATORS:
        tensors[f"generator/{name}"] = getattr(generators, name).get_state()
    tensors |= {f"clamp/{name}": pattern.cpu() for name, pattern in (clamp or {}).items()}
    with write_folder_atomically(folder) as new_folder:
        experiment.save_model(new_folder)
        (new_folder / STATE_FILE).write_bytes(save(tensors))
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "step": step,
            "stage": stage,
            "recipe": recipe_to_dict(experiment.recipe),
            "environment": environment(generators.data.device),
            "files": {name: _digest((new_folder / name).read_bytes()) for name in _FILES},
        }
        manifest["sha256"] = _digest(_canonical(manifest))
        (new_folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a checkpoint and verify the checksum of every file.

    Raises:
        CheckpointError: a file is missing, truncated, changed or foreign; one line names it.
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
    clamp: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match key.split("/"):
            case ["optimizer", number, name] if number.isdecimal():
                optimizer.setdefault(int(number), {})[name] = tensor
            case ["generator", name] if name in _GENERATORS:
                generators[name] = tensor
            case ["clamp", name]:
                clamp[name] = tensor
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
        clamp=clamp,
    )


def checkpoint_folders(run: Path) -> dict[int, Path]:
    """The folder of every checkpoint of a run, by step, in order; the files are not read."""
    folders = sorted((run / CHECKPOINTS_FOLDER).glob("*"))
    return {int(folder.name): folder for folder in folders if folder.name.isdecimal()}


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / CHECKPOINTS_FOLDER / f"{step:08d}"


def newest_checkpoint(run: Path, warnings: list[str]) -> Checkpoint | None:
    """The newest readable checkpoint of a run; a warning names each one that is skipped."""
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
    """Delete all checkpoints except the newest and those of given steps.

    Args:
        run: the run folder.
        keep: how many of the newest to keep.
        kept: steps whose checkpoints to keep in addition.
    """
    folders = checkpoint_folders(run)
    for step in sorted(folders)[:-keep]:
        if step not in kept:
            shutil.rmtree(folders[step], ignore_errors=True)


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], *, prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Where two nested dicts of plain values differ: dotted path -> (before, after).

    Example:
        >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
        {'a.b': (1, 3)}
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed |= differences(old, new, prefix=f"{prefix}{key}.")
        elif old != new:
            changed[f"{prefix}{key}"] = (old, new)
    return changed


@dataclass(frozen=True)
class _Manifest:
    """The fields of checkpoint.json."""

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
