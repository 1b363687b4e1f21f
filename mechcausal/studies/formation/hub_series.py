"""The revisions of a Hub model whose names hold a step, downloaded one at a time."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mechcausal.studies.formation.series import Opened, Revision, Series, in_order, step_of
from mechcausal.studies.hub import (
    MAIN,
    HubError,
    HubRevision,
    InterruptedDownloadError,
    describe,
    fetch,
    is_cached,
    list_revisions,
)
from mechcausal.studies.hugging_face import TargetError
from mechcausal.studies.targets import Target, load_revision
from mechcausal.studies.weights import copies


class HubSeries(Series):
    """The branches and tags of a Hub model that are named by their step."""

    kind = "hub"

    def __init__(self, repo: str, *, scratch: Path, keep: bool) -> None:
        """Nothing is asked of the Hub yet.

        Args:
            repo: the model's name.
            scratch: downloads go here and are deleted after use.
            keep: download into the Hugging Face cache instead, and delete nothing.
        """
        super().__init__(repo)
        self._scratch, self.keep = scratch, keep
        self._described: dict[str, HubRevision] = {}
        self._last: Revision | None = None

    def revisions(self) -> list[Revision]:
        """See `Series`; two revisions may still have the same step."""
        named = [
            Revision(name, step, commit=commit)
            for name, commit in list_revisions(self.model).items()
            if name != MAIN and (step := step_of(name)) is not None
        ]
        if not named:
            raise TargetError(
                f"{self.model}: no revision is named by its step (step1000, checkpoint-500); "
                "`mechcausal detect --revision` scores a single one"
            )
        named.sort(key=lambda revision: revision.step)
        self._last = named[-1]
        return named

    def describe(self, chosen: Sequence[Revision]) -> list[Revision]:
        """See `Series`: size, files and declared checksums, and with them the copies.

        Compares with the last step and with `main` too, whether they are chosen or not: wrong
        weights are mostly those of the end of training.
        """
        described = [self._describe(revision) for revision in in_order(chosen, self.model)]
        series = [revision for revision in described if not revision.problem]
        if self._last is not None and self._last.step > described[-1].step:
            series.append(self._describe(self._last))
        with_weights = [revision for revision in series if revision.parts]
        named = copies([(revision.name, revision.parts) for revision in with_weights])
        try:
            final = describe(self.model, MAIN).weights
        except HubError:  # a model may do without
            final = {}
        for revision in with_weights[:-1]:
            if revision.parts == final:
                named.setdefault(revision.name, f"holds the weights of {MAIN}, the final ones")
        return [replace(r, problem=r.problem or named.get(r.name, "")) for r in described]

    def _describe(self, revision: Revision) -> Revision:
        if revision.name not in self._described:
            self._described[revision.name] = describe(self.model, revision.name)
        found = self._described[revision.name]
        return replace(
            revision,
            commit=found.commit,
            size=0 if is_cached(found) else found.size,
            parts=found.weights,
            problem=found.problem,
        )

    @contextmanager
    def open(self, revision: Revision) -> Iterator[Opened]:
        """See `Series`: the files are deleted after use unless the Hugging Face cache has them."""
        found = self._described[revision.name]
        if self.keep or is_cached(found):
            yield Opened.of(fetch(found))
            return
        folder = self._scratch / found.commit[:16]
        for other in self._scratch.glob("*"):  # what an interrupted process left
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        try:
            yield Opened.of(fetch(found, folder))
        except InterruptedDownloadError:
            raise  # the next attempt continues with the files that it lacks
        except BaseException:
            self._evict()
            raise
        self._evict()

    def _evict(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)

    def load(self, revision: Revision, opened: Opened, device: str) -> Target:
        """See `Series`."""
        found = self._described[revision.name]
        name = f"{self.model}, revision {revision.name}"
        return load_revision(
            found,
            opened.folder,
            name=name,
            device=device,
            weights_sha256=opened.weights_sha256,
        )
