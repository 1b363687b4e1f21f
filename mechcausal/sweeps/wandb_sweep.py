"""Write a sweep as W&B's own sweep configuration, which W&B's agents run.

https://docs.wandb.ai/guides/sweeps/define-sweep-configuration
"""

from pathlib import Path
from typing import Any

import yaml

from mechcausal.recipes import recipe_to_toml
from mechcausal.support.files import write_atomically
from mechcausal.sweeps.plan import size
from mechcausal.sweeps.sweep import Range, Sweep, SweepError


def wandb_config(sweep: Sweep, recipe: str) -> dict[str, Any]:
    """The configuration that `wandb sweep` takes; its agents call `mechcausal train`.

    Args:
        sweep: a sweep of kind grid or random.
        recipe: name or path of the base recipe on the agents' machines.

    Raises:
        SweepError: an axis that W&B's agents cannot put on a command line, or kind list, which
            W&B does not have.
    """
    method = sweep.search.method or ("random" if sweep.kind == "random" else "grid")
    if sweep.kind == "list":
        raise SweepError(f"{sweep.source}: kind list: W&B only has grid, random and bayes")
    ranges = [path for path, axis in sweep.axes.items() if isinstance(axis, Range)]
    if method == "grid" and ranges:
        raise SweepError(f"{sweep.source}: axes.{ranges[0]}: a range has no grid")
    wandb = sweep.base.wandb
    has_pages = sweep.base.probing.report or "probing.report" in sweep.axes
    config: dict[str, Any] = {
        "name": sweep.name,
        "project": wandb.project,
        **({"entity": wandb.entity} if wandb.entity else {}),
        "program": "mechcausal",
        "method": method,
        "metric": {"name": sweep.search.metric, "goal": sweep.search.goal},
        "command": [
            *("${env}", "mechcausal", "train", recipe, f"--wandb.group={sweep.name}", "--quiet"),
            *([] if has_pages else ["--probing.no-report"]),
            "${args}",
        ],
        "parameters": {path: _parameter(path, axis, sweep) for path, axis in sweep.axes.items()},
    }
    if "seed" not in sweep.axes:
        config["parameters"]["seed"] = {"values": list(sweep.seeds)}
    if method != "grid" and sweep.samples:
        config["run_cap"] = size(sweep)
    return config


def write_wandb_sweep(sweep: Sweep, file: Path) -> list[Path]:
    """Write the YAML file and, unless the base recipe is a bundled one, the recipe beside it.

    Returns:
        The files written.

    Raises:
        SweepError: see `wandb_config`.
        OSError: a file cannot be written.
    """
    recipe = file.with_name(f"{file.stem}.recipe.toml")
    config = wandb_config(sweep, sweep.recipe_source or str(recipe))
    written = [file]
    file.parent.mkdir(parents=True, exist_ok=True)
    if not sweep.recipe_source:
        write_atomically(recipe, recipe_to_toml(sweep.base))
        written.append(recipe)
    write_atomically(file, yaml.safe_dump(config, sort_keys=False))
    return written


def _parameter(path: str, axis: "tuple[Any, ...] | Range", sweep: Sweep) -> dict[str, Any]:
    where = f"{sweep.source}: axes.{path}"
    if not isinstance(axis, Range):
        if any(isinstance(value, dict | list) for value in axis):
            raise SweepError(f"{where}: W&B's agents only take numbers, strings and booleans")
        return {"values": list(axis)}
    is_integer = isinstance(axis.low, int) and isinstance(axis.high, int)
    if is_integer and axis.log:
        raise SweepError(f"{where}: W&B has no logarithmic range of integers; list the values")
    if is_integer:
        return {"distribution": "int_uniform", "min": axis.low, "max": axis.high}
    name = "log_uniform_values" if axis.log else "uniform"
    return {"distribution": name, "min": float(axis.low), "max": float(axis.high)}
