"""Train many runs of equal shape as one batch; each has its own ordinary run folder.

The members of a batch may differ in graph, prior, learning rates, beta0, epsilon and seed; every
tensor has a leading member axis. Each member has its own generators, optimizer, rows, checkpoints
and W&B run, so that its numbers equal those of a single run, up to rounding. Unlike a single run, a
member draws no pictures and logs no W&B artifacts; its folder holds the data for both.
"""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from mechcausal.recipes import Recipe, RecipeError
from mechcausal.recipes.devices import computing_on
from mechcausal.recipes.stages import probe_steps, stages
from mechcausal.records.wandb_runs import resolve_mode
from mechcausal.support.signals import stop_on_signals
from mechcausal.sweeps.batch import BatchMember, train_batch
from mechcausal.sweeps.outcome import Outcome, one_line
from mechcausal.training.run import Progress, check

# Floats that one step may hold: they fit into the processor's cache, or a small GPU's memory.
_FLOATS_PER_STEP = {"cpu": 600_000, "cuda": 200_000_000}
_MOST_AT_ONCE = 256
_POLL_SECONDS = 0.2


def obstacle(recipe: Recipe) -> str:
    """Why a recipe cannot be trained in a batch, one line; empty if it can."""
    if recipe.task.kind != "causal_graph" or recipe.model.kind != "simplified":
        return f"model.kind: the batched engine trains simplified models, not {recipe.model.kind}"
    return ""


def batchable(recipe: Recipe) -> bool:
    """Whether a recipe can be trained in a batch."""
    return not obstacle(recipe)


def groups(recipes: Sequence[Recipe]) -> list[list[int]]:
    """Group recipes that can be trained together; each group lists indices into `recipes`.

    Raises:
        GraphError: an invalid edge list.
    """
    by_shape: dict[Hashable, list[int]] = {}
    for number, recipe in enumerate(recipes):
        by_shape.setdefault(_shape(recipe), []).append(number)
    return list(by_shape.values())


def _shape(recipe: Recipe) -> Hashable:
    """What the members of a batch must share: tensor sizes and the schedule of steps."""
    training = recipe.training
    plan = [(s.name, s.start, s.section.steps, s.section.optimizer) for s in stages(recipe)]
    return (
        (recipe.model.kind, recipe.device, recipe.threads),
        (_length(recipe), recipe.task.vocab_size, recipe.task.transition is None),
        (training.batch_size, training.accumulation, tuple(plan)),
        (recipe.evaluation.n_sequences, recipe.probing.enabled),
        tuple(probe_steps(recipe.probing, stages(recipe))),
    )


def _length(recipe: Recipe) -> int:
    if recipe.task.kind != "causal_graph":
        return 0
    return recipe.graph.sequence_length or recipe.build_graph().sequence_length


def train_batched(
    recipes: Sequence[Recipe],
    folders: Sequence[Path],
    *,
    on_progress: Callable[[int, Progress], None] | None = None,
    on_outcome: Callable[[int, Outcome], None] | None = None,
    stop: Callable[[], bool] | None = None,
    workers: int = 1,
) -> list[Outcome]:
    """Train many recipes, those of equal shape as one batch.

    Args:
        recipes: recipes of simplified models; any other recipe fails. Batches of different shapes
            run one after the other.
        folders: a new run folder per recipe.
        on_progress: called with the member's index at each of its probe steps.
        on_outcome: called with the member's index when it ends.
        stop: polled a few times a second; once it returns True, every member that has started
            writes a checkpoint, which `mechcausal.resume` continues from. Default: a signal stops.
        workers: batches trained at the same time, one thread each. Callbacks run in these threads,
            one at a time.

    Returns:
        The outcome of each member. A failing member does not stop the others.

    Raises:
        TrackingError: WANDB_MODE names no mode.
        ValueError: the numbers of folders and recipes differ.
    """
    if len(recipes) != len(folders):
        raise ValueError(f"{len(recipes)} recipes for {len(folders)} folders")
    outcomes = [Outcome("interrupted")] * len(recipes)
    lock = threading.Lock()

    def report(number: int, event: Progress | Outcome) -> None:
        with lock:
            if isinstance(event, Outcome):
                outcomes[number] = event
                if on_outcome is not None:
                    on_outcome(number, event)
            elif on_progress is not None:
                on_progress(number, event)

    members = []
    for number, (recipe, folder) in enumerate(zip(recipes, folders, strict=True)):
        mode = resolve_mode(recipe.wandb.mode)
        try:
            if reason := obstacle(recipe):
                raise RecipeError(reason)
            check(recipe)
            recipe = recipe.self_contained()
        except Exception as error:  # one member's failure must not stop the others
            report(number, Outcome("failed", one_line(error)))
            continue
        members.append(BatchMember(recipe, Path(folder), mode, partial(report, number)))
    with ExitStack() as stack:
        if stop is None:
            signals = stack.enter_context(stop_on_signals())
            signals.waits = True
            should_stop = _Polled(lambda: signals.received is not None)
        else:
            should_stop = _Polled(stop)
        train = partial(train_batch, stop=should_stop)
        pool = stack.enter_context(ThreadPoolExecutor(workers)) if workers > 1 else None
        for group in groups([member.recipe for member in members]):
            recipe = members[group[0]].recipe
            size = _at_once(recipe, len(group), workers)
            lots = [group[start : start + size] for start in range(0, len(group), size)]
            batches = [[members[number] for number in lot] for lot in lots]
            with computing_on(recipe.threads):
                for _ in (pool.map if pool else map)(train, batches):
                    pass
    return outcomes


class _Polled:
    """Calls a stop condition a few times a second, and remembers when it was True."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition
        self._stopped = condition()
        self._next = time.monotonic() + _POLL_SECONDS

    def __call__(self) -> bool:
        if not self._stopped and time.monotonic() >= self._next:
            self._next = time.monotonic() + _POLL_SECONDS
            self._stopped = self._condition()
        return self._stopped


def _at_once(recipe: Recipe, n_members: int, workers: int) -> int:
    """How many members to train at a time, so that all lots have about the same size."""
    vocab, length = recipe.task.vocab_size, _length(recipe)
    training, evaluation = recipe.training, recipe.evaluation
    n_sequences = max(training.batch_size // training.accumulation, evaluation.n_sequences)
    floats_per_member = n_sequences * (length + 3 * vocab**2)
    most = _FLOATS_PER_STEP[recipe.device.partition(":")[0]] // floats_per_member
    most = min(max(1, most), _MOST_AT_ONCE, -(-n_members // workers))
    n_lots = -(-n_members // most)
    return -(-n_members // n_lots)
