"""Check that a recipe fits into memory before anything large is allocated.

The estimate is a lower bound: it counts the model, one batch, and the matrices with a row and a
column for every position. A recipe refused here could not have run; one that passes may still run
out of memory.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from mechcausal.graphs import CausalGraph
from mechcausal.recipes import Recipe, RecipeError
from mechcausal.recipes.stages import stages
from mechcausal.theory.elimination import elimination_width
from mechcausal.theory.information import MAX_STATES
from mechcausal.training.experiments.kinds import KINDS

MAX_PROBE_STEPS = 1_000_000
"""Most probe steps in one run; each is a row of its history."""
MAX_TENSOR_ENTRIES = 10**8
"""Most entries of one transition tensor."""

_GIB = 2**30
_LAW_BLOCKS = 16  # of sequences, see `probes.residual_information`
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Need:
    """The memory that one part of a run needs.

    Attributes:
        part: what needs it, for the message.
        size: bytes.
        fields: recipe fields that determine the size.
        lasting: whether it stays allocated for the whole run.
    """

    part: str
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
    total = sum(need.size for need in needs if need.lasting)
    total += max((need.size for need in needs if not need.lasting), default=0)
    available = available_memory(device)
    if total > available:
        largest = max(needs, key=lambda need: need.size)
        raise RecipeError(
            f"too large: this needs at least {_size(total)} of memory, {device} has "
            f"{_size(available)}; {_size(largest.size)} are for {largest.part}: "
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
    """What a run of the recipe needs for its model, batches, matrices and theory.

    Args:
        recipe: a parsed recipe.
        graph: the causal graph, None for tasks without one.
        length: tokens of a sequence, T.

    Raises:
        RecipeError: more than `MAX_PROBE_STEPS` probe steps.
    """
    training, evaluation, probing = recipe.training, recipe.evaluation, recipe.probing
    s, t, fields = recipe.task.vocab_size, length, _size_fields(recipe)
    weights, scores, model_fields = _model_sizes(recipe, t)
    is_drawn = graph is not None and graph.is_single_parent and recipe.task.transition is None
    # Of each sequence: three tables to draw its transition matrix, or logits of its positions.
    data = 3 * s * s if is_drawn else s * t if graph is None else s
    batch = training.batch_size // training.accumulation
    batch_fields = ("training.batch_size (or raise training.accumulation)", *fields)
    kept = min(n_probe_steps(recipe), probing.images + probing.dense) if probing.enabled else 0
    kept_fields = ("probing.images", "probing.dense", *fields)
    needs = [
        Need("the model", 4 * weights, (*model_fields, *fields), lasting=True),
        Need("a training step", 4 * batch * (scores + data + t), batch_fields),
        Need(
            "the evaluation sequences",
            4 * evaluation.n_sequences * (data + t),
            ("evaluation.n_sequences", *fields),
        ),
        Need("the matrices kept", 12 * kept * _kept_entries(recipe, t), kept_fields, lasting=True),
    ]
    if is_drawn:
        size = 16 * evaluation.bayes_draws * s * s
        needs.append(Need("the Bayes loss", size, ("evaluation.bayes_draws", "task.vocab_size")))
    if recipe.task.kind == "text":
        size = 16 * _LAW_BLOCKS * min(evaluation.max_lag, t - 1) * s * s
        law_fields = ("evaluation.max_lag", "task.vocab_size")
        needs.append(Need("the tables of residual information", size, law_fields))
    if recipe.task.kind == "tree":  # the messages of all pairs of siblings, before they are summed
        messages = max(batch, evaluation.n_sequences) * (t // 2) * s * s
        tree_fields = ("task.depth", "task.vocab_size", "evaluation.n_sequences", batch_fields[0])
        needs.append(Need("belief propagation", 8 * messages, tree_fields))
    return needs if graph is None else needs + theory_needs(recipe, graph)


def theory_needs(recipe: Recipe, graph: CausalGraph) -> list[Need]:
    """What computing the information of a recipe's graph needs.

    Raises:
        RecipeError: a transition tensor has more than `MAX_TENSOR_ENTRIES` entries.
    """
    s, n, fields = recipe.task.vocab_size, graph.n_positions, _size_fields(recipe)
    if graph.is_single_parent:
        powers = 16 * (max(graph.depths) + 2) * s * s
        return [
            Need("information of all pairs", 80 * n * n, fields, lasting=True),
            Need("powers of transition matrices", powers, fields),
        ]
    k = graph.max_parents
    # Compare logarithms: s^(k + 1) may have thousands of digits.
    if (k + 1) * math.log(s) > math.log(MAX_TENSOR_ENTRIES):
        parents_field = "graph.k" if recipe.graph.k is not None else "the parents of a position"
        raise RecipeError(
            f"too large: a transition tensor of {k} parents and {s} tokens has {s}^{k + 1} "
            f"entries, at most 10^8 are allowed: reduce {parents_field} or task.vocab_size"
        )
    is_sampled = elimination_width(graph) * math.log(s) > math.log(MAX_STATES)
    tables = 128 * (n * s) ** 2 if is_sampled else 0
    return [
        Need("transition tensors", 24 * s ** (k + 1), fields),
        Need("information of all pairs", tables, fields),
    ]


def _kept_entries(recipe: Recipe, t: int) -> int:
    """Entries of one of the largest matrices kept of a probe step, at least."""
    if recipe.model.kind == "in_context_graphs":  # of the last example alone
        return (recipe.task.positions or 0) ** 2
    return t * t


def _size_fields(recipe: Recipe) -> tuple[str, str]:
    """The fields that determine the numbers of tokens and of positions."""
    if recipe.task.kind == "own" or recipe.graph.preset in ("manual", "edge_list"):
        return "task.vocab_size", "the graph's positions"
    return "task.vocab_size", KINDS[recipe.task.kind].length_field


def _model_sizes(recipe: Recipe, t: int) -> tuple[int, int, tuple[str, ...]]:
    """Weights, attention scores of a sequence in a training step, and the model's own fields."""
    model, s = recipe.model, recipe.task.vocab_size
    if model.kind == "standard":
        d, n_layers = model.d_model, model.n_layers
        weights = n_layers * (4 * d * d + 2 * d * (model.d_mlp or 0))
        fields = ("model.d_model", "model.d_mlp", "model.n_layers")
        return weights, n_layers * model.n_heads * t * t, fields
    if model.kind == "own":
        return 0, 0, ()
    if model.kind == "in_context_graphs":  # trained in closed form; see `in_context_config`
        task, n = recipe.task, model.n_heads
        h, examples = task.positions or 0, task.examples or 0
        d_head = examples + 1 + max(h, n * s)
        weights = 18 * n * ((2 * n + 2) * s + t) * d_head  # four weights, two layers; a fixed part
        return weights, n * (examples + 1) * h + h * h, ("model.n_heads",)
    if model.kind == "simplified":  # its closed form has no scores of a sequence in layer 1
        return 8 * (3 * s + t) * max(s, t), t, ()
    heads = model.heads
    width = (s + t) * math.prod(n + 1 for n in heads)
    weights = 4 * len(heads) * max(heads) * width * width // (heads[-1] + 1)
    return weights, sum(heads[:-1]) * t * t, ("model.heads",)


def n_probe_steps(recipe: Recipe) -> int:
    """An upper limit of the number of probe steps."""
    probing, count = recipe.probing, 2
    for stage in stages(recipe) if probing.enabled else ():
        steps = stage.section.steps
        spaced = steps // probing.every if probing.schedule == "every" else steps.bit_length()
        count += min(steps, probing.dense + spaced)
    if count > MAX_PROBE_STEPS:
        raise RecipeError(
            f"too large: {count:,} probe steps, at most {MAX_PROBE_STEPS:,} are allowed: "
            "raise probing.every, or reduce probing.dense or the steps"
        )
    return count


def _size(size: int) -> str:
    return f"{size / _GIB:,.1f} GiB"
