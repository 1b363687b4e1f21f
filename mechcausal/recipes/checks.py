"""Check that the settings of a recipe fit together."""

import math
from dataclasses import fields

from mechcausal.graphs import PRESETS
from mechcausal.recipes.errors import RecipeError
from mechcausal.recipes.sections import (
    GRAPH_OPTIONS,
    GraphSection,
    ModelSection,
    TaskKind,
    TaskSection,
    TrainingSection,
)

# Graph options that are never required.
_OPTIONAL_GRAPH_OPTIONS = ("seed", "query_parents")
# The model options that each kind takes.
_MODEL_OPTIONS: dict[str, tuple[str, ...]] = {
    "simplified": (),
    "disentangled": ("heads", "initial_scale"),
    "in_context_graphs": ("n_heads", "initial_scale", "own_column"),
    "standard": (
        "initial_scale",
        "n_layers",
        "n_heads",
        "d_model",
        "d_mlp",
        "layer_norm",
        "embeddings",
        "attention",
        "positions",
    ),
}
# The task options that belong to some kinds only.
_TASK_OPTIONS: dict[str, tuple[TaskKind, ...]] = {
    "transition": ("causal_graph",),
    "matrices": ("causal_graph",),
    "repeat_lengths": ("repeated_tokens",),
    **dict.fromkeys(("text", "text_sha256", "interleaved"), ("text",)),
    "context": ("text", "selective_lags"),
    "lags": ("selective_lags",),
    **dict.fromkeys(("positions", "examples"), ("in_context_graphs",)),
    **dict.fromkeys(("depth", "filter", "sigma", "predict"), ("tree",)),
    "seed": ("causal_graph", "selective_lags", "in_context_graphs", "tree"),
}
MAX_CHARACTERS = 256
"""Most characters told apart; tables of n-grams grow with their third power."""
MAX_SYMBOLS = 64
"""Most symbols of a tree; its rules grow with their third power."""
MAX_CONTEXT = 10_000
"""Most tokens of all examples of a context."""


def check_together(
    graph: GraphSection, task: TaskSection, model: ModelSection, training: TrainingSection
) -> None:
    """Check that the options of these sections fit together.

    Raises:
        RecipeError: the first conflict.
    """
    _check_owned(task)
    if task.kind == "causal_graph":
        _check_graph(graph)
        _check_task(task)
    elif task.kind != "own":
        _check_without_graph(graph, task, model, training)
        check = {
            "repeated_tokens": _check_repeated_tokens,
            "text": _check_text,
            "tree": _check_tree,
            "selective_lags": _check_selective_lags,
            "in_context_graphs": _check_in_context_graphs,
        }
        check[task.kind](task)
        if (task.kind == "tree") != (model.attention == "bidirectional"):
            needed = "bidirectional" if task.kind == "tree" else "causal"
            raise RecipeError(f"model.attention: {task.kind} needs {needed}")
    if model.kind == "in_context_graphs" and task.kind not in ("in_context_graphs", "own"):
        raise RecipeError(
            f"model.kind: in_context_graphs learns the task of that name alone, not {task.kind}"
        )
    if model.kind != "own":
        _check_model(model, training)
    if training.batch_size % training.accumulation:
        raise RecipeError(
            f"training.accumulation: {training.accumulation} parts do not divide "
            f"a batch of {training.batch_size}"
        )


def _not_an_option(
    section: str, name: str, choice: str, options: dict[str, tuple[str, ...]]
) -> RecipeError:
    owners = ", ".join(owner for owner, names in options.items() if name in names)
    return RecipeError(f"{section}.{name}: not an option of {choice} (it belongs to {owners})")


def _check_graph(graph: GraphSection) -> None:
    accepted = GRAPH_OPTIONS[graph.preset]
    for name in sorted({name for names in GRAPH_OPTIONS.values() for name in names}):
        given = getattr(graph, name) is not None
        if given and name not in accepted:
            raise _not_an_option("graph", name, f"preset {graph.preset}", GRAPH_OPTIONS)
        if not given and name in accepted and name not in _OPTIONAL_GRAPH_OPTIONS:
            raise RecipeError(f"graph.{name}: needed by preset {graph.preset}")
    sized = graph.preset in PRESETS
    if sized and graph.sequence_length is None:
        raise RecipeError(f"graph.sequence_length: needed by preset {graph.preset}")
    if not sized and graph.sequence_length is not None:
        raise RecipeError(
            f"graph.sequence_length: follows from the graph with preset {graph.preset}"
        )


def _check_task(task: TaskSection) -> None:
    _check_alpha(task)
    if task.transition is not None and len(task.transition) != task.vocab_size:
        raise RecipeError(
            f"task.transition: {len(task.transition)} rows for a vocabulary of {task.vocab_size}"
        )
    if task.transition is not None and task.matrices is not None:
        raise RecipeError("task.matrices: does not go with task.transition, which is one matrix")


