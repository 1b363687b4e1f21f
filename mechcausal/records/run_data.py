"""Read a run, finished or not, back from its folder; every picture is drawn from this.

Reading needs neither the model nor W&B.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mechcausal.graphs import CausalGraph, GraphError
from mechcausal.measures.figures import STEP, Value
from mechcausal.recipes import Recipe, load_recipe, recipe_to_dict
from mechcausal.recipes.stages import stages
from mechcausal.records.matrices import Frames, Matrices, RunDataError, find_matrices
from mechcausal.records.run_folder import (
    METRICS_FILE,
    PROCESS_FILE,
    RECIPE_FILE,
    SUMMARY_FILE,
    read_metrics,
    read_object,
    read_summary,
)
from mechcausal.support.nested import flat

__all__ = ["Frames", "Matrices", "RunData", "RunDataError"]


@dataclass(frozen=True, eq=False)
class RunData:
    """The record of a run.

    Attributes:
        name: name of the run's folder.
        recipe: the recipe that was run.
        history: a row of figures for every probe step.
        frames: matrices by probe step, for the steps whose matrices were kept.
        references: matrices to compare the frames with, `theory/...`, and `examples/tokens`.
        summary: content of summary.json; empty for a run that has not ended.
        facts: content of run.json (W&B run, versions); empty without that file.
        folder: the run folder.
        notes: messages for the user about files that could not be read.
    """

    name: str
    recipe: Recipe
    history: Sequence[Mapping[str, Value]] = ()
    frames: Mapping[int, Matrices] = field(default_factory=dict)
    references: Matrices = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: str | Path) -> "RunData":
        """Read a run folder; an unfinished run gives the rows and matrices so far.

        Raises:
            RunDataError: the folder holds no run, or one of its files cannot be read.
        """
        folder = Path(folder)
        _check_is_run(folder)
        metrics = folder / METRICS_FILE
        try:
            recipe = load_recipe(folder / RECIPE_FILE)
            is_torn = metrics.read_bytes()[-1:] not in (b"", b"\n")
            history = read_metrics(folder)
            summary = read_summary(folder) if (folder / SUMMARY_FILE).exists() else {}
            facts = read_object(folder / PROCESS_FILE) if (folder / PROCESS_FILE).exists() else {}
        except OSError as error:
            raise RunDataError(f"{error.filename}: {error.strerror or error}") from None
        except ValueError as error:
            raise RunDataError(str(error)) from None
        frames, references, notes = find_matrices(folder)
        if is_torn:
            notes.append(f"{METRICS_FILE}: the last line is torn, and left out")
        return cls(
            name=folder.resolve().name,
            recipe=recipe,
            history=history,
            frames=frames,
            references=references,
            summary=summary,
            facts=facts,
            folder=folder,
            notes=tuple(notes),
        )

    @property
    def kind(self) -> str:
        """Kind of the experiment, `task.kind` of the recipe; "own" is one of the user's own."""
        return self.recipe.task.kind

    @property
    def has_graph(self) -> bool:
        """Whether the data come from a causal graph, so that `graph` and `truth` have a meaning."""
        return self.kind == "causal_graph"

    @cached_property
    def graph(self) -> CausalGraph:
        """The causal graph.

        Raises:
            RunDataError: the recipe's graph cannot be built, e.g. its edge list is missing.
        """
        try:
            return self.recipe.build_graph()
        except GraphError as error:
            first = error
        # The path of the edge list in the recipe is relative to the folder in which it ran.
        if self.folder is not None and self.recipe.graph.preset == "edge_list":
            text = (self.folder / RECIPE_FILE).read_text(encoding="utf-8")
            try:
                return CausalGraph.from_edge_list(tomllib.loads(text)["graph"]["edge_list"])
            except GraphError:
                pass
        raise RunDataError(f"{self.folder or self.name}: {first}")

    @property
    def state(self) -> str:
        """finished, interrupted or failed; unfinished without a summary."""
        return str(self.summary.get("state", "unfinished"))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps whose matrices were kept."""
        return tuple(self.frames)

    @property
    def stage_starts(self) -> dict[str, int]:
        """First step of every stage of training."""
        return {stage.name: stage.start for stage in stages(self.recipe)}

    @property
    def n_steps(self) -> int:
        """Planned number of training steps."""
        return self.recipe.n_steps

    @property
    def formation_step(self) -> int | None:
        """First probe step at which the induction score reached one half; None if it did not."""
        last_row = self.history[-1] if self.history else {}
        step = last_row.get("induction/formation_step")
        return None if step is None else int(step)

    def row(self, step: int) -> Mapping[str, Value]:
        """The figures of a probe step; empty without such a step."""
        return next((row for row in self.history if row[STEP] == step), {})

    def column(self, key: str) -> tuple[list[int], list[float | None]]:
        """Steps and values of a figure; the value is `None` where it is undefined."""
        rows = [row for row in self.history if key in row]
        return [int(row[STEP] or 0) for row in rows], [row[key] for row in rows]

    def frame(self, step: int | None = None, *, needs: str | None = None) -> tuple[int, Matrices]:
        """The step and its matrices; the last kept step if None is given.

        Args:
            step: one of `steps`.
            needs: name of a matrix that the step must have.

        Raises:
            RunDataError: no matrices were kept, none at that step, or not the needed one.
        """
        run, steps = self.folder or self.name, self.steps
        if not steps:
            raise RunDataError(f"{run}: no matrices were kept")
        if step is None:
            step = steps[-1]
        if step not in self.frames:
            raise RunDataError(
                f"{run}: no matrices of step {step} were kept; "
                f"there are {len(steps)} steps from {steps[0]} to {steps[-1]}"
            )
        matrices = self.frames[step]
        if needs is not None and needs not in matrices:
            listed = ", ".join(sorted(matrices))
            raise RunDataError(f"{run}: step {step} has no matrix {needs}; there are {listed}")
        return step, matrices

    @cached_property
    def truth(self) -> Float[np.ndarray, "query key"]:
        """1 where the key is a parent of the query, 0 elsewhere.

        If the graph names the query's parents, the last row holds them: the last position's
        attention predicts from these.
        """
        graph, length = self.graph, self.graph.sequence_length
        truth = np.zeros((length, length))
        for child, row in enumerate(graph.parents):
            truth[child, list(row)] = 1.0
        if graph.query_parents is not None:
            truth[-1] = 0.0
            truth[-1, list(graph.query_parents)] = 1.0
        return truth

    @property
    def ideal_attention(self) -> Float[np.ndarray, "query key"]:
        """Uniform attention of every row over its parents, as `truth` has them."""
        ideal: np.ndarray = self.truth / np.maximum(self.truth.sum(1, keepdims=True), 1)
        return ideal

    @property
    def n_graph_rows(self) -> int:
        """Rows of layer-1 attention that belong to positions of the graph, as in theory."""
        return self.graph.n_graph_rows

    @cached_property
    def examples(self) -> Int[np.ndarray, "example pos"] | None:
        """Tokens of the example sequences."""
        tokens = self.references.get("examples/tokens")
        return None if tokens is None else tokens.astype(np.int64)

    @cached_property
    def example_targets(self) -> Bool[np.ndarray, "example pos"] | None:
        """Positions that the induction head should attend to from each example's last position."""
        if self.examples is None:
            return None
        import torch

        from mechcausal.measures.metrics import induction_keys

        keys: np.ndarray = induction_keys(torch.from_numpy(self.examples), self.graph).numpy()
        return keys

    def comparable(self) -> dict[str, Any]:
        """The recipe by dotted key, without keys that change no figure (W&B, pictures, ...)."""
        return {
            key: value
            for key, value in flat(recipe_to_dict(self.recipe)).items()
            if not key.startswith(("wandb.", "checkpoints.")) and key not in _WITHOUT_EFFECT
        }


_WITHOUT_EFFECT = ("name", "probing.images", "probing.report", "probing.frames")


def _check_is_run(folder: Path) -> None:
    if not folder.exists():
        raise RunDataError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise RunDataError(f"{folder}: not a folder")
    missing = [name for name in (RECIPE_FILE, METRICS_FILE) if not (folder / name).is_file()]
    if missing:
        raise RunDataError(f"{folder}: not a run folder (no {' and no '.join(missing)})")
