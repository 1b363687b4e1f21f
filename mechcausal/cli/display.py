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
    from rich.progress import Progress as RichProgress

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


def bar_on_terminal(*, quiet: bool = False, keep: bool = False) -> "RichProgress":
    """A progress bar on stderr that shows nothing if stderr is no terminal.

    Args:
        quiet: show nothing on a terminal either.
        keep: leave the bar on the screen when it stops.
    """
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(20),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
        progress.TextColumn("{task.fields[figures]}", markup=False),
        console=console,
        disable=quiet or not console.is_terminal,
        refresh_per_second=4,
        transient=not keep,
    )


_BAR = ("loss/eval", "loss/gap", "graph/recovered", "gradient/residual_correlation")
"""Figures beside the progress bar, as far as the run has them."""


class ProgressBar(Display):
    """A bar of steps with loss, gap and recovered edges; nothing if stderr is no terminal."""

    SECONDS = 0.1

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: RichProgress | None = None
        self._is_preparing = True
        self._due = 0.0

    def show(self, progress: "Progress") -> None:
        """Update the bar; called before every step."""
        now = time.monotonic()
        if now < self._due and progress.step < progress.n_steps:
            return
        self._due = now + self.SECONDS
        if self._bar is None:
            self._bar = bar_on_terminal(quiet=self._quiet, keep=True)
            self._task = self._bar.add_task("", total=None, figures="")
        if self._is_preparing and not progress.is_preparing:
            self._is_preparing = False
            self._bar.reset(self._task, total=progress.n_steps)  # its clock starts now
        texts = (
            f"{item.short}={value:.0%}" if item.unit == "share" else f"{item.short}={value:.3f}"
            for item in map(figure_of, _BAR)
            if (value := progress.figures.get(item.key)) is not None
        )
        self._bar.update(
            self._task,
            description=progress.stage,
            completed=progress.step,
            figures=", ".join(texts),
        )
        self._bar.start()  # only the first time

    def warn(self, message: str) -> None:
        """Print a warning above the bar."""
        _warn(message, None if self._bar is None or self._bar.disable else self._bar.console)

    def close(self) -> None:
        """Leave the bar as it is; calling it again does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _warn(message: str, console: "Console | None") -> None:
    """Print a warning, above what the console shows live."""
    line = f"mechcausal: warning: {printable(message)}"
    if console is None:
        print(line, file=sys.stderr, flush=True)
    else:
        from rich.text import Text

        console.print(Text(line))


class LiveView(Display):
    """Layer-1 attention beside the graph, curves, and the time left.

    Redrawn at most four times a second, and less often if drawing is slow, so that drawing hardly
    slows the run down.
    """

    SECONDS = 0.25
    # The run waits while the terminal draws: wait this many times as long before drawing again.
    _PAUSE = 40

    def __init__(self, recipe: Recipe, console: "Console") -> None:
        """Prepare the view; the first call of `show` starts it."""
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
        self._due = now + max(self.SECONDS, self._PAUSE * (time.monotonic() - now))

    def warn(self, message: str) -> None:
        """Print a warning above the live view."""
        _warn(message, None if self._live is None else self._console)

    def close(self) -> None:
        """Leave the last picture and restore the cursor; calling it again does nothing."""
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
