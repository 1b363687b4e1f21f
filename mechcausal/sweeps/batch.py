"""Members of equal shape, trained as one batch; each has its own ordinary run folder.

Members of a batch may differ in graph, prior, learning rates, beta0, epsilon and seed. Each has its
own generators, optimizer, rows, checkpoints and W&B run, so that its numbers equal those of a
single run, to rounding. Unlike a single run, a member draws no pictures and logs no W&B artifacts;
its folder holds the data for both.
"""

from collections.abc import Hashable, Sequence
from contextlib import suppress
from pathlib import Path

from mechcausal.recipes import Recipe
from mechcausal.recipes.stages import probe_steps, stages
from mechcausal.records.run_folder import new_run_folder
from mechcausal.records.wandb_runs import resolve_mode
from mechcausal.support.signals import StopSignal, stop_on_signals
from mechcausal.sweeps.outcome import Outcome, one_line
from mechcausal.training.recorded_run import RecordedRun
from mechcausal.training.run import check, train_runs

MAX_BATCH = 64
"""The most members in one batch; larger batches train no faster and lose more if they break."""
# Floats that one step may hold: they fit into the processor's cache, or a small GPU's memory.
_FLOATS_PER_STEP = {"cpu": 600_000, "cuda": 200_000_000}


def batchable(recipe: Recipe) -> bool:
    """Whether a recipe can be trained in a batch: it trains a simplified model."""
    return recipe.task.kind == "causal_graph" and recipe.model.kind == "simplified"


def batches(recipes: Sequence[Recipe], n_workers: int = 1) -> list[list[int]]:
    """Group recipes into batches of equal shape; each batch lists indices into `recipes`.

    Args:
        recipes: of simplified models.
        n_workers: a shape with enough recipes gets a batch for each worker.

    Raises:
        GraphError: an invalid edge list.
    """
    by_shape: dict[Hashable, list[int]] = {}
    for number, recipe in enumerate(recipes):
        by_shape.setdefault(_shape(recipe), []).append(number)
    result = []
    for numbers in by_shape.values():
        most = min(_most_at_once(recipes[numbers[0]]), -(-len(numbers) // n_workers))
        n_batches = -(-len(numbers) // most)
        size = -(-len(numbers) // n_batches)  # so that all are about equal
        result += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return result


def train_batch(
    recipes: Sequence[Recipe], folders: Sequence[Path], *, stop: StopSignal | None = None
) -> list[Outcome]:
    """Train new runs of equal shape as one batch.

    Args:
        recipes: recipes of one batch of `batches`.
        folders: a new run folder for each.
        stop: a request to stop, beside signals: every run that is open writes a checkpoint, which
            `mechcausal.resume` continues from; the others stay untouched.

    Returns:
        How each run ended. A run that fails leaves the others alone.

    Raises:
        TrackingError: WANDB_MODE names no mode.
    """
    outcomes: dict[int, Outcome] = {}
    runs: dict[int, RecordedRun] = {}
    for number, (recipe, folder) in enumerate(zip(recipes, folders, strict=True)):
        mode = resolve_mode(recipe.wandb.mode)
        try:
            check(recipe)
            recipe = recipe.self_contained()
        except Exception as error:  # one member's failure must not stop the others
            outcomes[number] = Outcome("failed", one_line(error))
            continue
        runs[number] = RecordedRun(recipe, new_run_folder(recipe, folder), mode, lean=True)
    with stop_on_signals(stop) as stop, suppress(KeyboardInterrupt):
        stop.waits = True
        if runs:
            train_runs(list(runs.values()), stop)
    for number, run in runs.items():
        reason = one_line(run.error) if run.error is not None else ""
        outcomes[number] = Outcome(run.state or "interrupted", reason)
    return [outcomes[number] for number in range(len(recipes))]


def _shape(recipe: Recipe) -> Hashable:
    """What the members of a batch must share: tensor sizes and the schedule of steps."""
    training, plan = recipe.training, stages(recipe)
    return (
        (recipe.device, recipe.threads),
        (_length(recipe), recipe.task.vocab_size, recipe.task.transition is None),
        (training.batch_size, training.accumulation),
        tuple((stage.name, stage.start, stage.section.steps) for stage in plan),
        (recipe.evaluation.n_sequences, recipe.probing.enabled),
        tuple(probe_steps(recipe.probing, plan)),
    )


def _length(recipe: Recipe) -> int:
    return recipe.graph.sequence_length or recipe.build_graph().sequence_length


def _most_at_once(recipe: Recipe) -> int:
    """How many members of this shape to train together."""
    training, vocab = recipe.training, recipe.task.vocab_size
    part = training.batch_size // training.accumulation
    n_sequences = max(part, recipe.evaluation.n_sequences)
    floats = n_sequences * (_length(recipe) + 3 * vocab**2)
    most = _FLOATS_PER_STEP[recipe.device.partition(":")[0]] // floats
    return min(max(1, most), MAX_BATCH)
