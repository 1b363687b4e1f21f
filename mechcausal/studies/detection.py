"""Find a model's induction heads: scores, ablation and K-composition."""

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mechcausal.pictures.static.run_figures import head_heatmap
from mechcausal.pictures.static.style import HEAD_SCORES
from mechcausal.recipes import WandbMode
from mechcausal.studies.study_runs import start_run
from mechcausal.studies.targets import Target
from probes import (
    AblationEffect,
    HeadScores,
    KComposition,
    PositionLoss,
    ablation_effects,
    k_composition,
    loss_by_position,
    score_heads,
)


@dataclass(frozen=True)
class Detection:
    """Scores of a model's heads and the requested interventions.

    Attributes:
        target: the model.
        scores: scores of every head.
        in_context: loss by position; None for a model that makes no next-token predictions.
        ablations: effects of ablating induction and previous-token heads; None if not requested.
        composition: of earlier heads with the induction heads; None if not requested.
    """

    target: Target
    scores: HeadScores
    in_context: PositionLoss | None
    ablations: tuple[AblationEffect, ...] | None
    composition: KComposition | None

    def is_previous_token(self, head: tuple[int, int]) -> bool:
        """Whether "previous_token" is among a head's verdicts."""
        return "previous_token" in self.scores.verdicts[head]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: `HeadScores.to_dict` and the requested interventions.

        Adds `in_context` (loss by position and gain, nats), `ablations`, and `composition` (for
        each induction head the earlier heads, strongest first).
        """
        content = self.scores.to_dict(self.target.name)
        if self.in_context is not None:
            content["in_context"] = {
                "loss": self.in_context.loss.tolist(),
                "repeat_length": self.in_context.repeat_length,
                "gain": self.in_context.in_context_gain,
            }
        if self.ablations is not None:
            content["ablations"] = [
                {key: None if value != value else value for key, value in asdict(effect).items()}
                for effect in self.ablations
            ]
        if self.composition is not None:
            content["composition"] = [
                {
                    "layer": layer,
                    "head": head,
                    "reads": [
                        {
                            "layer": earlier[0],
                            "head": earlier[1],
                            "score": score,
                            "previous_token": self.is_previous_token(earlier),
                        }
                        for earlier, score in self.composition.partners((layer, head), 5)
                    ],
                }
                for layer, head in self.composition.later
            ]
        return content


def detect(
    target: Target,
    *,
    n_sequences: int = 32,
    repeat_lengths: Sequence[int] | None = None,
    threshold: float = 0.4,
    seed: int = 0,
    ablate: bool = False,
    compose: bool = False,
) -> Detection:
    """Score every head; on request ablate heads and compute K-composition.

    Args:
        target: the model.
        n_sequences: number of repeated sequences, plus as many controls.
        repeat_lengths: lengths of the repeated block; None for lengths that fit the context.
        threshold: lowest score at which a head gets a verdict.
        seed: seed of the random tokens.
        ablate: mean-ablate the induction and previous-token heads, one at a time.
        compose: K-composition of earlier heads with the induction heads.

    Raises:
        ValueError, ProbeError: see `probes.score_heads`; also for `ablate` with a model that does
            not predict every token.
    """
    if ablate and not target.predicts_every_token:
        raise ValueError("--ablate needs next-token predictions, which this model does not make")
    model = target.model

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    scores = score_heads(
        model,
        n_sequences=n_sequences,
        repeat_lengths=repeat_lengths,
        generator=generator(),
        threshold=threshold,
        bos=target.bos,
    )
    induction, previous = scores.heads("induction"), scores.heads("previous_token")
    in_context = ablations = None
    if target.predicts_every_token:
        in_context = loss_by_position(
            model, n_sequences=min(n_sequences, 16), generator=generator(), bos=target.bos
        )
    if ablate:
        heads = list(dict.fromkeys([*induction, *previous]))
        ablations = ablation_effects(
            model, heads, n_sequences=min(n_sequences, 32), generator=generator(), bos=target.bos
        )
    composition = k_composition(model, induction) if compose else None
    return Detection(target, scores, in_context, ablations, composition)


def draw_heatmap(detection: Detection, path: Path) -> None:
    """The scores of all heads by layer and head, as a PNG file."""
    scores = detection.scores
    panels = {
        name.replace("_", " "): getattr(scores, name).float().cpu().numpy() for name in HEAD_SCORES
    }
    head_heatmap(path, panels, layers=scores.layers, title=detection.target.name)


def log_to_wandb(detection: Detection, mode: WandbMode, warnings: list[str]) -> str | None:
    """Log scores, heatmap and interventions as a W&B run of job type "detect".

    Returns the run's page or folder. An offline run is written to the target's run folder, or else
    to the current one. Returns None if W&B could not start; `warnings` then say why.
    """
    import wandb

    content = detection.to_dict()
    run = start_run(
        mode,
        detection.target.folder or Path.cwd(),
        warnings,
        kept="the scores are in its output",
        kind="detect",
        name=f"detect-{Path(detection.target.name).name}-{secrets.token_hex(2)}",
        config={key: value for key, value in content.items() if not isinstance(value, list)},
    )
    if run.folder is None:
        return None
    pictures: dict[str, np.ndarray | Path] = {"heads/heatmap": run.folder / "heads.png"}
    try:
        draw_heatmap(detection, run.folder / "heads.png")
    except OSError as error:
        warnings.append(f"{run.folder / 'heads.png'}: cannot be written: {error.strerror or error}")
        pictures = {}
    frame = detection.scores.to_frame()
    frame["verdict"] = [", ".join(names) for names in frame["verdict"]]
    rows: dict[str, Any] = {"heads": wandb.Table(dataframe=frame)}
    best = content["heads"][0]
    rows |= {f"best/{key}": best[key] for key in ("layer", "head", "prefix_matching")}
    if detection.in_context is not None:
        rows["in_context_gain"] = detection.in_context.in_context_gain
    for effect in detection.ablations or ():
        rows[f"ablation/L{effect.layer}H{effect.head}"] = effect.rise
    run.log(0, rows, pictures)
    run.finish({}, exit_code=0)
    return run.location
