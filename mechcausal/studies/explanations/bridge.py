"""Does zero-shot discovery see the causal graph that gradient descent built into a model?

On a model that was trained on sequences of a known graph, what causal discovery (OrdICD; Rohekar et
al. 2023) reads off single sequences' attention is compared with the graph, with the largest
attention of each row, and with the edges that the gradient names (Nichani et al. 2024).

Discovery takes attention for A = (I − G)⁻¹ Λ: two tokens are alike where they attend alike. A model
of a graph attends from each position to its parent, and almost never to itself, so that rows of
siblings are alike and those of parent and child are not. What the next layer reads, though, is the
residual stream: the attention's output beside the token itself. The mean of attention and identity
stands for it.
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
from mechcausal.studies.explanations.recording import make_folder, place_of, start_run, table_of
from mechcausal.studies.explanations.skeletons import (
    READINGS,
    Seen,
    Skeleton,
    read_skeletons,
    scores,
)
from mechcausal.studies.replication.rows import mean_and_stderr
from mechcausal.support.signals import StopRequested
from mechcausal.training.experiments.causal_graph import CausalGraphExperiment
from mechcausal.training.run import train
from probes.causal_discovery.independence import largest_given

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULT_FILE = "bridge.json"
PICTURE_FILE = "bridge.png"
_JOINT_STEPS = 900
"""Of the disentangled model that stands beside a simplified one."""


@dataclass(frozen=True)
class BridgeRow:
    """How well one reading of one kind of model finds the skeleton of the graph.

    Attributes:
        model: kind of the model.
        reading: a key of `READINGS`.
        precision: mean share of found pairs that are edges; of readings that found any.
        precision_stderr: its standard error over seeds, or over sequences of a single seed; None
            where there is one value.
        recall: mean share of edges found; None for a gradient that is 0, as at the start of a
            disentangled model.
        recall_stderr: likewise.
        f1: mean of `2 |found ∩ true| / (|found| + |true|)`.
        f1_stderr: likewise.
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
    """What was found.

    Attributes:
        recipe: name of the recipe.
        rows: by model and reading.
        settings: seeds, sequences, n_eff, alpha.
        folder: the runs, the table and the picture.
        wandb: where the W&B run of the comparison is, None without.
        warnings: what went wrong with recording.
    """

    recipe: str
    rows: list[BridgeRow]
    settings: dict[str, Any]
    folder: Path
    wandb: str | None = None
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
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
    """Train a recipe's model for some seeds and compare what is read off it with its graph.

    A recipe of a simplified model is trained as a disentangled one too, all parameters together.

    Args:
        recipe: of a causal graph and a simplified or disentangled model.
        seeds: how many; a random graph follows the seed.
        n_sequences: on which discovery reads attention, one by one.
        folder: made if absent; holds no earlier result.
        n_eff: knob of sparsity of the tests.
        alpha: their level.
        max_cond: largest conditioning set; less where `n_eff` allows less.
        quick: a third of the training steps.
        wandb_mode: of every training run and of the comparison.
        on_progress: called with a line for every model.

    Raises:
        ValueError: `n_eff` is not above 3 and finite.
        RecipeError: a recipe without a causal graph, or of a standard model.
        RunFolderError: the folder cannot be written, or holds a result.
        TrainingError: see `mechcausal.train`.
        StopRequested: a signal stopped a training.
    """
    variants = _variants(recipe, quick)
    if not 3 < n_eff < float("inf"):
        raise ValueError(f"n_eff is {n_eff:g}; it must be above 3 and finite")
    max_cond = min(max_cond, largest_given(n_eff))
    mode = resolve_mode(wandb_mode)
    make_folder(folder, RESULT_FILE)
    seen: dict[str, list[Seen]] = {}
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
            assert isinstance(run.experiment, CausalGraphExperiment)  # _variants saw to it
            looked = read_skeletons(
                run.experiment, chosen, n_sequences, n_eff=n_eff, alpha=alpha, max_cond=max_cond
            )
            seen.setdefault(kind, []).append(looked)
            on_progress(
                f"{kind}, seed {chosen.seed}: layer 1's largest attention finds "
                f"{scores(looked, 'argmax')[0][1]:.2f} of the edges"
            )
    rows = [_row(kind, reading, seen[kind]) for kind in variants for reading in READINGS]
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
    _draw(result, seen, folder / PICTURE_FILE)
    place = _log(result, mode)
    return Bridge(recipe.name, rows, settings, folder, place, result.warnings)


