"""`mechcausal report`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mechcausal.cli.parsing import RefusedError, parse
from mechcausal.support.messages import first_line

_MOST_RUNS = 200


@dataclass
class Report:
    """Draw the page of a run, report.html, or the comparison of several."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders, finished or not, folders of runs, or a sweep's folder."""
    out: Path | None = None
    """File to write. When absent: report.html in the run's folder, comparison.html in the folder
    of runs, or in the current folder for several arguments."""


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0, or 2 by way of `RefusedError`."""
    options = parse(Report, arguments, command="report")
    if not options.runs:
        raise RefusedError("report needs a run: its folder, or a folder of runs")
    from mechcausal.pictures.pages import write_comparison, write_report
    from mechcausal.records.run_data import RunData, RunDataError
    from mechcausal.records.run_folder import find_runs
    from mechcausal.sweeps.sweep import COPY_FILE

    out: Path | None = options.out
    if out is not None and out.is_dir():
        raise RefusedError(f"--out {out}: a folder; give the file to write")
    try:
        # A path without a run stands for itself, so that reading it says what is wrong.
        folders = [run for path in options.runs for run in find_runs(path) or [path]]
        if len(folders) == 1 and folders[0] == options.runs[0]:
            path = write_report(options.runs[0], out)
            print(f"page: {path}")
            return 0
        folders = list(dict.fromkeys(folders))
        runs: list[RunData] = []
        notes: list[str] = []
        pictures: dict[str, bytes] = {}
        if len(options.runs) == 1 and (options.runs[0] / COPY_FILE).is_file():
            pictures, notes = _sweep(options.runs[0])
            if len(folders) > _MOST_RUNS:
                notes.append(f"Curves and table: the first {_MOST_RUNS} of {len(folders)} members.")
                folders = folders[:_MOST_RUNS]
        for folder in folders:
            try:
                runs.append(RunData.load(folder))
            except RunDataError as error:
                if folder in options.runs:  # the user named it: not just a warning
                    raise
                notes.append(f"left out: {error}")
                print(f"mechcausal: warning: left out: {error}", file=sys.stderr)
        if not runs:
            raise RefusedError(f"{options.runs[0]}: no run in it can be read")
        if out is None:
            out = (options.runs[0] if len(options.runs) == 1 else Path()) / "comparison.html"
        written = write_comparison(runs, out, notes=notes, pictures=pictures)
        print(f"page: {written} ({len(runs)} runs)")
    except RunDataError as error:
        raise RefusedError(str(error)) from None
    except OSError as error:
        raise RefusedError(f"{error.filename or out}: {error.strerror or error}") from None
    return 0


def _sweep(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """Pictures of a sweep, and notes on its members."""
    from mechcausal.sweeps.results import describe_results

    try:
        return describe_results(folder)
    except Exception as error:  # a damaged table must not prevent the comparison of the runs
        return {}, [f"the sweep has no pictures: {first_line(error)}"]
