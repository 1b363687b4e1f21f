"""Does zero-shot causal discovery recover the graph that a model has learned?

The model is trained on sequences of a known graph. Causal discovery (OrdICD; Rohekar et al. 2023)
on the attention of single sequences is compared with the graph, with the largest attention of each
row, and with the edges that the gradient names (Nichani et al. 2024).

Discovery models attention as A = (I − G)⁻¹ Λ, where tokens with similar rows are dependent. A model
of a graph attends from each position to its parent and almost never to itself, so that siblings
have similar rows but parent and child do not. The next layer, however, reads the residual stream,
which also contains the token itself. The readings "with residual" therefore run discovery on the
mean of attention and identity.
"""

import json
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from mechcausal.pictures.static.style import ATTENTION_COLOURS, CYCLE, new_figure
from mechcausal.recipes import Recipe, RecipeError, WandbMode
from mechcausal.records.wandb_runs import resolve_mode
from mechcausal.studies.explanations.recording import location_of, make_folder, start_run, table_of
from mechcausal.studies.explanations.skeletons import (
    READINGS,
    ModelSkeletons,
    Skeleton,
    read_skeletons,
    scores,
)
from mechcausal.support.signals import StopRequested
from mechcausal.support.statistics import mean_and_stderr
from mechcausal.training.experiments.causal_graph import CausalGraphExperiment
from mechcausal.training.run import train
from probes.causal_discovery.independence import largest_given

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULT_FILE = "bridge.json"
PICTURE_FILE = "bridge.png"
_JOINT_STEPS = 900
"""Training steps of the disentangled model that is compared with a simplified one."""


@dataclass(frozen=True)
class BridgeRow:
    """How well one reading of one kind of model recovers the skeleton of the graph.

    Attributes:
        model: kind of the model.
        reading: a key of `READINGS`.
        precision: mean share of recovered pairs that are edges; empty skeletons are left out.
        precision_stderr: standard error over seeds, or over sequences for a single seed; None for
            a single value.
        recall: mean share of edges recovered; None if the gradient is 0, as at the start of a
            disentangled model.
        recall_stderr: its standard error, as above.
        f1: mean of `2 |found ∩ true| / (|found| + |true|)`.
        f1_stderr: its standard error, as above.
    """

    model: str
    reading: str
    precision: float | None
    precision_stderr: float | None
    recall: float | None
    recall_stderr: float | None
    f1: float | None
    f1_stderr: float | None


@dataclass(frozen=True)
class Bridge:
    """The comparison of all readings on a recipe's models.

    Attributes:
        recipe: name of the recipe.
        rows: a row for each kind of model and reading.
        settings: seeds, sequences, n_eff, alpha.
        folder: folder of runs, table and picture.
        wandb: page or folder of the comparison's W&B run; None without one.
        warnings: problems with recording.
    """

    recipe: str
    rows: list[BridgeRow]
    settings: dict[str, Any]
    folder: Path
    wandb: str | None = None
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        rows = [dict(row.__dict__) for row in self.rows]
        return {"recipe": self.recipe, **self.settings, "rows": rows, "folder": str(self.folder)}


