"""The model card of a published run, made from its record."""

import re
from collections.abc import Sequence
from typing import Any

from mechcausal import __version__
from mechcausal.measures.figures import STEP, figure_of
from mechcausal.pictures.pages.reproduce import reproduce_command
from mechcausal.recipes import Recipe
from mechcausal.records.run_data import RunData
from mechcausal.studies.detection import Detection

_SCORES = ("prefix_matching", "positional_control", "previous_token", "duplicate_token")
_ENVIRONMENT = ("mechcausal", "torch", "numpy", "transformer-lens")


def model_card(
    run: RunData,
    recipe: Recipe,
    recipe_toml: str,
    *,
    repo: str,
    steps: Sequence[int],
    recipe_sha256: str,
    detection: Detection | None,
    pictures: Sequence[str],
) -> str:
    """The model card as Markdown with its metadata.

    Args:
        run: the run's record.
        recipe: its recipe, as it is published.
        recipe_toml: the same as TOML.
        repo: the model's name on the Hub.
        steps: the steps of its revisions.
        recipe_sha256: SHA-256 of `recipe_toml`.
        detection: the heads of the final weights; None if they cannot be scored.
        pictures: names of the pictures beside the card.
    """
    model, task = recipe.model, recipe.task
    parts = [
        "---\nlibrary_name: mechcausal\ntags:\n- mechanistic-interpretability\n- mechcausal\n"
        f"- {task.kind.replace('_', '-')}\n---\n",
        f"# {_line(recipe.name)}, seed {recipe.seed}\n",
        f"A small transformer (`{model.kind}`) trained for {recipe.n_steps:,} steps on data of "
        f"known structure (`{task.kind}`), with mechcausal {__version__}. It is made for the study "
        "of how attention forms, and for nothing else.\n",
        *(f"![{_line(name)}]({name})\n" for name in pictures),
        "## Figures at the end of training\n",
        _figures(run),
        "## Heads\n",
        _heads(detection),
        "## Revisions\n",
        f"`main` holds the final weights, and each of the {len(steps)} branches `step-N` those "
        f"after N steps: {_listed(steps)}. The header of `model.safetensors` names the step "
        f"(`step`), the version of mechcausal (`mechcausal`) and the SHA-256 of `recipe.toml` "
        f"(`recipe_sha256`, {recipe_sha256[:12]}…).\n",
        "## Use\n",
        f"```sh\nmechcausal detect {repo} --ablate\nmechcausal detect {repo} --revision "
        f"step-{steps[0]}\nmechcausal formation {repo}\n```\n",
        _fenced(
            "from huggingface_hub import snapshot_download\nfrom mechcausal import load_model\n\n"
            f'model = load_model(snapshot_download("{repo}", local_dir="model"))\n',
            "python",
        ),
        "## Recipe\n",
        f"`{reproduce_command(recipe)}` trains it again; numbers agree to rounding on other "
        "processors.\n",
        _fenced(recipe_toml, "toml"),
        _environment(run),
    ]
    return "\n".join(part for part in parts if part)


def _figures(run: RunData) -> str:
    last = run.history[-1] if run.history else {}
    rows = [
        f"| {figure_of(key).label} | {value:.4g} | {figure_of(key).unit} |"
        for key, value in last.items()
        if value is not None and key != STEP and not key.startswith("heads/")
    ]
    if not rows:
        return "None was recorded.\n"
    step = last.get(STEP)
    head = f"At step {step:,}.\n\n" if step is not None else ""
    return f"{head}| figure | value | unit |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _heads(detection: Detection | None) -> str:
    if detection is None:
        return "They could not be scored on random tokens repeated twice.\n"
    content = detection.to_dict()
    rows = [
        f"| {row['layer']}.{row['head']} | {', '.join(row['verdict']).replace('_', ' ') or '–'} | "
        + " | ".join(_number(row[name]) for name in _SCORES)
        + " |"
        for row in content["heads"][:32]
    ]
    gain = ""
    if detection.in_context is not None:
        value = detection.in_context.in_context_gain
        error = detection.in_context.in_context_gain_stderr
        gain = f" The gain of the second copy is {value:.3f} ± {error:.3f} nats a token."
    names = " | ".join(name.replace("_", " ") for name in _SCORES)
    return (
        f"On {content['sequences']} sequences of random tokens repeated twice, threshold "
        f"{content['threshold']:g}.{gain} A verdict says where a head looks on such tokens, not "
        "that the model needs it.\n\n"
        f"| head | verdict | {names} |\n|---|---|{'---|' * len(_SCORES)}\n" + "\n".join(rows) + "\n"
    )


def _environment(run: RunData) -> str:
    environment: Any = run.facts.get("environment")
    if not isinstance(environment, dict):
        return ""
    known = [f"{key} {_line(environment[key])}" for key in _ENVIRONMENT if key in environment]
    return f"Trained with {', '.join(known)}.\n" if known else ""


def _listed(steps: Sequence[int]) -> str:
    names = [f"`step-{step}`" for step in steps]
    return ", ".join(names if len(names) <= 12 else [*names[:6], "…", *names[-5:]])


def _line(value: object) -> str:
    """Text without line breaks and without what Markdown or HTML would take as markup."""
    return " ".join(re.sub(r"[\[\]<>`|*]", "", str(value)).split())[:200]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _fenced(content: str, language: str) -> str:
    """A code block whose fence the content cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content}{fence}\n"
