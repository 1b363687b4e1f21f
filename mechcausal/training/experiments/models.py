"""Build the initial model that a recipe describes."""

from collections.abc import Callable

import torch

from mechcausal.models.adapter import HookedTransformer
from mechcausal.models.base import GraphModel
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.in_context_graphs import InContextGraphTransformer
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.models.standard import StandardTransformer, standard_config
from mechcausal.recipes import ModelSection, Recipe
from mechcausal.tasks import Task
from mechcausal.tasks.in_context_graphs import InContextGraphTask

ModelBuilder = Callable[..., GraphModel | HookedTransformer]
"""A function `(task, *, seed, device)` that builds the initial model of a run: equal for equal
seeds, and of the task's sizes."""


def build_model(recipe: Recipe, task: Task, *, seed: int, device: torch.device) -> GraphModel:
    """The initial model of a recipe for a task; the recipe has passed `check_experiment`."""
    section = recipe.model
    vocab, length = task.vocab_size, task.sequence_length
    if section.kind == "simplified":
        simplified = SimplifiedTransformer(vocab, length, device=device)
        simplified.initialise(beta0=recipe.training.beta0)
        return simplified
    if section.kind == "disentangled":
        disentangled = DisentangledTransformer(vocab, length, section.heads, device=device)
        # On the CPU, so that a seed means the same weights on every device.
        generator = torch.Generator().manual_seed(seed)
        disentangled.initialise(scale=section.initial_scale, generator=generator)
        return disentangled
    if section.kind == "in_context_graphs":
        assert isinstance(task, InContextGraphTask)
        tailored = InContextGraphTransformer(
            vocab,
            n_positions=task.n_positions,
            n_examples=task.n_examples,
            n_heads=section.n_heads,
            device=device,
        )
        tailored.initialise(
            scale=section.initial_scale,
            own_column=section.own_column,
            generator=torch.Generator().manual_seed(seed),
        )
        return tailored
    return build_standard(section, vocab, length, seed=seed, device=device)


def build_standard(
    section: ModelSection, vocab_size: int, sequence_length: int, *, seed: int, device: torch.device
) -> StandardTransformer:
    """The standard transformer of a recipe's model section.

    Raises:
        ValueError: fixed embeddings do not fit into d_model.
    """
    config = standard_config(
        vocab_size,
        sequence_length,
        n_layers=section.n_layers,
        n_heads=section.n_heads,
        d_model=section.d_model,
        d_mlp=section.d_mlp,
        layer_norm=section.layer_norm,
        positions=section.positions,
        attention=section.attention,
        initial_scale=section.initial_scale,
        device=str(device),
    )
    return StandardTransformer(config, seed=seed, fixed_embeddings=section.embeddings == "fixed")
