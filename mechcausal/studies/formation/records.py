"""What is kept of a scored checkpoint, so that an interrupted study goes on where it was."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from mechcausal.records.run_folder import read_object
from mechcausal.studies.hugging_face import TargetError
from mechcausal.support.files import write_atomically
from probes import HeadScores, PositionLoss

RECORDS_FOLDER = "revisions"
SETTINGS_FILE = "settings.json"
FORMAT = "mechcausal-formation-1"


@dataclass(frozen=True)
class CopyLoss:
    """Loss on random tokens repeated twice, nats a token.

    Attributes:
        first_copy: mean over the first copy, each token after another one of the same copy.
        second_copy: the same over the second copy.
        gain: the first minus the second; above 0 if the model uses its context.
        gain_stderr: standard error of the gain over sequences; NaN for one sequence.
    """

    first_copy: float
    second_copy: float
    gain: float
    gain_stderr: float

    @classmethod
    def of(cls, reading: PositionLoss) -> "CopyLoss":
        """The means of a loss by position."""
        start, length = reading.first_copy, reading.repeat_length
        losses = reading.loss.double()
        return cls(
            first_copy=losses[start : start + length - 1].mean().item(),
            second_copy=losses[start + length : start + 2 * length - 1].mean().item(),
            gain=reading.in_context_gain,
            gain_stderr=reading.in_context_gain_stderr,
        )


@dataclass(frozen=True)
class Record:
    """A scored checkpoint.

    Attributes:
        name: name of the revision.
        step: training step.
        commit: commit on the Hub; "" elsewhere.
        weights_sha256: checksum of the weights, see `WeightDigests`.
        matrices: checksum of every matrix, by name.
        scores: of every head.
        loss: None for a model that does not predict every next token.
    """

    name: str
    step: int
    commit: str
    weights_sha256: str
    matrices: Mapping[str, str]
    scores: HeadScores
    loss: CopyLoss | None


def write_record(folder: Path, record: Record) -> None:
    """Write a record into the folder of a study.

    Raises:
        OSError: it cannot be written.
    """
    loss = None if record.loss is None else dataclasses.asdict(record.loss)
    content = {
        "format": FORMAT,
        "name": record.name,
        "step": record.step,
        "commit": record.commit,
        "weights_sha256": record.weights_sha256,
        "matrices": dict(record.matrices),
        "scores": {
            field.name: _plain(getattr(record.scores, field.name))
            for field in dataclasses.fields(HeadScores)
        },
        "loss": _plain(loss),
    }
    path = _record_path(folder, record.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, allow_nan=False) + "\n")


def read_record(folder: Path, name: str) -> Record | None:
    """The record of a revision; None if there is none, or not one that this version can read."""
    try:
        content = read_object(_record_path(folder, name))
        if (content["format"], content["name"]) != (FORMAT, name):
            return None
        fields = {
            field.name: _restored(field.name, content["scores"][field.name])
            for field in dataclasses.fields(HeadScores)
        }
        loss = content["loss"]
        if loss is not None:
            loss = CopyLoss(**{key: math.nan if v is None else v for key, v in loss.items()})
        return Record(
            name=name,
            step=content["step"],
            commit=content["commit"],
            weights_sha256=content["weights_sha256"],
            matrices=content["matrices"],
            scores=HeadScores(**fields),
            loss=loss,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder with scores that were made in another way; write the settings if it is new.

    Raises:
        TargetError: the folder holds scores of another model or with other settings.
        OSError: the folder cannot be written.
    """
    path = folder / SETTINGS_FILE
    settings = json.loads(json.dumps(settings))
    if path.exists():
        try:
            before = read_object(path)
        except (OSError, ValueError) as error:
            raise TargetError(f"{path}: {error}") from None
        for key in settings:
            if before.get(key) != settings[key]:
                raise TargetError(
                    f"{folder}: holds scores with {key} {before.get(key)}, now it is "
                    f"{settings[key]}: choose another folder with --out"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(settings, indent=2) + "\n")


def _record_path(folder: Path, name: str) -> Path:
    # A branch's name may hold slashes, and differ from another's in case only.
    readable = re.sub(r"[^\w.-]", "_", name)[:60]
    return folder / RECORDS_FOLDER / f"{readable}-{sha256(name.encode()).hexdigest()[:8]}.json"


def _plain(value: Any) -> Any:
    """Numbers, lists and dicts for JSON; None for NaN."""
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _restored(name: str, value: Any) -> Any:
    if name == "layers":
        return tuple(value)
    if not isinstance(value, list):
        return value
    rows = [[math.nan if item is None else item for item in row] for row in value]
    dtype = torch.int64 if name == "positional_offset" else torch.float32
    return torch.tensor(rows, dtype=dtype)
