"""Many runs of equal shape trained as one batch; each is an ordinary run in its own folder.

What differs between the members of a batch (graph, prior, learning rates, beta0, epsilon, seed) is
one more axis of every tensor. Each member draws from its own generators and keeps its own
optimizer, rows, checkpoints and W&B run, so that its numbers are those of its single run and do not
depend on what else is in the batch. What a member leaves out beside a single run are pictures and
W&B artifacts: what they show is in its folder.
"""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from mechcausal.recipes import Recipe, RecipeError
from mechcausal.recipes.stages import probe_steps, stages
from mechcausal.records.wandb_runs import resolve_mode
from mechcausal.support.devices import computing_on
from mechcausal.support.signals import stop_on_signals
from mechcausal.sweeps.batch import BatchMember, train_batch
from mechcausal.sweeps.member import one_line
from mechcausal.sweeps.outcome import Outcome
from mechcausal.training.run import Progress, check

# Members trained at a time, by the numbers that a step of one holds: what fits into the processor's
# cache, or into a part of a small GPU's memory.
_NUMBERS = {"cpu": 600_000, "cuda": 200_000_000}
_MOST_AT_ONCE = 256
_POLL_SECONDS = 0.2


def obstacle(recipe: Recipe) -> str:
    """Why a recipe cannot be trained in a batch, one line; empty where it can."""
    if recipe.task.kind != "causal_graph" or recipe.model.kind != "simplified":
        return f"model.kind: the batched engine trains simplified models, not {recipe.model.kind}"
    return ""


def batchable(recipe: Recipe) -> bool:
    """Whether a recipe can be trained in a batch."""
    return not obstacle(recipe)


def groups(recipes: Sequence[Recipe]) -> list[list[int]]:
    """The numbers of the recipes that can be trained together, in order.

    Raises:
        GraphError: an edge list that is none.
    """
    found: dict[Hashable, list[int]] = {}
    for number, recipe in enumerate(recipes):
        found.setdefault(_shape(recipe), []).append(number)
    return list(found.values())


def _shape(recipe: Recipe) -> Hashable:
    """What has to be equal in a batch: sizes, and what happens at which step."""
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
        recipes: of simplified models; others fail. Those of unequal shape are trained in turn.
        folders: of each run; new ones.
        on_progress: called with a member's number at each of its probe steps.
        on_outcome: called with a member's number as soon as it has ended.
        stop: asked a few times a second; when it says so, members that have begun are left with a
            checkpoint from which `mechcausal.resume` goes on. When absent, a signal stops.
        workers: batches computed at the same time, by one thread each; callbacks come from them,
            one at a time.

    Returns:
        How each member ended. One that fails does not stop the others.

    Raises:
        TrackingError: WANDB_MODE is none of the modes.
        ValueError: not as many folders as recipes.
    """
    if len(recipes) != len(folders):
        raise ValueError(f"{len(recipes)} recipes for {len(folders)} folders")
    outcomes = [Outcome("interrupted")] * len(recipes)
    lock = threading.Lock()

    def tell(number: int, what: Progress | Outcome) -> None:
        with lock:
            if isinstance(what, Outcome):
                outcomes[number] = what
                if on_outcome is not None:
                    on_outcome(number, what)
            elif on_progress is not None:
                on_progress(number, what)

    members = []
    for number, (recipe, folder) in enumerate(zip(recipes, folders, strict=True)):
        mode = resolve_mode(recipe.wandb.mode)
        try:
            if reason := obstacle(recipe):
                raise RecipeError(reason)
            check(recipe)
            recipe = recipe.self_contained()
        except Exception as error:  # one member's failure must not stop the others
            tell(number, Outcome("failed", one_line(error)))
            continue
        members.append(BatchMember(recipe, Path(folder), mode, partial(tell, number)))
    with ExitStack() as stack:
        if stop is None:
            signals = stack.enter_context(stop_on_signals())
            signals.waits = True
            asked = _Asked(lambda: signals.received is not None)
        else:
            asked = _Asked(stop)
        pool = stack.enter_context(ThreadPoolExecutor(workers)) if workers > 1 else None
        for group in groups([member.recipe for member in members]):
            recipe = members[group[0]].recipe
            size = _at_once(recipe, len(group), workers)
            lots = [group[start : start + size] for start in range(0, len(group), size)]
            batches = [[members[number] for number in lot] for lot in lots]
            with computing_on(recipe.threads):
                for _ in (pool.map if pool else map)(partial(train_batch, stop=asked), batches):
                    pass
    return outcomes


class _Asked:
    """Whether it is time to stop: asked a few times a second, remembered once it is."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        self._ask = ask
        self._stopped = ask()
        self._next = time.monotonic() + _POLL_SECONDS

    def __call__(self) -> bool:
        if not self._stopped and time.monotonic() >= self._next:
            self._next = time.monotonic() + _POLL_SECONDS
            self._stopped = self._ask()
        return self._stopped


def _at_once(recipe: Recipe, n_members: int, workers: int) -> int:
    """How many members are trained at a time, in lots of about equal size."""
    vocab, length = recipe.task.vocab_size, _length(recipe)
    training, evaluation = recipe.training, recipe.evaluation
    n_sequences = max(training.batch_size // training.accumulation, evaluation.n_sequences)
    numbers = n_sequences * (length + 3 * vocab**2)
    most = _NUMBERS[recipe.device.partition(":")[0]] // numbers
    most = min(max(1, most), _MOST_AT_ONCE, -(-n_members // workers))
    n_lots = -(-n_members // most)
    return -(-n_members // n_lots)
