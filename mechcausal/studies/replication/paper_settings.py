"""The paper's own optimisers, steps and batches, as its authors' code sets them.

The bundled recipes reach the same solutions in minutes. These take hours: 2^17 steps of 1,024
sequences for each graph of figure 2, about half an hour to an hour and a half a run and core.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from mechcausal.studies.replication.runs import Member

LABEL = "paper"
BATCH = 1024


def _settings(steps: int, *, probe_every: int, **changes: Any) -> dict[str, Any]:
    joint = {"steps": steps, "schedule": "cosine"} | changes.pop("joint")
    return {
        "training__batch_size": BATCH,
        "checkpoints__every": 4096,
        **{f"training__joint__{name}": value for name, value in joint.items()},
        "probing__every": probe_every,
        **changes,
    }


_GRADIENT_DESCENT = {"optimizer": "sgd", "lr": 1.0}
_ADAMW = {"optimizer": "adamw", "lr": 0.01}
_FIGURE2 = _settings(2**17, probe_every=2048, joint=_GRADIENT_DESCENT)
_FIGURE5 = _settings(
    2**16,
    probe_every=512,
    joint=_ADAMW | {"warmup": 0, "weight_decay": 1e-4},
    model__initial_scale=1e-4,
    training__target="sampled",
)
PAPER_SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("figure2_chain", "figure2_icl", "figure2_random", "figure2_manual"), _FIGURE2),
    **dict.fromkeys(("figure5_two_parents", "figure5_trigrams", "figure5_fourgrams"), _FIGURE5),
    "figure8_mlp": _settings(2**12, probe_every=64, joint=_ADAMW | {"weight_decay": 2e-4}),
    "figure9_forest": _settings(
        2**14, probe_every=1024, joint=_GRADIENT_DESCENT | {"schedule": "constant"}
    ),
}
"""Changes of a bundled recipe, as in `Recipe.with_overrides`, by its name."""
_ALL_SEEDS = ("figure9_forest",)  # a seed is a graph


def with_paper_settings(members: Collection[Member]) -> list[Member]:
    """The same runs with the paper's settings: one seed of each recipe, every forest of figure 9.

    Runs of recipes that the paper does not have are left out.
    """
    return [
        replace(member, changes=PAPER_SETTINGS[member.recipe], label=LABEL)
        for member in members
        if member.recipe in PAPER_SETTINGS and (member.seed == 0 or member.recipe in _ALL_SEEDS)
    ]