def _variants(recipe: Recipe, quick: bool) -> dict[str, Recipe]:
    """The recipe by kind of model."""
    if recipe.task.kind == "repeated_tokens" or recipe.model.kind == "standard":
        what = "no causal graph" if recipe.task.kind == "repeated_tokens" else "a standard model"
        raise RecipeError(
            f"{recipe.name}: {what}; the bridge needs a causal graph and a simplified or "
            "disentangled model"
        )
    share = 3 if quick else 1
    shortened = recipe.with_overrides(
        **{
            f"training__{stage}__steps": -(-getattr(recipe.training, stage).steps // share)
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
        training__joint__steps=-(-_JOINT_STEPS // share),
        training__joint__optimizer="adam",
        training__joint__lr=0.02,
    )
    return {"simplified": shortened, "disentangled": disentangled}


def _row(kind: str, reading: str, models: Sequence[Seen]) -> BridgeRow:
    by_model = [scores(seen, reading) for seen in models]
    # Sequences of one model are read off the same weights: seeds are what is independent.
    if len(by_model) > 1:
        columns = [[_mean(score[i] for score in values) for values in by_model] for i in range(3)]
    else:
        columns = [[score[i] for score in by_model[0]] for i in range(3)]
    precision, recall, f1 = (_mean_and_stderr(column) for column in columns)
    return BridgeRow(kind, reading, *precision, *recall, *f1)


def _mean(values: Iterable[float]) -> float:
    kept = [value for value in values if value == value]
    return fmean(kept) if kept else float("nan")


def _mean_and_stderr(values: Sequence[float]) -> tuple[float | None, float | None]:
    kept = [value for value in values if value == value]
    return mean_and_stderr(kept) if kept else (None, None)


def _draw(result: Bridge, seen: dict[str, list[Seen]], path: Path) -> None:
    """The graph beside what discovery finds, of the first seed; F1 of every reading."""
    figure, axes = new_figure(len(seen), 4)
    for row, (kind, models) in enumerate(seen.items()):
        first, panels = models[0], axes[4 * row : 4 * row + 4]
        _pairs(panels[0], [first.true], first.n_positions, "the true graph")
        for axis, reading in ((panels[1], "layer1"), (panels[2], "layer1_residual")):
            title = f"discovery, layer 1{' with residual' if axis is panels[2] else ''}"
            _pairs(axis, first.found[reading], first.n_positions, title)
        panels[0].set_ylabel(f"{kind}\nlater position")
        rows = [r for r in result.rows if r.model == kind]
        places = range(len(rows))
        panels[3].barh(
            places,
            [r.f1 or 0.0 for r in rows],
            xerr=[r.f1_stderr or 0.0 for r in rows],
            color=[CYCLE[0] if r.reading.startswith(("layer", "deep")) else CYCLE[1] for r in rows],
            height=0.6,
        )
        panels[3].set_yticks(places, [READINGS[r.reading] for r in rows], fontsize=7)
        panels[3].invert_yaxis()
        panels[3].set(title="F1 of the skeleton", xlim=(0, 1.05))
        panels[3].grid(axis="x", alpha=0.25)
    for row in range(len(seen)):  # room for the names of the readings
        box = axes[4 * row + 3].get_position()
        axes[4 * row + 3].set_position((box.x0 + 0.035, box.y0, box.width - 0.035, box.height))
    figure.suptitle(
        f"{result.recipe}: pairs with an edge in single sequences (yellow: in all), n_eff "
        f"{result.settings['n_eff']:g}",
        fontsize=12,
    )
    figure.savefig(path, dpi=110)


def _pairs(axis: "Axes", found: Sequence[Skeleton], n: int, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    share: Float[np.ndarray, "later earlier"] = np.zeros((n, n))
    for skeleton in found:
        for earlier, later in skeleton:
            share[later, earlier] += 1 / len(found)
    axis.imshow(share, cmap=ATTENTION_COLOURS, vmin=0, vmax=1)
    axis.set_title(title, fontsize=9)
    axis.set(xlabel="earlier position")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))


def _log(result: Bridge, mode: WandbMode) -> str | None:
    """One more W&B run, with the table and the picture; where it is."""
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
    return place_of(run)
