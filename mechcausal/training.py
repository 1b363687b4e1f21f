"""The training loop: Algorithm 1 or joint training, on the closed form, watched by hooks."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechcausal.experiments import Experiment, Generators, build_experiment, check_experiment
from mechcausal.pages import report_warnings
from mechcausal.recipes import ProbingSection, Recipe, RecipeError, StageSection, load_recipe
from mechcausal.tracking import (
    RunRecord,
    State,
    Value,
    new_run_folder,
    resolve_mode,
    stop_on_signals,
)

FORMATION_THRESHOLD = 0.5
MATRICES_FILE = "matrices.safetensors"
MODEL_FOLDER = "model"
CHECKPOINTS_FOLDER = "checkpoints"


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message says at which step."""


@dataclass(frozen=True)
class Progress:
    """What a progress display may show: sent before every step.

    Attributes:
        step: steps done.
        n_steps: steps of the whole run.
        stage: what is being trained.
        figures: of the last probe step.
    """

    step: int
    n_steps: int
    stage: str
    figures: dict[str, Value]


@dataclass
class RunResult:
    """A run that ended.

    Attributes:
        folder: where its record lies.
        state: finished, or interrupted by a signal.
        signal: number of that signal.
        summary: last figures, the first probe step's under "first", and the run's own facts.
        history: a dict of figures for every probe step.
        experiment: the trained model with its data, probes and theory.
        warnings: what went wrong with recording.
        wandb_folder: W&B's folder; None when disabled.
        url: the W&B page, when online.
    """

    folder: Path
    state: State
    signal: int | None
    summary: dict[str, Any]
    history: list[dict[str, Value]]
    experiment: Experiment
    warnings: list[str] = field(default_factory=list)
    wandb_folder: Path | None = None
    url: str | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of gradient descent: which parameters, how, from which step on."""

    name: str
    parameters: tuple[str, ...]
    section: StageSection
    start: int


def train(
    recipe: Recipe | str | Path,
    *,
    out: str | Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> RunResult:
    """Train a recipe's model and record everything that was seen on the way.

    Args:
        recipe: a recipe, the path of one, or the name of one that comes along.
        out: the run's folder; `runs/<recipe>/<run-id>` when absent.
        on_progress: called before every step.

    Returns:
        The run; its folder holds recipe.toml, metrics.jsonl, summary.json, figures/, the final
        weights (model/) and the W&B run.

    Raises:
        RecipeError, GraphError, PriorError, TrackingError, RunFolderError: bad input, before
            anything was trained.
        NonFiniteLossError: the loss became NaN or infinite; all rows logged so far are kept.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if not stages(recipe):
        raise RecipeError("training: no steps in any stage: nothing to train")
    generators = Generators.from_seed(recipe.seed, device_named(recipe.device))
    mode = resolve_mode(recipe.wandb.mode)
    check_experiment(recipe)
    folder = new_run_folder(recipe, out)

    with stop_on_signals() as stop, ThreadPoolExecutor(1) as pool:
        # W&B takes a second to start, mostly waiting: the experiment is built meanwhile.
        opening = pool.submit(RunRecord, folder, recipe, mode)
        try:
            experiment = build_experiment(recipe, generators)
        except BaseException:
            opening.result().finish({}, "failed")
            raise
        record = opening.result()
        album = _Album(record, experiment)
        state: State = "failed"
        step = 0
        try:
            for stage, optimizer, last in _schedule(recipe, experiment):
                if stop.received is not None and not last:
                    break
                optimizer.zero_grad()
                train_loss = _accumulate(experiment)
                if not math.isfinite(train_loss):
                    raise NonFiniteLossError(_diagnosis(step, stage, train_loss))
                if step in album.steps:
                    album.add(step, train_loss)
                if on_progress is not None:
                    on_progress(Progress(step, album.last_step, stage.name, album.latest))
                if last:
                    break
                optimizer.step()
                step += 1
            state = "finished" if step == album.last_step else "interrupted"
            experiment.save_model(folder / MODEL_FOLDER)
        finally:
            album.save()
            summary = album.summary() | {"train/steps": step, "recipe": recipe.name}
            record.finish(summary, state)
            if recipe.probing.report:
                record.warnings += report_warnings(folder)
    return RunResult(
        folder=folder,
        state=state,
        signal=None if state == "finished" or stop.received is None else int(stop.received),
        summary=summary,
        history=album.history,
        experiment=experiment,
        warnings=record.warnings,
        wandb_folder=record.wandb_folder,
        url=record.url,
    )


