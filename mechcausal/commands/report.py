"""`mechcausal report`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mechcausal.commands.parsing import RefusedError, parse


@dataclass
class Report:
    """Draw the page of a run, report.html, or the comparison of several."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders, finished or not, or folders of runs."""
    out: Path | None = None
    """The file; report.html in the run's folder, or comparison.html in the folder of runs (of
    several arguments: in the current folder) when absent."""


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0, or 2 by way of `RefusedError`."""
    options = parse(Report, arguments, command="report")
    if not options.runs:
        raise RefusedError("report needs a run: its folder, or a folder of runs")
    from mechcausal.pages import write_comparison, write_report
    from mechcausal.run_data import RunData, RunDataError, find_runs, is_run

    out: Path | None = options.out
    if out is not None and out.is_dir():
        raise RefusedError(f"--out {out}: a folder; give the file to write")
    try:
        if len(options.runs) == 1 and is_run(options.runs[0]):
            path = write_report(options.runs[0], out)
            print(f"page: {path}")
            return 0
        folders = dict.fromkeys(found for path in options.runs for found in find_runs(path))
        runs, notes = [], []
        for folder in folders:
            try:
                runs.append(RunData.load(folder))
            except RunDataError as error:
                if folder in options.runs:  # named by the user: its fault is an error
                    raise
                notes.append(f"left out: {error}")
                print(f"mechcausal: warning: left out: {error}", file=sys.stderr)
        if not runs:
            raise RefusedError(f"{options.runs[0]}: no run in it can be read")
        if out is None:
            out = (options.runs[0] if len(options.runs) == 1 else Path()) / "comparison.html"
        print(f"page: {write_comparison(runs, out, notes=notes)} ({len(runs)} runs)")
    except RunDataError as error:
        raise RefusedError(str(error)) from None
    except OSError as error:
        raise RefusedError(f"{error.filename or out}: {error.strerror or error}") from None
    return 0
