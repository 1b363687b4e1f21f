"""A run as typed data: one strict recipe type for TOML, command line, Python, W&B and resume.

Importing this package is cheap (no torch): the command line prints its help from these types.
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
    EvaluationSection,
    GraphSection,
    ModelSection,
    ProbingSection,
    Seed,
    StageSection,
    TaskSection,
    TrainingSection,
    WandbMode,
    WandbSection,
)

__all__ = [
    "CheckpointsSection",
    "EvaluationSection",
    "GraphSection",
    "ModelSection",
    "ProbingSection",
    "Recipe",
    "RecipeError",
    "Seed",
    "StageSection",
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
