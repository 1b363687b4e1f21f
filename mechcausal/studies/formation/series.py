"""A series of checkpoints of one model, and how some of them are chosen."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

from mechcausal.models.adapter import ModelFileError
from mechcausal.studies.hugging_face import TargetError
from mechcausal.studies.targets import Target
from mechcausal.studies.weights import weight_digests
from mechcausal.support.messages import excerpt

_STEP_NAME = re.compile(r"(?:step|checkpoint|ckpt|iter|iteration)[-_]?(\d{1,15})(?!\d)", re.I)


@dataclass(frozen=True)
class Revision:
    """One checkpoint of a series.

    Attributes:
        name: name of the revision or folder.
        step: training step.
        commit: the commit on the Hub; "" elsewhere.
        size: bytes to download.
        parts: checksums of its files of weights, as far as they are known before it is fetched.
        problem: why it is left out; empty if it is not.
        loss: the evaluation loss that a run recorded at this step, in nats; None elsewhere.
    """

    name: str
    step: int
    commit: str = ""
    size: int = 0
    parts: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""
    loss: float | None = None


@dataclass(frozen=True)
class Opened:
    """A checkpoint, ready to be scored.

    Attributes:
        folder: its files.
        weights_sha256: see `weights.WeightDigests`.
        matrices: see `weights.WeightDigests`.
    """

    folder: Path
    weights_sha256: str
    matrices: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path) -> "Opened":
        """Read the weights' checksums.

        Raises:
            TargetError: the folder has no readable safetensors.
        """
        try:
            digests = weight_digests(folder)
        except ModelFileError as error:
            raise TargetError(str(error)) from None
        return cls(folder, digests.sha256, digests.matrices)


class Series(ABC):
    """The checkpoints of one model.

    Attributes:
        model: the model's name, or its folder.
        kind: "hub", "folder" or "run".
    """

    kind: str

    def __init__(self, model: str) -> None:
        self.model = model

    @abstractmethod
    def revisions(self) -> list[Revision]:
        """All checkpoints, in the order of their steps.

        Raises:
            TargetError: they cannot be listed, or there are none.
        """

    def describe(self, chosen: Sequence[Revision]) -> list[Revision]:
        """The chosen checkpoints with what can be known before they are fetched.

        Raises:
            TargetError: that cannot be asked.
        """
        return list(chosen)

    @abstractmethod
    def open(self, revision: Revision) -> AbstractContextManager[Opened]:
        """Make a checkpoint's files available within the block.

        Raises:
            TargetError: they cannot be fetched or read.
        """

    @abstractmethod
    def load(self, revision: Revision, opened: Opened, device: str) -> Target:
        """Load an opened checkpoint.

        Raises:
            TargetError: it cannot be loaded.
        """


def step_of(name: str) -> int | None:
    """The step in the name of a revision or a folder; None if it names none.

    >>> [step_of(name) for name in ("step1000", "checkpoint-500", "00000200", "main", "v1.0")]
    [1000, 500, 200, None, None]
    >>> step_of("stage1-step3000-tokens13B")
    3000
    """
    found = re.fullmatch(r"0*(\d{1,15})", name) or _STEP_NAME.search(name)
    return int(found[1]) if found else None


def in_order(revisions: Sequence[Revision], model: str) -> list[Revision]:
    """Revisions by step.

    Raises:
        TargetError: two revisions have the same step.
    """
    ordered = sorted(revisions, key=lambda revision: revision.step)
    for one, other in pairwise(ordered):
        if one.step == other.step:
            raise TargetError(
                f"{model}: {one.name} and {other.name} are both step {one.step}: choose with "
                "--revisions, or leave one out with --without"
            )
    return ordered


def choose(
    revisions: Sequence[Revision],
    *,
    patterns: Sequence[str] = (),
    without: Sequence[str] = (),
    every: int | None = None,
    model: str = "",
) -> list[Revision]:
    """The checkpoints that were asked for.

    Args:
        revisions: all of them.
        patterns: names, steps or shell patterns; all revisions when empty.
        without: names, steps or shell patterns of revisions to leave out.
        every: leave out revisions less than this many steps after the one before; the last stays.
        model: for the messages.

    Raises:
        TargetError: a pattern matches no revision, or nothing is left.
    """

    def matching(pattern: str) -> list[Revision]:
        found = [
            revision
            for revision in revisions
            if fnmatchcase(revision.name, pattern) or str(revision.step) == pattern
        ]
        if not found:
            names = [revision.name for revision in revisions]
            listed = ", ".join(names if len(names) <= 6 else [*names[:3], "...", *names[-2:]])
            raise TargetError(f"{model}: no revision {excerpt(pattern)}; there are: {listed}")
        return found

    wanted = {revision for pattern in patterns for revision in _names(matching(pattern))}
    unwanted = {revision for pattern in without for revision in _names(matching(pattern))}
    chosen = [
        revision
        for revision in revisions
        if (not patterns or revision.name in wanted) and revision.name not in unwanted
    ]
    chosen = in_order(chosen, model)
    if every is not None:
        kept: list[Revision] = []
        for revision in chosen:
            if not kept or revision.step - kept[-1].step >= every or revision is chosen[-1]:
                kept.append(revision)
        chosen = kept
    if not chosen:
        raise TargetError(f"{model}: no revision is left")
    return chosen


def _names(revisions: Sequence[Revision]) -> list[str]:
    return [revision.name for revision in revisions]
