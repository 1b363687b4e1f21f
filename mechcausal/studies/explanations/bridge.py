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

import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from mechcausal.pictures.static.style import ATTENTION_COLOURS, CYCLE, label_positions, new_figure
from mechcausal.recipes import Recipe, RecipeError, WandbMode
from mechcausal.records.wandb_runs import resolve_mode
from mechcausal.studies.explanations.recording import (
    Comparison,
    TableRow,
    make_folder,
    write_result,
)
from mechcausal.studies.explanations.skeletons import (
    READINGS,
    ModelSkeletons,
    Skeleton,
    read_skeletons,
    scores,
)
from mechcausal.studies.study_runs import log_table, start_run
from mechcausal.support.signals import StopRequested
from mechcausal.training.experiments.causal_graph import CausalGraphExperiment
from mechcausal.training.run import train
from probes.causal_discovery.independence import largest_given

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "bridge"
_JOINT_STEPS = 900
"""Training steps of the disentangled model that is compared with a simplified one."""
_CAPTION = "pairs with an edge in single sequences (yellow: in all)"


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
) -> Comparison:
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

    Returns:
        Precision, recall and F1 by kind of model and reading, also written to `bridge.json` and
        drawn to `bridge.png`. The standard errors are over seeds, or over sequences for a single
        seed. Precision leaves out empty skeletons; a reading is None if the gradient is 0, as at
        the start of a disentangled model.

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
    make_folder(folder, NAME)
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
                f"{scores(skeletons, 'argmax')[0]['recall']:.2f} of the edges"
            )
    rows = [_row(kind, reading, by_kind[kind]) for kind in variants for reading in READINGS]
    settings = {
        "seeds": seeds,
        "sequences": n_sequences,
        "n_eff": n_eff,
        "alpha": alpha,
        "max_cond": max_cond,
    }
    result = write_result(
        folder,
        NAME,
        rows,
        {"recipe": recipe.name, **settings},
        lambda path: _draw(rows, by_kind, f"{recipe.name}: {_CAPTION}, n_eff {n_eff:g}", path),
        warnings,
    )
    group = f"bridge-{recipe.name}"
    table_run = start_run(
        mode,
        folder,
        warnings,
        kept=f"the result is in {NAME}.json",
        kind="bridge",
        group=group,
        name=f"{group}-table",
        tags=["bridge", recipe.name],
        config=settings,
    )
    table = [row.as_json() for row in rows]
    log_table(table_run, 0, NAME, table, {"skeletons": result.picture})
    f1 = {f"{row['model']}/{row['reading']}/f1": row["f1"] for row in table}
    table_run.finish(f1, exit_code=0)
    return replace(result, wandb=table_run.location)


def _variants(recipe: Recipe, quick: bool) -> dict[str, Recipe]:
    """The recipe by kind of model."""
    if recipe.task.kind != "causal_graph" or recipe.model.kind in ("standard", "own"):
        has_graph = recipe.task.kind == "causal_graph"
        problem = f"a {recipe.model.kind} model" if has_graph else "no causal graph"
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


def _row(kind: str, reading: str, models: Sequence[ModelSkeletons]) -> TableRow:
    by_model = [scores(skeletons, reading) for skeletons in models]
    # Sequences of one model share its weights and are not independent; seeds are.
    means = [TableRow.over(values).mean for values in by_model]
    return TableRow.over(means if len(models) > 1 else by_model[0], model=kind, reading=reading)


def _draw(
    rows: Sequence[TableRow], by_kind: dict[str, list[ModelSkeletons]], title: str, path: Path
) -> None:
    """Draw the first seed's graph beside discovery's, and the F1 of every reading."""
    figure, axes = new_figure(len(by_kind), 4)
    for line, (kind, models) in enumerate(by_kind.items()):
        first, panels = models[0], axes[4 * line : 4 * line + 4]
        _pairs(panels[0], [first.true], first.n_positions, "the true graph")
        for axis, reading in ((panels[1], "layer1"), (panels[2], "layer1_residual")):
            heading = f"discovery, layer 1{' with residual' if axis is panels[2] else ''}"
            _pairs(axis, first.by_reading[reading], first.n_positions, heading)
        panels[0].set_ylabel(f"{kind}\nlater position")
        own = {row.labels["reading"]: row for row in rows if row.labels["model"] == kind}
        heights = range(len(own))
        panels[3].barh(
            heights,
            [row.mean["f1"] or 0.0 for row in own.values()],
            xerr=[row.stderr["f1"] or 0.0 for row in own.values()],
            color=[CYCLE[0] if name.startswith(("layer", "deep")) else CYCLE[1] for name in own],
            height=0.6,
        )
        panels[3].set_yticks(heights, [READINGS[name] for name in own], fontsize=7)
        panels[3].invert_yaxis()
        panels[3].set(title="F1 of the skeleton", xlim=(0, 1.05))
        panels[3].grid(axis="x", alpha=0.25)
    for axis in axes[3::4]:  # make room for the names of the readings
        box = axis.get_position()
        axis.set_position((box.x0 + 0.035, box.y0, box.width - 0.035, box.height))
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110)


def _pairs(axis: "Axes", skeletons: Sequence[Skeleton], n: int, title: str) -> None:
    share: Float[np.ndarray, "later earlier"] = np.zeros((n, n))
    for skeleton in skeletons:
        for earlier, later in skeleton:
            share[later, earlier] += 1 / len(skeletons)
    axis.imshow(share, cmap=ATTENTION_COLOURS, vmin=0, vmax=1)
    axis.set_title(title, fontsize=9)
    label_positions(axis)
    axis.set(xlabel="earlier position", ylabel="")
