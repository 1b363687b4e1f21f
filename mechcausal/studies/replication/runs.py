"""The runs that figures are measured on: trained in parallel, or reused from their folders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mechcausal.graphs import CausalGraph
from mechcausal.measures.figures import Value
from mechcausal.models.base import GraphModel
from mechcausal.models.loading import load_graph_model
from mechcausal.recipes import Recipe, load_recipe, recipe_to_dict
from mechcausal.records.run_folder import MODEL_FOLDER, read_metrics, read_summary, run_info
from mechcausal.support.signals import StopRequested
from mechcausal.sweeps.driver import train_members
from mechcausal.sweeps.outcome import Outcome
from mechcausal.sweeps.plan import Member as SweepMember
from mechcausal.tasks import GraphTask, build_task


@dataclass(frozen=True)
class Member:
    """One run that a figure needs.

    Attributes:
        recipe: name of a bundled recipe.
        seed: the run's seed.
        changes: overrides of the recipe, as in `Recipe.with_overrides`.
        label: distinguishes runs of one recipe with different changes.
    """

    recipe: str
    seed: int = 0
    changes: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return "-".join(filter(None, (self.recipe, self.label, f"seed{self.seed}")))

    def build(self) -> Recipe:
        """The recipe with this member's seed and changes."""
        return load_recipe(self.recipe).with_overrides(seed=self.seed, **self.changes)


@dataclass(frozen=True, eq=False)  # hashed by identity, so that measurements can be cached by run
class Run:
    """A finished run, read back from its folder."""

    member: Member
    folder: Path
    recipe: Recipe

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Content of summary.json: the last row of figures, the first one under "first"."""
        return read_summary(self.folder)

    @cached_property
    def history(self) -> list[dict[str, Value]]:
        """A row of figures for every probe step."""
        return read_metrics(self.folder)

    @cached_property
    def graph(self) -> CausalGraph:
        """The causal graph."""
        return self.recipe.build_graph()

    @cached_property
    def task(self) -> GraphTask:
        """Graph and prior."""
        return build_task(self.graph, self.recipe.build_prior())

    @cached_property
    def model(self) -> GraphModel:
        """The trained model."""
        return load_graph_model(self.folder / MODEL_FOLDER, device=self.recipe.device)


def run_all(
    members: Sequence[Member],
    folder: Path,
    *,
    workers: int | None,
    adjust: Callable[[Recipe], Recipe],
    on_done: Callable[[str, str], None],
) -> tuple[dict[str, Run], dict[str, str]]:
    """Train every member that has no finished run of the same recipe in the folder.

    Args:
        members: the runs needed; equal ones are trained once.
        folder: a run's folder is `folder/<member's name>`, with `-2`, `-3`, ... appended if that
            holds a run of another recipe. Nothing is deleted; an unfinished run is resumed.
        workers: processes, one thread each; None: as many as the cores allow.
        adjust: applied last to every recipe (device, W&B group).
        on_done: called with a member's name and its outcome.

    Returns:
        Runs by member's name, and the error of every member that failed.

    Raises:
        StopRequested: a signal stopped the training.
    """
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    missing: dict[str, Run] = {}
    for name, member in {member.name: member for member in members}.items():
        recipe = adjust(member.build())
        run_folder, finished = _run_folder(folder, name, recipe)
        (runs if finished else missing)[name] = Run(member, run_folder, recipe)
        if finished:
            on_done(name, "reused")

    def end(member: SweepMember, outcome: Outcome) -> None:
        if outcome.state == "finished":
            runs[member.name] = missing[member.name]
            on_done(member.name, "trained")
        else:
            failed[member.name] = outcome.error or f"the run was {outcome.state}"
            on_done(member.name, f"failed: {failed[member.name]}")

    jobs = [SweepMember(name, run.folder, run.recipe, {}) for name, run in missing.items()]
    stopped = train_members(jobs, workers=workers, on_end=end)
    if stopped is not None:
        raise StopRequested("interrupted; finished runs are kept and reused", stopped)
    return runs, failed


def _run_folder(folder: Path, name: str, recipe: Recipe) -> tuple[Path, bool]:
    """The folder of this recipe's run and whether it has finished; a free folder if none exists."""
    number = 1
    while True:
        candidate = folder / (name if number == 1 else f"{name}-{number}")
        if not candidate.exists():
            return candidate, False
        info = run_info(candidate)
        if info.recipe and _comparable(info.recipe) == _comparable(recipe):
            return candidate, info.state == "finished"
        number += 1


def _comparable(recipe: Recipe) -> dict[str, Any]:
    values = recipe_to_dict(recipe)
    return {key: value for key, value in values.items() if key not in ("wandb", "name")}
