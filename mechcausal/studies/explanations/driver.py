"""For every seed train an application's model and explain its predictions; record and draw."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mechcausal.models.adapter import save_model
from mechcausal.pictures.static.style import CYCLE, new_figure
from mechcausal.recipes import WandbMode
from mechcausal.records.wandb_runs import resolve_mode
from mechcausal.studies.explanations.applications import Application
from mechcausal.studies.explanations.comparison import LABELS, MethodFigures, compare
from mechcausal.studies.explanations.recording import (
    Comparison,
    TableRow,
    make_folder,
    write_result,
)
from mechcausal.studies.study_runs import log_table, start_run
from mechcausal.support.statistics import mean_and_stderr

NAME = "explanations"


def run_application(
    application: Application,
    *,
    seeds: int,
    n_sequences: int,
    budget: int,
    folder: Path,
    n_eff: float | int | None = None,
    wandb_mode: WandbMode | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Train, explain and compare for seeds 0, 1, …; record everything.

    Args:
        application: data and model.
        seeds: number of seeds.
        n_sequences: predictions to explain for every seed.
        budget: model runs per method for one explanation.
        folder: created if absent; must not hold a result.
        n_eff: see `probes.explain`.
        wandb_mode: see `wandb_runs.resolve_mode`.
        on_progress: called with a line for every seed.

    Returns:
        The table by method, also written to `explanations.json` and drawn to `explanations.png`.

    Raises:
        RunFolderError: the folder cannot be written, or holds a result.
        TrackingError: WANDB_MODE is not a W&B mode.
    """
    mode = resolve_mode(wandb_mode)
    make_folder(folder, NAME)
    settings: dict[str, Any] = {
        "seeds": seeds,
        "sequences": n_sequences,
        "budget": budget,
        "n_eff": n_eff,
        **application.describe(),
    }
    warnings: list[str] = []
    run = start_run(
        mode,
        folder,
        warnings,
        kept=f"the result is in {NAME}.json",
        kind="explain",
        group=f"explain-{application.name}",
        name=f"explain-{application.name}-{folder.name}",
        tags=["explain", application.name],
        config=settings,
    )
    by_seed: list[dict[str, MethodFigures]] = []
    accuracies: list[float] = []
    summary: dict[str, Any] = {}
    exit_code = 1
    try:
        for seed in range(seeds):
            model = application.train(seed)
            save_model(model, folder / f"seed-{seed}" / "model")
            accuracies.append(application.accuracy(model, seed))
            examples = application.inputs(n_sequences, seed)
            figures = compare(application, model, examples, budget=budget, n_eff=n_eff, seed=seed)
            by_seed.append(figures)
            run.log(seed, _history_row(seed, accuracies[-1], figures))
            causal = figures["causal"]
            on_progress(
                f"seed {seed}: accuracy {accuracies[-1]:.3f}, {causal.size:.2f} tokens, "
                f"found {causal.found:.2f}"
            )
        rows = [
            TableRow.over([asdict(figures[method]) for figures in by_seed], method=method)
            for method in LABELS
        ]
        accuracy, stderr = mean_and_stderr(accuracies)
        header = {"application": application.name, **settings}
        result = write_result(
            folder,
            NAME,
            rows,
            {**header, "accuracy": accuracy, "accuracy_stderr": stderr},
            lambda path: draw(rows, application.name, path),
            warnings,
        )
        table = [row.as_json() for row in rows]
        log_table(run, seeds, NAME, table, {"comparison": result.picture})
        summary = {
            f"{row['method']}/{name}": value
            for row in table
            for name, value in row.items()
            if name != "method"
        }
        exit_code = 0
    finally:
        run.finish(summary, exit_code=exit_code)
    return replace(result, wandb=run.location)


def draw(rows: Sequence[TableRow], title: str, path: Path) -> None:
    """Draw sizes, success and calls by method, as a PNG file."""
    figure, axes = new_figure(1, 3)
    labels = [LABELS[row.labels["method"]] for row in rows]
    heights = range(len(rows))
    panels = (
        ("size", "tokens in a set"),
        ("found", "share explained"),
        ("calls", "model runs for one"),
    )
    for axis, (name, heading), colour in zip(axes, panels, CYCLE, strict=False):
        values = [row.mean[name] or 0.0 for row in rows]
        errors = [row.stderr[name] or 0.0 for row in rows]
        axis.barh(heights, values, xerr=errors, color=colour, height=0.6, error_kw={"lw": 1})
        axis.set_yticks(heights, labels if axis is axes[0] else ["" for _ in labels])
        axis.invert_yaxis()
        axis.set_title(heading)
        axis.grid(axis="x", alpha=0.25)
        for y, row in zip(heights, rows, strict=True):
            if row.mean[name] is not None:
                axis.annotate(
                    f"{values[y]:.3g}",
                    (values[y] + errors[y], y),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
        axis.margins(x=0.18)
    figure.subplots_adjust(left=0.17, wspace=0.12)
    figure.suptitle(
        f"{title}: explanations by method, mean over seeds ± standard error", fontsize=12
    )
    figure.savefig(path, dpi=110)


def _history_row(
    seed: int, accuracy: float, figures: dict[str, MethodFigures]
) -> dict[str, float | int]:
    row: dict[str, float | int] = {"seed": seed, "accuracy": accuracy}
    for method, values in figures.items():
        for name in ("size", "found", "calls", "verified"):
            row[f"{method}/{name}"] = getattr(values, name)
    return row
