"""What the terminal shows while a run trains: a progress bar, or a live view of the run."""

import sys
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from mechcausal.cli.parsing import RefusedError
from mechcausal.measures.figures import figure_of
from mechcausal.recipes import Recipe
from mechcausal.support.messages import printable

if TYPE_CHECKING:
    from rich.console import Console

    from mechcausal.training.run import Progress


class Display(ABC):
    """Shows a run in the terminal while it trains."""

    @abstractmethod
    def show(self, progress: "Progress") -> None:
        """Show the run's progress; called before every step."""

    @abstractmethod
    def warn(self, message: str) -> None:
        """Print a warning without disturbing the display."""

    @abstractmethod
    def close(self) -> None:
        """Restore the terminal; calling it again does nothing."""


def display(recipe: Recipe, *, quiet: bool, watch: bool) -> Display:
    """The display for these options; a progress bar if the terminal cannot show the live view.

    Raises:
        RefusedError: --quiet and --watch together.
    """
    if quiet and watch:
        raise RefusedError("--quiet and --watch: choose one of them")
    if watch and sys.stderr.isatty() and sys.stdout.isatty():
        from rich.console import Console

        console = Console(stderr=True)
        if not console.is_dumb_terminal and not console.options.ascii_only:
            return LiveView(recipe, console)
    return ProgressBar(quiet=quiet)


class ProgressBar(Display):
    """A bar of steps with loss, gap and recovered edges; nothing if stderr is no terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._is_preparing = False

    def show(self, progress: "Progress") -> None:
        """Before every step."""
        if progress.is_preparing:
            self._tell(progress.stage)
            return
        if self._bar is not None and self._is_preparing:
            self.close()  # its clock began before the first step
        if self._bar is None:
            from tqdm import tqdm

            self._is_preparing = False
            self._bar = tqdm(
                total=progress.n_steps,
                disable=True if self._quiet else None,
                unit="step",
                dynamic_ncols=True,
            )
        bar = self._bar
        if bar.disable:
            return
        figures = progress.figures
        texts = {
            item.short: f"{value:.0%}" if item.unit == "share" else f"{value:.3f}"
            for item in map(figure_of, ("loss/eval", "loss/gap", "graph/recovered"))
            if (value := figures.get(item.key)) is not None
        }
        bar.set_description(progress.stage, refresh=False)
        bar.set_postfix(texts, refresh=False)
        bar.update(progress.step - bar.n)

    def _tell(self, text: str) -> None:
        """One line that changes, until the bar takes its place."""
        if self._bar is None:
            from tqdm import tqdm

            self._is_preparing = True
            self._bar = tqdm(
                bar_format="{desc} [{elapsed}]",
                disable=True if self._quiet else None,
                dynamic_ncols=True,
                leave=False,
            )
        self._bar.set_description_str(text)

    def warn(self, message: str) -> None:
        """Print a warning above the bar."""
        line = f"mechcausal: warning: {printable(message)}"
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is; a second time does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class LiveView(Display):
    """Layer-1 attention beside the graph, curves, and the time left.

    Redrawn at most four times a second, and less often if drawing is slow, so that drawing hardly
    slows the run down.
    """

    SECONDS = 0.25
    # The run waits while the terminal takes a picture: of its time at most one part in so many.
    _SHARE = 40

    def __init__(self, recipe: Recipe, console: "Console") -> None:
        """A view of a run of that recipe, not shown before its first step."""
        self._recipe = recipe
        self._console = console
        self._live: Any = None
        self._due = 0.0

    def show(self, progress: "Progress") -> None:
        """Update the display; called before every step."""
        now = time.monotonic()
        if self._live is None:
            self._start()
        if progress.is_preparing:
            from rich.text import Text

            self._live.update(Text(progress.stage), refresh=True)
            return
        left = self._clock.seconds_left(progress.step, progress.n_steps, now)
        if now < self._due and progress.step < progress.n_steps:
            return
        from mechcausal.cli.watch import Watched

        colours = self._console.color_system in ("256", "truecolor")
        picture = Watched(self._run, progress, seconds_left=left, colours=colours)
        self._live.update(picture, refresh=True)
        self._due = now + max(self.SECONDS, self._SHARE * (time.monotonic() - now))

    def warn(self, message: str) -> None:
        """Print a warning above the live view."""
        line = f"mechcausal: warning: {printable(message)}"
        if self._live is None:
            print(line, file=sys.stderr, flush=True)
        else:
            from rich.text import Text

            self._console.print(Text(line))

    def close(self) -> None:
        """Leave the last picture, and the cursor as it was; a second time does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _start(self) -> None:
        from rich.live import Live

        from mechcausal.cli.watch import Clock
        from mechcausal.records.run_data import RunData

        self._run = RunData(name=self._recipe.name, recipe=self._recipe)
        self._clock = Clock()
        live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._live = live
        live.start()
