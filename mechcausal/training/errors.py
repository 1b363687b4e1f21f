"""The errors of a run, worded for its user."""

import math
from pathlib import Path

import torch

from mechcausal.recipes import Recipe
from mechcausal.recipes.stages import Stage
from mechcausal.records.tracking import RecordError
from mechcausal.support.messages import shell_command
from mechcausal.support.signals import StopRequested
from mechcausal.training.checkpoints import CheckpointError


class TrainingError(RuntimeError):
    """A run that failed; the message is one line with the cause and how to resume."""


class NonFiniteLossError(TrainingError):
    """The loss or its gradient became NaN or infinite; the message says at which step."""


def resume_command(folder: Path, recipe: Recipe, *changes: str) -> str:
    """What resumes a run: a command, or a call in Python for an experiment of the caller's own.

    Example:
        >>> resume_command(Path("runs/mine"), Recipe(experiment="Coins"), "--allow-change")
        "mechcausal.resume('runs/mine', experiment=..., allow_change=True)"
    """
    if recipe.experiment is None:
        return shell_command("mechcausal", "resume", folder, *changes)
    change = ", allow_change=True" if changes else ""
    return f"mechcausal.resume({str(folder)!r}, experiment=...{change})"


def check_finite(
    loss: float,
    optimizer: torch.optim.Optimizer,
    step: int,
    stage: Stage,
    folder: Path,
    recipe: Recipe,
) -> None:
    """Raise before the optimizer writes NaN into the weights.

    Raises:
        NonFiniteLossError: the loss or an entry of its gradient is NaN or infinite.
    """
    problem = f"the loss became {loss}"
    if math.isfinite(loss):
        gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
        if all(g is None or bool(g.isfinite().all()) for g in gradients):
            return
        problem = f"the gradient became NaN or infinite (the loss is {loss:g})"
    section = stage.section
    change = (f"--training.{stage.name}.lr", f"{section.lr / 10:g}", "--allow-change")
    again = resume_command(folder, recipe, *change)
    raise NonFiniteLossError(
        f"{problem} at step {step} ({stage.name}, {section.optimizer} with lr {section.lr:g}): "
        "try a smaller learning rate or a larger epsilon; every row before it is kept; "
        f"{again} resumes from the last checkpoint"
    )


def explained(error: BaseException, folder: Path, recipe: Recipe, when: str) -> BaseException:
    """The error as the user should read it: what happened, and how to resume."""
    again = resume_command(folder, recipe)
    if isinstance(error, StopRequested):
        return StopRequested(f"stopped {when}; resume with: {again}", error.number)
    if isinstance(error, RecordError):
        return TrainingError(
            f"{error}; the run stopped {when}, what was written before is kept; "
            f"when the folder can be written again: {again}"
        )
    if isinstance(error, CheckpointError):
        return TrainingError(str(error))
    text = str(error).lower()
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)
    ):
        return TrainingError(
            f"out of memory {when}: reduce training.batch_size "
            f"({recipe.training.batch_size:,}, or raise training.accumulation), "
            f"evaluation.n_sequences ({recipe.evaluation.n_sequences:,}), "
            f"evaluation.theory_priors ({recipe.evaluation.theory_priors:,}), "
            "or the sizes of graph, task and model; what was written before is kept"
        )
    return error
