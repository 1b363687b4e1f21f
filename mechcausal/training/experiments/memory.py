"""Check that a recipe fits into memory before anything large is allocated.

The estimate is a lower bound: it counts only the largest arrays that are held at the same time. A
recipe refused here could not have run; one that passes may still run out of memory.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from mechcausal.graphs import CausalGraph
from mechcausal.recipes import Recipe, RecipeError, StageSection
from mechcausal.theory.elimination import elimination_width

MAX_PROBE_STEPS = 1_000_000
"""Most probe steps in one run; each is a row of its history."""

_GIB = 2**30
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# `parent_information` samples above this many joint states (its `max_states`).
_EXACT_STATES = 20_000
_SAMPLED = 4096


@dataclass(frozen=True)
class Need:
    """The memory that one part of a run needs.

    Attributes:
        what: name of the part, for the message.
        size: bytes.
        fields: recipe fields that determine the size.
        lasting: whether it stays allocated for the whole run.
    """

    what: str
    size: int
    fields: tuple[str, ...]
    lasting: bool = False


def check_memory(needs: list[Need], device: str = "cpu") -> None:
    """Check that everything needed at the same time fits into the device's memory.

    Args:
        needs: see `experiment_needs` and `theory_needs`.
        device: where to compute; theory is counted there too, although it runs on the CPU.

    Raises:
        RecipeError: it does not fit; the message names the fields to reduce.
    """
    temporary = max((need.size for need in needs if not need.lasting), default=0)
    total = temporary + sum(need.size for need in needs if need.lasting)
    available = available_memory(device)
    if total <= available:
        return
    largest = max(needs, key=lambda need: need.size)
    raise RecipeError(
        f"too large: this needs at least {_size(total)} of memory, {device} has "
        f"{_size(available)}; {_size(largest.size)} are for {largest.what}: "
        f"reduce {', '.join(largest.fields)}"
    )


def available_memory(device: str = "cpu") -> int:
    """Bytes of memory of a device, or of this process's container if that is less."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(torch.device(device))[1])
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CGROUPS:
        try:
            sizes.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(sizes)


def experiment_needs(recipe: Recipe, graph: CausalGraph | None, length: int) -> list[Need]:
    """What a run of the recipe needs: model, sequences, steps, probe steps and theory.

    Args:
        recipe: a parsed recipe.
        graph: the causal graph, None for repeated tokens.
        length: tokens of a sequence, T.

    Raises:
        RecipeError: more than `MAX_PROBE_STEPS` probe steps.
    """
    training, evaluation = recipe.training, recipe.evaluation
    s, t = recipe.task.vocab_size, length
    part = training.batch_size // training.accumulation
    sequence = ("task.vocab_size", _length_field(recipe))
    batch = ("training.batch_size (or raise training.accumulation)", *sequence)
    evaluated = ("evaluation.n_sequences", *sequence)
    n_probe_steps = _probe_steps(recipe)
    n_kept = min(n_probe_steps, recipe.probing.images + recipe.probing.dense)
    heads = _heads(recipe)[0]
    needs = [
        _model_need(recipe, t),
        Need("a training step", part * _step_entries(recipe, t) * 4, batch),
    ]
    if recipe.probing.enabled:
        kept = n_kept * 3 * heads * t * t * 4
        needs.append(
            Need("matrices kept", kept, ("probing.images", "probing.dense", *sequence), True)
        )
    if graph is None:
        # Scores and logits of every position.
        size = evaluation.n_sequences * (heads * t * t + 2 * t * s) * 4
        return [*needs, Need("the evaluation sequences", size, evaluated)]
    single = graph.is_single_parent
    per_sequence = 8 * t + (24 * s * s if single else 8 * t + 4 * s)
    held = evaluation.n_sequences * (8 * t + (4 * s * s if single else 4 * s))
    needs += [
        Need("a training batch", part * per_sequence, batch),
        Need("drawing the evaluation batch", evaluation.n_sequences * per_sequence, evaluated),
        Need("the evaluation batch", held, evaluated, True),
    ]
    if single and recipe.task.transition is None:
        draws = evaluation.bayes_draws * s * s * 16
        needs.append(Need("the Bayes loss", draws, ("evaluation.bayes_draws", "task.vocab_size")))
    return needs + theory_needs(recipe, graph)


