"""Check that the clamp of a recipe fits its task, its model and its steps."""

from mechcausal.recipes.errors import RecipeError
from mechcausal.recipes.sections import ClampSection, ModelSection, TaskSection

FROM_GRAPH = ("graph", "wrong_graph")
"""The patterns that need a causal graph."""


def is_on(clamp: ClampSection) -> bool:
    """Whether a recipe clamps anything."""
    return clamp.pattern not in (None, "free") or bool(clamp.forbidden)


def check_clamp(
    clamp: ClampSection, task: TaskSection, model: ModelSection, *, n_steps: int
) -> None:
    """Check that the clamp fits the other sections; sizes of the graph are checked later.

    Raises:
        RecipeError: the first conflict.
    """
    if not is_on(clamp):
        changed = [name for name in vars(clamp) if getattr(clamp, name) != _FREE[name]]
        if clamp.pattern is None and changed:
            raise RecipeError(
                f"clamp.{changed[0]}: needs clamp.pattern or clamp.forbidden: nothing is clamped"
            )
        return
    if model.kind == "in_context_graphs":
        raise RecipeError("clamp: a model of kind in_context_graphs cannot be clamped")
    if clamp.pattern in FROM_GRAPH and task.kind != "causal_graph":
        raise RecipeError(f"clamp.pattern: {clamp.pattern} needs a graph, which {task.kind} lacks")
    if clamp.seed is not None and clamp.pattern != "wrong_graph":
        raise RecipeError("clamp.seed: belongs to pattern wrong_graph")
    _check_steps(clamp, n_steps)
    _check_forbidden(clamp, model)
    heads = heads_by_layer(model)
    if heads is None:
        return
    if clamp.layer >= len(heads):
        raise RecipeError(
            f"clamp.layer: 0 to {len(heads) - 1} in a model of {len(heads)} layers, "
            f"found {clamp.layer}"
        )
    n_heads = heads[clamp.layer]
    if clamp.head is not None and clamp.head >= n_heads:
        raise RecipeError(
            f"clamp.head: 0 to {n_heads - 1} in layer {clamp.layer} of {n_heads} heads, "
            f"found {clamp.head}"
        )


def heads_by_layer(model: ModelSection) -> tuple[int, ...] | None:
    """The number of heads in each layer; None for a model of the caller's own."""
    if model.kind == "own":
        return None
    if model.kind == "simplified":
        return (1, 1)
    return model.heads if model.kind == "disentangled" else (model.n_heads,) * model.n_layers


def _check_steps(clamp: ClampSection, n_steps: int) -> None:
    if clamp.from_step >= max(n_steps, 1):
        raise RecipeError(
            f"clamp.from_step: 0 to {max(n_steps, 1) - 1} in a run of {n_steps:,} steps, "
            f"found {clamp.from_step:,}"
        )
    if clamp.until_step is not None and clamp.until_step <= clamp.from_step:
        raise RecipeError(
            f"clamp.until_step: above from_step, {clamp.from_step:,}, found {clamp.until_step:,}"
        )


def _check_forbidden(clamp: ClampSection, model: ModelSection) -> None:
    if clamp.forbidden and model.attention == "bidirectional":
        raise RecipeError("clamp.forbidden: needs causal attention; this model's is bidirectional")
    forbidden: dict[int, set[int]] = {}
    for position, key in clamp.forbidden:
        if key > position:
            raise RecipeError(
                f"clamp.forbidden: [{position}, {key}]: a position attends to earlier ones and "
                "itself alone"
            )
        forbidden.setdefault(position, set()).add(key)
    for position, keys in forbidden.items():
        if len(keys) > position:
            raise RecipeError(f"clamp.forbidden: position {position} keeps no key to attend to")


_FREE = vars(ClampSection())
