"""The pictures drawn when a run has finished: its page and its W&B panels.

Both are drawn before W&B is closed, so that it can receive them. A failure becomes a warning.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mechcausal.recipes import Recipe
from mechcausal.records.tracking import RunRecord
from mechcausal.support.messages import first_line
from mechcausal.support.signals import StopSignal

if TYPE_CHECKING:
    from mechcausal.records.panels import Panel
    from mechcausal.records.run_data import RunData


class ClosingPictures:
    """Draws a finished run. The first drawing reads the run folder, later ones reuse it.

    Attributes:
        record: the run's record, with all rows and matrices written.
        recipe: says which pictures to draw.
    """

    def __init__(self, record: RunRecord, recipe: Recipe) -> None:
        self.record = record
        self.recipe = recipe

    def draw_page(self, summary: Mapping[str, Any]) -> None:
        """Write report.html, unless the recipe turns it off.

        Args:
            summary: the run's summary, not yet on disk.
        """
        if not self.recipe.probing.report:
            return
        from mechcausal.pictures.pages import REPORT_FILE, write_page

        try:
            write_page(self._run(summary), self.record.folder / REPORT_FILE)
        except Exception as error:
            self.record.warn(f"{REPORT_FILE} could not be drawn: {first_line(error)}")

    def draw_panels(self, summary: Mapping[str, Any], stop: StopSignal) -> "dict[str, Panel]":
        """The panels that W&B gets with the last row; empty after a request to stop.

        Args:
            summary: the run's summary, not yet on disk.
            stop: says whether the process was asked to stop.
        """
        recipe, record = self.recipe, self.record
        if not recipe.wandb.panels or record.mode == "disabled":
            return {}
        if stop.received is not None:
            record.warn("the panels for W&B were left out: the process was asked to stop")
            return {}
        from mechcausal.pictures import wandb_panels
        from mechcausal.pictures.pages import REPORT_FILE

        page = record.folder / REPORT_FILE
        wants_page = recipe.probing.report and recipe.wandb.page
        try:
            return wandb_panels.draw_panels(self._run(summary), page=page if wants_page else None)
        except Exception as error:
            record.warn(f"the panels for W&B could not be drawn: {first_line(error)}")
            return {}

    def _run(self, summary: Mapping[str, Any]) -> "RunData":
        """The run as read from its folder, with the summary that is not yet written."""
        return replace(self._read, summary=self.record.closing(summary, "finished"))

    @cached_property
    def _read(self) -> "RunData":
        from mechcausal.records.run_data import RunData

        return RunData.load(self.record.folder)