def theory_needs(recipe: Recipe, graph: CausalGraph) -> list[Need]:
    """What computing the information of a recipe's graph needs.

    Raises:
        RecipeError: a transition tensor has too many entries to be drawn.
    """
    s, n = recipe.task.vocab_size, graph.n_positions
    fields = ("task.vocab_size", _length_field(recipe))
    if graph.is_single_parent:
        # Matrices of all pairs, in float64, and the powers of one transition matrix.
        powers = (max(graph.depths) + 2) * s * s
        return [
            Need("information of all pairs", 10 * 8 * n * n, fields, True),
            Need("powers of transition matrices", 2 * 8 * powers, fields),
        ]
    k = graph.max_parents
    # Compare logarithms: s^(k + 1) may have thousands of digits.
    if (k + 1) * math.log(s) > math.log(10**8):
        parents_field = "graph.k" if recipe.graph.k is not None else "the parents of a position"
        raise RecipeError(
            f"too large: a transition tensor of {k} parents and {s} tokens has {s}^{k + 1} "
            f"entries, at most 10^8 are allowed: reduce {parents_field} or task.vocab_size"
        )
    needs = [Need("transition tensors", 3 * 8 * s ** (k + 1), fields)]
    if elimination_width(graph) * math.log(s) > math.log(_EXACT_STATES):
        tables = 2 * 8 * 8 * (n * s) * ((n + 1) * s)
        laws = 2 * 8 * _SAMPLED * n * s
        needs.append(Need("information of all pairs", tables + laws, fields))
    return needs


def _length_field(recipe: Recipe) -> str:
    if recipe.task.kind == "repeated_tokens":
        return "task.repeat_lengths"
    if recipe.graph.preset in ("manual", "edge_list"):
        return "the graph's positions"
    return "graph.sequence_length"


def _heads(recipe: Recipe) -> tuple[int, ...]:
    model = recipe.model
    if model.kind == "standard":
        return (model.n_heads,) * model.n_layers
    return model.heads if model.kind == "disentangled" else (1, 1)


def _stages(recipe: Recipe) -> tuple[StageSection, ...]:
    training = recipe.training
    if training.algorithm == "joint":
        return (training.joint,)
    return training.stage1, training.stage2


def _model_need(recipe: Recipe, t: int) -> Need:
    """Parameters, gradients and the optimizer's averages, in float32."""
    model, s, heads = recipe.model, recipe.task.vocab_size, _heads(recipe)
    n_layers = len(heads)
    fields: tuple[str, ...] = ("task.vocab_size", _length_field(recipe))
    if model.kind == "standard":
        d = model.d_model
        per_layer = 4 * d * d + 2 * d * (model.d_mlp or 0)
        parameters = trained = n_layers * per_layer + (2 * s + t) * d
        fields = ("model.d_model", "model.d_mlp", "model.n_layers", *fields)
    else:
        if model.kind == "simplified":
            width, d_head = 3 * s + t, max(s, t)
        else:
            width = (s + t) * math.prod(n + 1 for n in heads)
            d_head = width // (heads[-1] + 1)
            fields = ("model.heads", *fields)
        weight = max(heads) * width * d_head
        parameters = 4 * n_layers * weight + (2 * s + t) * width
        trained = n_layers * weight
    has_averages = any(stage.optimizer != "sgd" for stage in _stages(recipe))
    size = 4 * (parameters + trained * (3 if has_averages else 1))
    return Need("the model and its optimizer", size, fields, True)


def _step_entries(recipe: Recipe, t: int) -> int:
    """Entries that one sequence of a training step keeps for its backward pass."""
    model, s, heads = recipe.model, recipe.task.vocab_size, _heads(recipe)
    if model.kind == "standard":
        attention = sum(heads) * t * t * 2
        streams = len(heads) * t * (4 * model.d_model + (model.d_mlp or 0))
        return attention + streams + 2 * t * s
    if model.kind == "simplified":
        return 3 * t
    width, entries = s + t, t * s
    for n_heads in heads[:-1]:
        entries += n_heads * t * t * 2
        width *= n_heads + 1
    return entries + t * (width - t)


def _probe_steps(recipe: Recipe) -> int:
    probing = recipe.probing
    if not probing.enabled:
        return 2
    count = 2
    for stage in _stages(recipe):
        spaced = stage.steps // probing.every
        if probing.schedule == "geometric":
            spaced = stage.steps.bit_length()
        count += min(stage.steps, probing.dense + spaced)
    if count > MAX_PROBE_STEPS:
        raise RecipeError(
            f"too large: {count:,} probe steps, at most {MAX_PROBE_STEPS:,} are allowed: "
            "raise probing.every, or reduce probing.dense or the steps"
        )
    return count


def _size(size: int) -> str:
    return f"{size / _GIB:,.1f} GiB"
