"""The clamp of a run: which attention is held fixed, and at which steps."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.recipes import Recipe, RecipeError
from mechcausal.recipes.clamp_checks import FROM_GRAPH, heads_by_layer, is_on
from mechcausal.training.experiments.base import Experiment

if TYPE_CHECKING:
    from probes.intervening.attention_edits import Edit


def check_clamp_fits(recipe: Recipe, graph: CausalGraph | None, length: int) -> None:
    """Check the clamp of a recipe against the sizes of its graph.

    Args:
        recipe: a parsed recipe.
        graph: its causal graph; None without one.
        length: tokens of a sequence.

    Raises:
        RecipeError: a position that does not exist, or more parents than heads.
    """
    clamp = recipe.clamp
    last = max((position for position, _ in clamp.forbidden), default=0)
    if last >= length:
        raise RecipeError(f"clamp.forbidden: positions 0 to {length - 1} allowed, found {last}")
    if clamp.pattern not in FROM_GRAPH or graph is None or graph.max_parents <= 1:
        return
    heads = heads_by_layer(recipe.model)
    n_heads = None if heads is None else heads[clamp.layer]
    if clamp.head is not None:
        raise RecipeError(
            f"clamp.head: {clamp.pattern} holds head n at the n-th parent where positions have "
            "several: leave head out"
        )
    if n_heads is not None and n_heads < graph.max_parents:
        raise RecipeError(
            f"clamp.pattern: {clamp.pattern} needs a head for each of {graph.max_parents} parents, "
            f"layer {clamp.layer} has {n_heads}"
        )


def layer1_rows(graph: CausalGraph) -> dict[int, tuple[int, ...]]:
    """What each row of layer 1 should attend to: its parents, the last row the query's if named.

    Example:
        >>> layer1_rows(CausalGraph(((), (0,), (1,)), query_parents=(2,)))
        {1: (0,), 2: (2,)}
    """
    rows = graph.child_rows
    if graph.query_parents:
        rows[graph.sequence_length - 1] = graph.query_parents
    return rows


def wrong_rows(graph: CausalGraph, seed: int) -> dict[int, tuple[int, ...]]:
    """For each of `layer1_rows` as many earlier positions that are not among its keys.

    A row without such a position gets itself; where there are fewer of them, it gets those.

    Example:
        >>> sorted(wrong_rows(CausalGraph(((), (0,), (1,), (2,), (3,))), seed=0))
        [1, 2, 3, 4]
    """
    # Its own stream: a random graph is drawn from the run's seed too.
    generator = np.random.default_rng([seed, 1])
    rows = {}
    for row, parents in layer1_rows(graph).items():
        others = [key for key in range(row) if key not in parents] or [row]
        drawn = generator.choice(others, min(len(parents), len(others)), replace=False)
        rows[row] = tuple(sorted(drawn.tolist()))
    return rows


def rows_as_pattern(
    rows: Mapping[int, tuple[int, ...]], length: int
) -> Float[Tensor, "head query key"]:
    """One-hot patterns, head n on the n-th key of every row; rows of zeros stay free.

    Example:
        >>> rows_as_pattern({1: (0,)}, 2).tolist()
        [[[0.0, 0.0], [1.0, 0.0]]]
    """
    n_heads = max((len(keys) for keys in rows.values()), default=1)
    pattern = torch.zeros(n_heads, length, length)
    for row, keys in rows.items():
        for head, key in enumerate(keys):
            pattern[head, row, key] = 1.0
    return pattern


def clamp_edits(
    recipe: Recipe, frozen: Float[Tensor, "head query key"] | None = None
) -> "list[Edit]":
    """The clamps of the recipe's layer, for `GraphModel.clamped` or `probes.clamp`.

    Args:
        recipe: checked.
        frozen: the pattern that `frozen` holds.
    """
    from probes import fixed_to, forbid, previous_token

    section, head = recipe.clamp, recipe.clamp.head
    edits: list[Edit] = []
    if section.pattern == "previous_token":
        edits.append(previous_token(head))
    elif section.pattern == "frozen":
        assert frozen is not None
        edits.append(fixed_to(frozen if head is None else frozen[head], head=head))
    elif section.pattern in FROM_GRAPH:
        graph = recipe.build_graph()
        seed = recipe.seed if section.seed is None else section.seed
        rows = layer1_rows(graph) if section.pattern == "graph" else wrong_rows(graph, seed)
        edits.append(fixed_to(rows_as_pattern(rows, graph.sequence_length), head=head))
    if section.forbidden:
        edits.append(forbid(section.forbidden, head))
    return edits


class RunClamp:
    """Holds the attention that a recipe clamps, at the steps at which it is clamped."""

    def __init__(self, experiment: Experiment) -> None:
        """Prepare the clamp; nothing is held before `at`.

        Raises:
            RecipeError: the experiment has no sequences on which to freeze a pattern.
        """
        self._experiment = experiment
        self._section = experiment.recipe.clamp
        self._frozen: Tensor | None = None
        self._block: ExitStack | None = None
        self._tokens: Tensor | None = None
        if self._section.pattern == "frozen":
            self._tokens = experiment.evaluation_tokens()

    def at(self, step: int) -> None:
        """Hold the attention from this step on, or let it go, as the recipe says.

        Raises:
            ValueError, ModelError: the model cannot be clamped so.
        """
        section = self._section
        is_held = is_on(section) and section.from_step <= step
        is_held = is_held and (section.until_step is None or step < section.until_step)
        if is_held and self._block is None:
            if self._frozen is None and section.pattern == "frozen":
                self._frozen = self._pattern_now()
            edits = clamp_edits(self._experiment.recipe, self._frozen)
            with ExitStack() as block:  # closes it if this raises
                block.enter_context(self._experiment.clamped({section.layer: edits}))
                self._block = block.pop_all()
        elif not is_held:
            self.close()

    def close(self) -> None:
        """Let the attention go."""
        block, self._block, self._frozen = self._block, None, None
        if block is not None:
            block.close()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: the frozen pattern, if there is one."""
        return {} if self._frozen is None else {self._name: self._frozen}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the frozen pattern of a checkpoint with the same layer and first step."""
        self._frozen = state.get(self._name)

    @property
    def _name(self) -> str:
        return f"layer{self._section.layer}_from{self._section.from_step}"

    def _pattern_now(self) -> Float[Tensor, "head query key"]:
        """The layer's mean pattern, of the heads that the model uses."""
        from probes.intervening.clamps import mean_pattern

        assert self._tokens is not None
        experiment, layer = self._experiment, self._section.layer
        pattern = mean_pattern(experiment.hooked, layer, self._tokens)
        heads = heads_by_layer(experiment.recipe.model)
        return pattern if heads is None else pattern[: heads[layer]]
