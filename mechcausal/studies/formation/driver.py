"""Score the checkpoints of a model one after the other, and find when each head formed."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mechcausal.measures.figures import HEAD_SCORES
from mechcausal.recipes.devices import device_named
from mechcausal.studies.detection import detect
from mechcausal.studies.formation.records import (
    CopyLoss,
    Record,
    check_settings,
    read_record,
    write_record,
)
from mechcausal.studies.formation.result import FormationResult
from mechcausal.studies.formation.series import Opened, Revision, Series
from mechcausal.studies.hub import free_bytes
from mechcausal.studies.targets import TargetError, running
from mechcausal.studies.weights import copies
from probes import ProbeError, track_formation
from probes.heads.formation import Axis

RECORD_BYTES = 2**20
"""Room for the record of one checkpoint."""


@dataclass(frozen=True)
class Scoring:
    """How heads are scored; see `detect`."""

    n_sequences: int = 32
    repeat_lengths: tuple[int, ...] = ()
    threshold: float = 0.4
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """Where a study is.

    Attributes:
        done: checkpoints finished.
        total: checkpoints to score.
        revision: the one at work; None at the end.
        activity: what is being done with it.
        record: the record that was finished last.
    """

    done: int
    total: int
    revision: Revision | None
    activity: str
    record: Record | None = None


@dataclass(frozen=True)
class Plan:
    """What a study is going to do.

    Attributes:
        readable: the checkpoints that will be scored.
        left_out: those that will not, each with its problem.
        download: bytes to download in all, without what is scored or cached already.
        at_once: bytes on the disk at any time: all of them if they are kept, else the largest.
        finished: number of readable checkpoints whose scores are there already.
    """

    readable: Sequence[Revision]
    left_out: Sequence[Revision]
    download: int
    at_once: int
    finished: int


def plan_formation(
    series: Series,
    chosen: Sequence[Revision],
    folder: Path,
    *,
    keep: bool = False,
    with_copies: bool = False,
) -> Plan:
    """What has to be fetched and scored, and what can be known to be a copy before.

    Args:
        series: the model's checkpoints.
        chosen: those to score.
        folder: folder of the study.
        keep: downloads are kept.
        with_copies: score checkpoints that hold the weights of another step, too.

    Raises:
        TargetError: the Hub cannot be asked, or no revision can be read.
    """
    described = series.describe(chosen)
    readable, left_out = [], []
    for revision in described:
        is_copy = bool(revision.problem) and bool(revision.parts)
        if revision.problem and not (with_copies and is_copy):
            left_out.append(revision)
        else:
            readable.append(revision)
    if not readable:
        first = left_out[0]
        raise TargetError(f"{series.model}@{first.name}: {first.problem}; no revision is left")
    waiting = [r.size for r in readable if not _has_commit(read_record(folder, r.name), r)]
    total, largest = sum(waiting), max(waiting, default=0)
    return Plan(
        readable=readable,
        left_out=left_out,
        download=total,
        at_once=total if keep else largest,
        finished=len(readable) - len(waiting),
    )


def _has_commit(record: Record | None, revision: Revision) -> bool:
    return record is not None and record.commit == revision.commit and record.step == revision.step


def follow_formation(
    series: Series,
    plan: Plan,
    folder: Path,
    *,
    scoring: Scoring,
    axis: Axis = "step",
    with_copies: bool = False,
    device: str = "cpu",
    cache: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> FormationResult:
    """Score every checkpoint of a plan and find when each head formed.

    Checkpoints are scored one at a time on the same tokens. The scores of each are written to
    `folder` before the next one is fetched; a study that was interrupted goes on from there.

    Args:
        series: the model's checkpoints.
        plan: what to score.
        folder: folder of the study.
        scoring: how heads are scored.
        axis: axis of the fitted sigmoid, see `probes.track_formation`.
        with_copies: count checkpoints that hold the weights of another step, too.
        device: device for the models.
        cache: downloads go here; `folder` when absent.
        on_progress: called before and after every checkpoint.

    Raises:
        TargetError: a checkpoint cannot be fetched or scored, or the disk has no room.
        OSError: `folder` cannot be written.
    """
    device = str(device_named(device))
    check_settings(folder, {"model": series.model, "kind": series.kind, **_settings(scoring)})
    _check_room(plan, cache or folder, folder)
    records: list[Record] = []
    total = len(plan.readable)
    for revision in plan.readable:
        at = len(records)
        on_progress(Progress(at, total, revision, "reading"))
        record = read_record(folder, revision.name)
        if not (_has_commit(record, revision) and revision.commit):
            with series.open(revision) as opened:
                if record is None or record.weights_sha256 != opened.weights_sha256:
                    on_progress(Progress(at, total, revision, "scoring"))
                    record = _score(series, revision, opened, scoring, device)
                else:
                    record = replace(record, step=revision.step, commit=revision.commit)
            gc.collect()  # a bridge refers to itself
            write_record(folder, record)
        assert record is not None
        records.append(record)
        on_progress(Progress(len(records), total, revision, "scored", record))
    kept, left_out = _without_copies(records, plan, with_copies)
    return FormationResult(
        model=series.model,
        kind=series.kind,
        settings=_settings(scoring),
        records=kept,
        losses={r.step: r.loss for r in plan.readable if r.loss is not None},
        left_out=left_out,
        formations=_formations(series.model, kept, scoring.threshold, axis),
        axis=axis,
    )


def _settings(scoring: Scoring) -> dict[str, Any]:
    return {
        "sequences": scoring.n_sequences,
        "repeat_lengths": list(scoring.repeat_lengths),
        "threshold": scoring.threshold,
        "seed": scoring.seed,
    }


def _check_room(plan: Plan, cache: Path, folder: Path) -> None:
    needed = plan.at_once + RECORD_BYTES
    free = free_bytes(cache)
    if plan.at_once and free < needed:
        raise TargetError(
            f"{cache}: {gigabytes(free)} are free, {gigabytes(needed)} are needed at a time; "
            "nothing was downloaded"
        )
    if free_bytes(folder) < RECORD_BYTES:
        raise TargetError(f"{folder}: no space left on the disk")


def gigabytes(size: int | float) -> str:
    """A number of bytes for the user.

    >>> gigabytes(5.7e9), gigabytes(12e3)
    ('5.7 GB', '0.012 MB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.2g} MB"


def _score(
    series: Series, revision: Revision, opened: Opened, scoring: Scoring, device: str
) -> Record:
    target = series.load(revision, opened, device)
    try:
        with running(target.name):
            detection = detect(
                target,
                n_sequences=scoring.n_sequences,
                repeat_lengths=scoring.repeat_lengths or None,
                threshold=scoring.threshold,
                seed=scoring.seed,
            )
    except (ProbeError, ValueError) as error:
        raise TargetError(f"{target.name}: {error}") from None
    loss = None if detection.in_context is None else CopyLoss.of(detection.in_context)
    return Record(
        name=revision.name,
        step=revision.step,
        commit=revision.commit,
        weights_sha256=opened.weights_sha256,
        matrices=opened.matrices,
        scores=detection.scores,
        loss=loss,
    )


def _without_copies(
    records: Sequence[Record], plan: Plan, with_copies: bool
) -> tuple[list[Record], list[Revision]]:
    """The records that count, and all revisions that do not, in the order of steps."""
    if with_copies:
        return list(records), list(plan.left_out)
    named = copies([(record.name, record.matrices) for record in records])
    copied = [replace(r, problem=named[r.name]) for r in plan.readable if r.name in named]
    left_out = sorted([*plan.left_out, *copied], key=lambda revision: revision.step)
    return [record for record in records if record.name not in named], left_out


def _formations(
    model: str, records: Sequence[Record], threshold: float, axis: Axis
) -> dict[str, Any]:
    pairs = [(record.step, record.scores) for record in records]
    try:
        return {
            score: track_formation(pairs, score=score, threshold=threshold, axis=axis)
            for score in HEAD_SCORES
        }
    except (ProbeError, ValueError) as error:
        raise TargetError(f"{model}: {error}") from None
