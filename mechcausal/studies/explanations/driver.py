"""For every seed train an application's model and explain its predictions; record and draw."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from mechcausal.models.adapter import save_model
from mechcausal.pictures.static.style import CYCLE, new_figure
from mechcausal.recipes import WandbMode
from mechcausal.records.wandb_runs import resolve_mode
from mechcausal.studies.explanations.comparison import (
    LABELS,
    MethodFigures,
    Row,
    compare,
    over_seeds,
)
from mechcausal.studies.explanations.recording import location_of, make_folder, start_run, table_of
from mechcausal.support.statistics import mean_and_stderr

RESULT_FILE = "explanations.json"
PICTURE_FILE = "explanations.png"
_HELD_OUT_SEED = 10_000
"""Added to a seed for evaluation data; training data uses the seed itself."""


@dataclass(frozen=True)
class Inputs:
    """Sequences whose predictions are explained.

    Attributes:
        tokens: one sequence per row.
        causes: True at the causes by the known rule; None without a rule.
    """

    tokens: Int[Tensor, "batch pos"]
    causes: Bool[Tensor, "batch pos"] | None


@runtime_checkable
class Application(Protocol):
    """Data and model of one application."""

    @property
    def name(self) -> str:
        """Name of the application."""
        ...

    @property
    def replacement(self) -> int:
        """The token that replaces others."""
        ...

    @property
    def node(self) -> int:
        """The position at which the model predicts."""
        ...

    @property
    def fill(self) -> bool:
        """Whether the prediction is written to `node` before attention is read."""
        ...

    def train(self, seed: int) -> HookedTransformer:
        """Train a model."""
        ...

    def accuracy(self, model: HookedTransformer, seed: int) -> float:
        """Share of correct predictions on held-out data."""
        ...

    def inputs(self, n_sequences: int, seed: int) -> Inputs:
        """Held-out sequences to explain."""
        ...

    def describe(self) -> dict[str, Any]:
        """Settings of data and model, for the record."""
        ...


@dataclass(frozen=True)
class Result:
    """The comparison of all methods on one application.

    Attributes:
        application: name of the application.
        rows: one row per method.
        accuracy: the models' mean accuracy over seeds, and standard error (None for one seed).
        settings: seeds, sequences, budget, and the application's settings.
        folder: folder of models, table and picture.
        wandb: page or folder of the W&B run; None without one.
        warnings: problems with recording.
    """

    application: str
    rows: list[Row]
    accuracy: tuple[float, float | None]
    settings: dict[str, Any]
    folder: Path
    wandb: str | None = None
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "application": self.application,
            **self.settings,
            "accuracy": self.accuracy[0],
            "accuracy_stderr": self.accuracy[1],
            "rows": [row.as_json() for row in self.rows],
            "folder": str(self.folder),
        }


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
) -> Result:
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

    Raises:
        RunFolderError: the folder cannot be written, or holds a result.
        TrackingError: WANDB_MODE is not a W&B mode.
    """
    mode = resolve_mode(wandb_mode)
    make_folder(folder, RESULT_FILE)
    settings = {
        "seeds": seeds,
        "sequences": n_sequences,
        "budget": budget,
        "n_eff": n_eff,
        **application.describe(),
    }
    warnings: list[str] = []
    run = start_run(
        mode,
        folder / RESULT_FILE,
        warnings,
        kind="explain",
        subject=application.name,
        name=folder.name,
        settings=settings,
    )
    by_seed: list[dict[str, MethodFigures]] = []
    accuracies: list[float] = []
    summary: dict[str, Any] = {}
    finished = False
    try:
        for seed in range(seeds):
            model = application.train(seed)
            save_model(model, folder / f"seed-{seed}" / "model")
            accuracies.append(application.accuracy(model, seed + _HELD_OUT_SEED))
            inputs = application.inputs(n_sequences, seed + _HELD_OUT_SEED)
            figures = compare(
                model,
                inputs.tokens,
                causes=inputs.causes,
                replacement=application.replacement,
                node=application.node,
                fill=application.fill,
                budget=budget,
                n_eff=n_eff,
                seed=seed,
            )
            by_seed.append(figures)
            if run is not None:
                run.log(seed, _history_row(seed, accuracies[-1], figures))
            causal = figures["causal"]
            on_progress(
                f"seed {seed}: accuracy {accuracies[-1]:.3f}, {causal.size:.2f} tokens, "
                f"found {causal.found:.2f}"
            )
        rows = over_seeds(by_seed)
        result = Result(
            application.name,
            rows,
            mean_and_stderr(accuracies),
            settings,
            folder,
            location_of(run),
            warnings,
        )
        text = json.dumps(result.as_json(), indent=2) + "\n"
        (folder / RESULT_FILE).write_text(text, encoding="utf-8")
        draw(rows, application.name, folder / PICTURE_FILE)
        content = [row.as_json() for row in rows]
        if run is not None:
            table = table_of(content)
            run.log(seeds, {"explanations": table}, {"comparison": folder / PICTURE_FILE})
        summary = {
            f"{row['method']}/{k}": v for row in content for k, v in row.items() if k != "method"
        }
        finished = True
    finally:
        if run is not None:
            run.finish(summary, exit_code=0 if finished else 1)
    return result


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw sizes, success and calls by method, as a PNG file."""
    figure, axes = new_figure(1, 3)
    labels = [LABELS[row.method] for row in rows]
    heights = range(len(rows))
    panels = (
        ("size", "tokens in a set"),
        ("found", "share explained"),
        ("calls", "model runs for one"),
    )
    for axis, (name, heading), colour in zip(axes, panels, CYCLE, strict=False):
        values = [row.mean[name] for row in rows]
        errors = [row.stderr[name] if row.stderr[name] == row.stderr[name] else 0 for row in rows]
        axis.barh(heights, values, xerr=errors, color=colour, height=0.6, error_kw={"lw": 1})
        axis.set_yticks(heights, labels if axis is axes[0] else ["" for _ in labels])
        axis.invert_yaxis()
        axis.set_title(heading)
        axis.grid(axis="x", alpha=0.25)
        for y, value, error in zip(heights, values, errors, strict=True):
            if value == value:
                axis.annotate(
                    f"{value:.3g}",
                    (value + error, y),
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