def _check_owned(task: TaskSection) -> None:
    """Check that no option of another kind of task is given; one's own experiment may read all."""
    if task.kind == "own":
        return
    for item in fields(TaskSection):
        owners = _TASK_OPTIONS.get(item.name, (task.kind,))
        if task.kind not in owners and getattr(task, item.name) != item.default:
            raise RecipeError(f"task.{item.name}: belongs to kind {' and '.join(owners)}")


def _check_without_graph(
    graph: GraphSection, task: TaskSection, model: ModelSection, training: TrainingSection
) -> None:
    kinds = ("standard", "in_context_graphs") if task.kind == "in_context_graphs" else ("standard",)
    if model.kind not in kinds:
        raise RecipeError(f"model.kind: {task.kind} needs kind {' or '.join(kinds)}")
    if graph != GraphSection():
        raise RecipeError(f"graph: {task.kind} has no graph")
    if training.target != "sampled":
        raise RecipeError(f"training.target: {task.kind} only has sampled targets")


def _check_repeated_tokens(task: TaskSection) -> None:
    if task.repeat_lengths is None:
        raise RecipeError("task.repeat_lengths: needed by repeated_tokens")
    low, high = task.repeat_lengths
    if not (2 <= low <= high and 3 <= high <= 5_000):  # the probes need a block of three
        raise RecipeError(
            "task.repeat_lengths: shortest (at least 2) and longest (3 to 5000), "
            f"found [{low}, {high}]"
        )


def _check_text(task: TaskSection) -> None:
    if task.context is None:
        raise RecipeError("task.context: needed by text")
    if not 3 <= task.vocab_size <= MAX_CHARACTERS:
        raise RecipeError(
            f"task.vocab_size: 3 to {MAX_CHARACTERS} for text, found {task.vocab_size}"
        )


def _check_tree(task: TaskSection) -> None:
    if task.depth is None:
        raise RecipeError("task.depth: needed by tree")
    if task.filter > task.depth:
        raise RecipeError(
            f"task.filter: 0 to the depth, {task.depth}, allowed; found {task.filter}"
        )
    if task.vocab_size > MAX_SYMBOLS:
        raise RecipeError(
            f"task.vocab_size: at most {MAX_SYMBOLS} symbols for tree, found {task.vocab_size}"
        )


def _check_selective_lags(task: TaskSection) -> None:
    if task.lags is None or task.context is None:
        missing = "lags" if task.lags is None else "context"
        raise RecipeError(f"task.{missing}: needed by selective_lags")
    if len(set(task.lags)) != len(task.lags) or not task.lags:
        raise RecipeError(f"task.lags: distinct lags needed, found {list(task.lags)}")
    if max(task.lags) >= task.context:
        raise RecipeError(
            f"task.lags: at most {task.context - 1} in a context of {task.context}, "
            f"found {max(task.lags)}"
        )
    _check_alpha(task)


def _check_in_context_graphs(task: TaskSection) -> None:
    if task.positions is None or task.examples is None:
        missing = "positions" if task.positions is None else "examples"
        raise RecipeError(f"task.{missing}: needed by in_context_graphs")
    length = (task.examples + 1) * task.positions
    if length > MAX_CONTEXT:
        raise RecipeError(
            f"task.examples: {task.examples} + 1 examples of {task.positions} positions are "
            f"{length:,} tokens; at most {MAX_CONTEXT:,} are allowed"
        )
    _check_alpha(task)


def _check_alpha(task: TaskSection) -> None:
    if isinstance(task.alpha, tuple) and len(task.alpha) != task.vocab_size:
        raise RecipeError(
            f"task.alpha: {len(task.alpha)} values for a vocabulary of {task.vocab_size}"
        )


def _check_model(model: ModelSection, training: TrainingSection) -> None:
    for item in fields(ModelSection):
        takes = item.name == "kind" or item.name in _MODEL_OPTIONS[model.kind]
        if not takes and getattr(model, item.name) != item.default:
            raise _not_an_option("model", item.name, f"kind {model.kind}", _MODEL_OPTIONS)
    if model.kind != "simplified" and training.algorithm != "joint":
        raise RecipeError(
            f"training.algorithm: two_stage is for kind simplified; {model.kind} needs joint"
        )
    if model.kind == "disentangled" and max(model.heads) > 1 and model.initial_scale == 0:
        raise RecipeError(
            "model.initial_scale: must be above 0 with several heads in a layer, "
            "since equal heads stay equal"
        )
    if model.kind == "in_context_graphs" and model.n_heads > 1 and model.initial_scale == 0:
        raise RecipeError(
            "model.initial_scale: must be above 0 with several heads, since equal heads stay equal"
        )
    if model.kind == "standard" and model.d_model % model.n_heads:
        raise RecipeError(f"model.d_model: {model.d_model} is no multiple of {model.n_heads} heads")
    widening = math.prod(n_heads + 1 for n_heads in model.heads)
    if model.kind == "disentangled" and widening > 1024:
        raise RecipeError(
            f"model.heads: {list(model.heads)} widen the residual stream "
            f"{widening:,} times; at most 1024 times is possible"
        )