def bridge(
    recipe: Recipe,
    *,
    seeds: int,
    n_sequences: int,
    folder: Path,
    n_eff: float | int = 768,
    alpha: float = 0.01,
    max_cond: int = 3,
    quick: bool = False,
    wandb_mode: WandbMode | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> Bridge:
    """Train a recipe's model for several seeds and compare recovered skeletons with its graph.

    A recipe with a simplified model also trains a disentangled one, all parameters jointly.

    Args:
        recipe: a recipe with a causal graph and a simplified or disentangled model.
        seeds: number of seeds; a random graph depends on the seed.
        n_sequences: sequences on whose attention discovery runs, one at a time.
        folder: created if absent; must not hold a result.
        n_eff: effective sample size of the tests; controls sparsity.
        alpha: significance level of the tests.
        max_cond: largest conditioning set; reduced if `n_eff` allows less.
        quick: train for a third of the steps.
        wandb_mode: W&B mode of every training run and of the comparison.
        on_progress: called with a line for every model.

    Raises:
        ValueError: `n_eff` is not above 3 and finite.
        RecipeError: the recipe has no causal graph, or a standard model.
        RunFolderError: the folder cannot be written, or holds a result.
        TrainingError: see `mechcausal.train`.
        StopRequested: a signal stopped a training run.
    """
    variants = _variants(recipe, quick)
    if not 3 < n_eff < float("inf"):
        raise ValueError(f"n_eff is {n_eff:g}; it must be above 3 and finite")
    max_cond = min(max_cond, largest_given(n_eff))
    mode = resolve_mode(wandb_mode)
    make_folder(folder, RESULT_FILE)
    by_kind: dict[str, list[ModelSkeletons]] = {}
    warnings: list[str] = []
    for kind, variant in variants.items():
        for seed in range(seeds):
            chosen = variant.with_overrides(
                seed=recipe.seed + seed, wandb__mode=mode, wandb__group=f"bridge-{recipe.name}"
            )
            run = train(chosen, out=folder / f"{kind}-seed-{chosen.seed}")
            warnings += [f"{run.folder.name}: {warning}" for warning in run.warnings]
            if run.state != "finished":
                raise StopRequested(
                    f"stopped while {run.folder} trained: nothing was measured; "
                    "begin again with another --out",
                    run.signal or signal.SIGINT,
                )
            assert isinstance(run.experiment, CausalGraphExperiment)  # _variants checks it
            skeletons = read_skeletons(
                run.experiment, chosen, n_sequences, n_eff=n_eff, alpha=alpha, max_cond=max_cond
            )
            by_kind.setdefault(kind, []).append(skeletons)
            on_progress(
                f"{kind}, seed {chosen.seed}: layer 1's largest attention finds "
                f"{scores(skeletons, 'argmax')[0][1]:.2f} of the edges"
            )
    rows = [_row(kind, reading, by_kind[kind]) for kind in variants for reading in READINGS]
    settings = {
        "seeds": seeds,
        "sequences": n_sequences,
        "n_eff": n_eff,
        "alpha": alpha,
        "max_cond": max_cond,
    }
    result = Bridge(recipe.name, rows, settings, folder, warnings=warnings)
    (folder / RESULT_FILE).write_text(
        json.dumps(result.as_json(), indent=2) + "\n", encoding="utf-8"
    )
    _draw(result, by_kind, folder / PICTURE_FILE)
    location = _log(result, mode)
    return Bridge(recipe.name, rows, settings, folder, location, result.warnings)


def _variants(recipe: Recipe, quick: bool) -> dict[str, Recipe]:
    """The recipe by kind of model."""
    if recipe.task.kind == "repeated_tokens" or recipe.model.kind == "standard":
        problem = "no causal graph" if recipe.task.kind == "repeated_tokens" else "a standard model"
        raise RecipeError(
            f"{recipe.name}: {problem}; the bridge needs a causal graph and a simplified or "
            "disentangled model"
        )
    divisor = 3 if quick else 1
    shortened = recipe.with_overrides(
        **{
            f"training__{stage}__steps": -(-getattr(recipe.training, stage).steps // divisor)
            for stage in ("stage1", "stage2", "joint")
        }
    )
    if recipe.model.kind == "disentangled":
        return {"disentangled": shortened}
    disentangled = recipe.with_overrides(
        model__kind="disentangled",
        model__heads=(1, 1),
        training__algorithm="joint",
        training__batch_size=512,
        training__joint__steps=-(-_JOINT_STEPS // divisor),
        training__joint__optimizer="adam",
        training__joint__lr=0.02,
    )
    return {"simplified": shortened, "disentangled": disentangled}


def _row(kind: str, reading: str, models: Sequence[ModelSkeletons]) -> BridgeRow:
    by_model = [scores(skeletons, reading) for skeletons in models]
    # Sequences of one model share its weights and are not independent; seeds are.
    if len(by_model) > 1:
        columns = [[_mean(score[i] for score in values) for values in by_model] for i in range(3)]
    else:
        columns = [[score[i] for score in by_model[0]] for i in range(3)]
    precision, recall, f1 = (_mean_and_stderr(column) for column in columns)
    return BridgeRow(kind, reading, *precision, *recall, *f1)


def _mean(values: Iterable[float]) -> float:
    numbers = [value for value in values if value == value]
    return fmean(numbers) if numbers else float("nan")


def _mean_and_stderr(values: Sequence[float]) -> tuple[float | None, float | None]:
    numbers = [value for value in values if value == value]
    return mean_and_stderr(numbers) if numbers else (None, None)


def _draw(result: Bridge, by_kind: dict[str, list[ModelSkeletons]], path: Path) -> None:
    """Draw the first seed's graph beside discovery's, and the F1 of every reading."""
    figure, axes = new_figure(len(by_kind), 4)
    for row, (kind, models) in enumerate(by_kind.items()):
        first, panels = models[0], axes[4 * row : 4 * row + 4]
        _pairs(panels[0], [first.true], first.n_positions, "the true graph")
        for axis, reading in ((panels[1], "layer1"), (panels[2], "layer1_residual")):
            title = f"discovery, layer 1{' with residual' if axis is panels[2] else ''}"
            _pairs(axis, first.by_reading[reading], first.n_positions, title)
        panels[0].set_ylabel(f"{kind}\nlater position")
        rows = [r for r in result.rows if r.model == kind]
        heights = range(len(rows))
        panels[3].barh(
            heights,
            [r.f1 or 0.0 for r in rows],
            xerr=[r.f1_stderr or 0.0 for r in rows],
            color=[CYCLE[0] if r.reading.startswith(("layer", "deep")) else CYCLE[1] for r in rows],
            height=0.6,
        )
        panels[3].set_yticks(heights, [READINGS[r.reading] for r in rows], fontsize=7)
        panels[3].invert_yaxis()
        panels[3].set(title="F1 of the skeleton", xlim=(0, 1.05))
        panels[3].grid(axis="x", alpha=0.25)
    for row in range(len(by_kind)):  # make room for the names of the readings
        box = axes[4 * row + 3].get_position()
        axes[4 * row + 3].set_position((box.x0 + 0.035, box.y0, box.width - 0.035, box.height))
    figure.suptitle(
        f"{result.recipe}: pairs with an edge in single sequences (yellow: in all), n_eff "
        f"{result.settings['n_eff']:g}",
        fontsize=12,
    )
    figure.savefig(path, dpi=110)


def _pairs(axis: "Axes", skeletons: Sequence[Skeleton], n: int, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    share: Float[np.ndarray, "later earlier"] = np.zeros((n, n))
    for skeleton in skeletons:
        for earlier, later in skeleton:
            share[later, earlier] += 1 / len(skeletons)
    axis.imshow(share, cmap=ATTENTION_COLOURS, vmin=0, vmax=1)
    axis.set_title(title, fontsize=9)
    axis.set(xlabel="earlier position")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))


def _log(result: Bridge, mode: WandbMode) -> str | None:
    """Log table and picture as a W&B run; return its page or folder."""
    run = start_run(
        mode,
        result.folder / RESULT_FILE,
        result.warnings,
        kind="bridge",
        subject=result.recipe,
        name="table",
        settings=result.settings,
    )
    if run is None:
        return None
    table = table_of([row.__dict__ for row in result.rows])
    run.log(0, {"bridge": table}, {"skeletons": result.folder / PICTURE_FILE})
    f1 = {f"{row.model}/{row.reading}/f1": row.f1 for row in result.rows}
    run.finish(f1, exit_code=0)
    return location_of(run)
