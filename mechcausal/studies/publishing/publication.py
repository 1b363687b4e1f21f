"""What a published run consists of: a revision for every checkpoint, and a card."""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechcausal import __version__
from mechcausal.models import CONFIG_FILE, WEIGHTS_FILE
from mechcausal.recipes import Recipe, recipe_to_toml
from mechcausal.records.run_data import RunData, RunDataError
from mechcausal.records.run_folder import (
    METRICS_FILE,
    MODEL_FOLDER,
    RECIPE_FILE,
    has_finished,
    is_held,
)
from mechcausal.studies.detection import Detection, detect
from mechcausal.studies.formation.local_series import RunSeries
from mechcausal.studies.formation.series import Revision
from mechcausal.studies.hub import MAIN
from mechcausal.studies.publishing.card import model_card
from mechcausal.studies.targets import TargetError, load_target, running
from mechcausal.support.messages import excerpt
from probes import ProbeError

CARD_FILE = "README.md"
_FIGURES_FOLDER = "figures"
_MOST_PICTURES = 6


@dataclass(frozen=True)
class PublishedRevision:
    """A revision to upload.

    Attributes:
        branch: its branch, `step-N` or `main`.
        step: training step.
        checkpoint: the checkpoint that it is made from.
        size: bytes of its weights on the disk.
    """

    branch: str
    step: int
    checkpoint: Revision
    size: int


@dataclass(frozen=True)
class Publication:
    """A run, ready to be uploaded.

    Attributes:
        run: the run folder.
        repo: the model's name on the Hub.
        card: the model card.
        recipe_toml: the recipe that goes with every revision, without the folders of its text.
        revisions: in the order of their upload; `main`, with the card, comes last.
        extra: the files that only `main` has, by name.
    """

    run: Path
    repo: str
    card: str
    recipe_toml: str
    revisions: Sequence[PublishedRevision]
    extra: Mapping[str, bytes]

    @property
    def recipe_sha256(self) -> str:
        """SHA-256 of the published recipe."""
        return _sha256(self.recipe_toml)

    def files(self, revision: PublishedRevision) -> dict[str, bytes]:
        """The files of a revision, by name; the weights' header says what they are.

        Raises:
            TargetError: the checkpoint is damaged or gone.
        """
        series = RunSeries(self.run)
        with series.open(revision.checkpoint) as opened:
            try:
                weights = (opened.folder / WEIGHTS_FILE).read_bytes()
                config = (opened.folder / CONFIG_FILE).read_bytes()
            except OSError as error:
                raise TargetError(f"{error.filename}: {error.strerror or error}") from None
        metadata = {
            "format": "pt",
            "mechcausal": __version__,
            "step": str(revision.step),
            "recipe_sha256": self.recipe_sha256,
        }
        files = {
            CONFIG_FILE: config,
            WEIGHTS_FILE: with_metadata(weights, metadata),
            RECIPE_FILE: self.recipe_toml.encode(),
        }
        if revision.branch == MAIN:
            files |= {CARD_FILE: self.card.encode(), **self.extra}
        return files


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def with_metadata(weights: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with this metadata in its header; the same bytes for the same input.

    The library writes metadata in an order that differs from process to process.

    Args:
        weights: content of a valid file.
        metadata: replaces that of the file.
    """
    (length,) = struct.unpack_from("<Q", weights)
    header = json.loads(weights[8 : 8 + length])
    header["__metadata__"] = dict(metadata)
    content = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # the format aligns the numbers to 8 bytes
    return struct.pack("<Q", len(content)) + content + weights[8 + length :]


def plan_publication(run: str | Path, repo: str) -> Publication:
    """Read a run and write its card.

    Args:
        run: folder of a finished run.
        repo: name of the model on the Hub, "owner/name".

    Raises:
        TargetError: the run is not finished or cannot be read, or `repo` is no name of a model.
    """
    folder = Path(run)
    _check_name(repo)
    try:
        data = RunData.load(folder)
    except RunDataError as error:
        raise TargetError(str(error)) from None
    if is_held(folder):
        raise TargetError(f"{folder}: still running")
    if not has_finished(folder) or not (folder / MODEL_FOLDER).is_dir():
        raise TargetError(
            f"{folder}: has not finished, there are no final weights: mechcausal resume"
        )
    recipe = without_folders(data.recipe)
    recipe_toml = recipe_to_toml(recipe)
    checkpoints = RunSeries(folder).revisions()
    final = Revision(MODEL_FOLDER, recipe.n_steps)
    revisions = [
        PublishedRevision(f"step-{c.step}", c.step, c, _size(folder, c)) for c in checkpoints
    ]
    revisions.append(PublishedRevision(MAIN, final.step, final, _size(folder, final)))
    pictures, extra = _extra_files(folder)
    card = model_card(
        data,
        recipe,
        recipe_toml,
        repo=repo,
        steps=[revision.step for revision in revisions[:-1]],
        recipe_sha256=_sha256(recipe_toml),
        detection=_detection(folder),
        pictures=pictures,
    )
    return Publication(folder, repo, card, recipe_toml, revisions, extra)


def _check_name(repo: str) -> None:
    from huggingface_hub import utils as hub_utils
    from huggingface_hub.errors import HFValidationError

    utils: Any = hub_utils  # exports more than it declares
    try:
        utils.validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("no owner")
    except HFValidationError:
        raise TargetError(
            f"{excerpt(repo)}: not a name of a model on the Hub: owner/name is needed"
        ) from None


def without_folders(recipe: Recipe) -> Recipe:
    """The recipe without the folders of a text on this machine; its SHA-256 still identifies it."""
    text = recipe.task.text
    if text is None or Path(text).name == text:
        return recipe
    return recipe.with_overrides(task__text=Path(text).name)


def _size(run: Path, checkpoint: Revision) -> int:
    folder = RunSeries(run).folder_of(checkpoint)
    try:
        return (folder / WEIGHTS_FILE).stat().st_size
    except OSError as error:
        raise TargetError(f"{folder / WEIGHTS_FILE}: {error.strerror or error}") from None


def _extra_files(run: Path) -> tuple[list[str], dict[str, bytes]]:
    """Names of the pictures, and the content of what only `main` has."""
    drawn = sorted((run / _FIGURES_FOLDER).glob("*.png"))[:_MOST_PICTURES]
    try:
        extra = {f"{_FIGURES_FOLDER}/{path.name}": path.read_bytes() for path in drawn}
        pictures = [name for name, content in extra.items() if content]
        extra = {name: extra[name] for name in pictures}
        extra[METRICS_FILE] = (run / METRICS_FILE).read_bytes()
    except OSError as error:
        raise TargetError(f"{error.filename}: {error.strerror or error}") from None
    return pictures, extra


def _detection(run: Path) -> Detection | None:
    """The heads of the final weights; None if they cannot be scored on repeated tokens."""
    target = load_target(str(run))
    try:
        with running(str(run)):
            return detect(target)
    except (ProbeError, ValueError):
        return None
