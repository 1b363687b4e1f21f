"""Recipes: all settings of a run as one strict type, for TOML, command line, Python and W&B.

This package does not import torch, so that the command line can print its help quickly.
"""

from mechcausal.recipes.errors import RecipeError
from mechcausal.recipes.files import (
    find_recipe,
    load_recipe,
    packaged_recipes,
    recipe_to_toml,
)
from mechcausal.recipes.recipe import Recipe, parse_recipe, recipe_fields, recipe_to_dict
from mechcausal.recipes.sections import (
    CheckpointsSection,
    ClampSection,
    EvaluationSection,
    GraphSection,
    ModelSection,
    ProbingSection,
    Seed,
    StageSection,
    TaskKind,
    TaskSection,
    TrainingSection,
    WandbMode,
    WandbSection,
)

__all__ = [
    "CheckpointsSection",
    "ClampSection",
    "EvaluationSection",
    "GraphSection",
    "ModelSection",
    "ProbingSection",
    "Recipe",
    "RecipeError",
    "Seed",
    "StageSection",
    "TaskKind",
    "TaskSection",
    "TrainingSection",
    "WandbMode",
    "WandbSection",
    "find_recipe",
    "load_recipe",
    "packaged_recipes",
    "parse_recipe",
    "recipe_fields",
    "recipe_to_dict",
    "recipe_to_toml",
]
