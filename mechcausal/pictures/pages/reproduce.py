"""The command that reproduces a run."""

import shlex

from mechcausal.recipes import Recipe, RecipeError, load_recipe, packaged_recipes, recipe_to_dict
from mechcausal.support.nested import flat


def reproduce_command(recipe: Recipe) -> str:
    """The command that trains a recipe: a bundled recipe with options, or the file recipe.toml.

    W&B settings are omitted because they do not affect training.

    Example:
        >>> from mechcausal.recipes import load_recipe
        >>> reproduce_command(load_recipe("markov_chain").with_overrides(seed=3))
        'mechcausal train markov_chain --seed 3'
    """
    from_file = "mechcausal train recipe.toml"
    if recipe.name not in packaged_recipes():
        return from_file
    try:
        known = flat(recipe_to_dict(load_recipe(recipe.name)))
    except RecipeError:
        return from_file
    words = ["mechcausal", "train", recipe.name]
    wanted = flat(recipe_to_dict(recipe))
    for key in sorted(
        wanted.keys() | known.keys(),
        key=lambda key: list(wanted).index(key) if key in wanted else -1,
    ):
        if key.startswith("wandb.") or wanted.get(key) == known.get(key):
            continue
        value = wanted.get(key)
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            section, _, name = flag.rpartition(".")
            words.append(f"--{section}.{name}" if value else f"--{section}.no-{name}")
        elif isinstance(value, int | float | str):
            words += [f"--{flag}", str(value)]
        else:
            return from_file
    return shlex.join(words)