def stages(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe's algorithm, in order; empty ones are left out."""
    training = recipe.training
    plan: list[tuple[str, tuple[str, ...], StageSection]]
    if training.algorithm == "joint":
        plan = [("joint", ("all",), training.joint)]
    else:
        plan = [("stage1", ("A1",), training.stage1), ("stage2", ("A2",), training.stage2)]
    result: list[Stage] = []
    start = 0
    for name, parameters, section in plan:
        if section.steps:
            result.append(Stage(name, parameters, section, start))
            start += section.steps
    return result


def probe_steps(probing: ProbingSection, plan: list[Stage]) -> list[int]:
    """The steps at which the model is looked at: the first and last, and by the schedule.

    Each stage starts with `dense` probe steps in a row; then follow every `every`-th step, or with
    the geometric schedule those at 1, 2, 4, 8, ... from the stage's start.
    """
    end = plan[-1].start + plan[-1].section.steps if plan else 0
    steps = {0, end}
    for stage in plan if probing.enabled else ():
        offsets = set(range(min(probing.dense, stage.section.steps)))
        if probing.schedule == "every":
            offsets |= set(range(0, stage.section.steps, probing.every))
        else:
            offsets |= {2**k for k in range(stage.section.steps.bit_length())}
        steps |= {stage.start + offset for offset in offsets if offset < stage.section.steps}
    return sorted(steps)


class _Album:
    """Takes the looks at the model, and keeps what was seen."""

    def __init__(self, record: RunRecord, experiment: Experiment) -> None:
        recipe = experiment.recipe
        self.history: list[dict[str, Value]] = []
        self.latest: dict[str, Value] = {}
        self._record = record
        self._experiment = experiment
        self._probing = recipe.probing
        self._stage_starts = [stage.start for stage in stages(recipe)]
        ordered = probe_steps(recipe.probing, stages(recipe))
        self.steps = frozenset(ordered)
        self.last_step = ordered[-1]
        count = min(max(recipe.probing.images, 2), len(ordered))
        picked = np.linspace(0, len(ordered) - 1, count).round().astype(int)
        self._image_steps = {ordered[i] for i in picked}
        # The graph forms in the first steps: they are kept whatever the number of images.
        self._kept_steps = self._image_steps | set(ordered[: recipe.probing.dense])
        self._matrices: dict[int, dict[str, Tensor]] = {}
        self._formation_step: int | None = None

    def add(self, step: int, train_loss: float) -> None:
        """Look at the model, and write the row."""
        figures: dict[str, Value] = {"loss/train": train_loss}
        images: dict[str, np.ndarray | Path] = {}
        if self._probing.enabled:
            observation = self._experiment.observe()
            figures |= observation.figures
            if self._formation_step is None and (
                observation.figures["induction/score"] >= FORMATION_THRESHOLD
            ):
                self._formation_step = step
            figures["induction/formation_step"] = self._formation_step
            if step in self._kept_steps:
                self._matrices[step] = observation.matrices
            if step in self._image_steps:
                images |= self._experiment.heatmaps(observation.matrices)
        else:
            figures |= self._experiment.losses()
        if self._probing.checkpoints:
            folder = self._record.folder / CHECKPOINTS_FOLDER / f"{step:08d}"
            self._experiment.save_model(folder)
        self.latest = figures
        self.history.append({"train/step": step} | figures)
        if step == self.last_step:
            images |= self._draw()
        self._record.log(step, figures, images)

    def _draw(self) -> dict[str, Path]:
        if not self._matrices:
            return {}
        return self._experiment.draw_figures(
            self._record.folder / "figures",
            history=self.history,
            matrices=self._matrices,
            stage_starts=self._stage_starts,
        )

    def save(self) -> None:
        """Write the matrices that were kept: `<step>/<name>`, and what they are compared with.

        A run that ended early gets its figures here.
        """
        if self.history and self.history[-1]["train/step"] != self.last_step:
            self._draw()
        tensors = self._experiment.reference_matrices() | {
            f"{step:08d}/{name}": matrix
            for step, matrices in self._matrices.items()
            for name, matrix in matrices.items()
        }
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, self._record.folder / MATRICES_FILE)

    def summary(self) -> dict[str, Any]:
        """The last row's figures, what the history shows, and the first row under "first"."""
        if not self.history:
            return {}
        conclusions = self._experiment.conclusions(self.history)
        return {**self.history[-1], **conclusions, "first": dict(self.history[0])}


def _schedule(
    recipe: Recipe, experiment: Experiment
) -> Iterator[tuple[Stage, torch.optim.Optimizer, bool]]:
    """Stage and optimizer of every step; after the last one once more, to look at the result."""
    plan = stages(recipe)
    for stage in plan:
        section = stage.section
        optimizer = _optimizer(section, experiment.parameters(stage.parameters))
        with experiment.training_only(stage.parameters):
            for step in range(section.steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(section, step)
                yield stage, optimizer, False
            if stage is plan[-1]:
                yield stage, optimizer, True


def learning_rate(section: StageSection, step: int) -> float:
    """The learning rate of a step, counted from the start of its stage.

    `lr min(1, (step + 1) / warmup)`; with the cosine schedule that times
    `(1 + cos(pi step / steps)) / 2`.

    Example:
        >>> [learning_rate(StageSection(steps=4, lr=1.0, schedule="cosine"), t) for t in (0, 2)]
        [1.0, 0.5]
    """
    rate = section.lr
    if step < section.warmup:
        rate *= (step + 1) / section.warmup
    if section.schedule == "cosine":
        rate *= (1 + math.cos(math.pi * step / section.steps)) / 2
    return rate


def _accumulate(experiment: Experiment) -> float:
    """Add up the gradients of a step's batch, part by part; the mean loss."""
    training = experiment.recipe.training
    total = 0.0
    for _ in range(training.accumulation):
        loss = experiment.training_loss(training.batch_size // training.accumulation)
        (loss / training.accumulation).backward()
        total += loss.item() / training.accumulation
    return total


def _optimizer(
    section: StageSection, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    kind: Any = kinds[section.optimizer]
    optimizer: torch.optim.Optimizer = kind(
        parameters, lr=section.lr, weight_decay=section.weight_decay
    )
    return optimizer


def _diagnosis(step: int, stage: Stage, loss: float) -> str:
    return (
        f"the loss became {loss} at step {step} ({stage.name}, {stage.section.optimizer} with "
        f"lr {stage.section.lr:g}): try a smaller learning rate or a larger epsilon; "
        "every row before it is kept"
    )


def device_named(name: str) -> torch.device:
    """The device of that name.

    Raises:
        RecipeError: no such name, or the device is not there.
    """
    unknown = f"device: {name} is no device; allowed: cpu, cuda, cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(unknown) from None
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(unknown)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
            raise RecipeError(f"device: {name} is not there; available: {there}")
    return device
