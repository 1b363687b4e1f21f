"""Find a model's induction heads: scores, ablation, K-composition and the circuit."""

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mechcausal.pictures.static.run_figures import head_heatmap
from mechcausal.pictures.static.style import HEAD_SCORES
from mechcausal.recipes import WandbMode
from mechcausal.studies.study_runs import start_run
from mechcausal.studies.targets import Target
from probes import (
    AblationEffect,
    Circuit,
    HeadScores,
    KComposition,
    PositionLoss,
    ablation_effects,
    find_circuit,
    k_composition,
    loss_by_position,
    score_heads,
)
from probes.intervening.circuit import heads_below


@dataclass(frozen=True)
class Detection:
    """Scores of a model's heads and the requested interventions.

    Attributes:
        target: the model.
        scores: scores of every head.
        in_context: loss by position; None for a model that makes no next-token predictions.
        ablations: effects of ablating induction and previous-token heads; None if not requested.
        composition: of earlier heads with the induction heads; None if not requested.
        circuit: effects of earlier heads through the induction heads' keys, queries and values;
            None if not requested.
    """

    target: Target
    scores: HeadScores
    in_context: PositionLoss | None
    ablations: tuple[AblationEffect, ...] | None
    composition: KComposition | None
    circuit: Circuit | None = None

    def is_previous_token(self, head: tuple[int, int]) -> bool:
        """Whether "previous_token" is among a head's verdicts."""
        return "previous_token" in self.scores.verdicts[head]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: `HeadScores.to_dict` and the requested interventions.

        Adds `in_context` (loss by position and gain, nats), `ablations`, `composition` (for each
        induction head the earlier heads, strongest first), and `circuit` (`Circuit.to_dict`); of a
        revision on the Hub also `revision`, `commit` and `weights_sha256`.
        """
        content = self.scores.to_dict(self.target.name) | dict(self.target.origin)
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
        if self.circuit is not None:
            content["circuit"] = self.circuit.to_dict()
        return content

    def to_frame(self) -> Any:
        """One row per head: `HeadScores.to_frame`, and columns of the circuit if requested.

        These are `logit`, `logit_stderr`, `rise`, `rise_stderr` (see `HeadEffect`), and for the
        keys, queries and values (k, q, v) of a receiver `reads_k` (the senders of named paths),
        `reads_k_rise` and `reads_k_stderr` (of the first one); empty where there is none.
        """
        frame = self.scores.to_frame()
        if self.circuit is None:
            return frame
        by_head: dict[tuple[int, int], dict[str, Any]] = {}
        for effect in self.circuit.heads:
            values = asdict(effect)
            by_head[values.pop("layer"), values.pop("head")] = values
        for path in reversed(self.circuit.named):  # so that the largest rise comes last
            row, name = by_head[path.receiver], f"reads_{path.input}"
            sender = "L{}H{}".format(*path.sender)  # 0.10 would be read as a number
            row[name] = f"{sender} {row[name]}" if name in row else sender
            row[f"{name}_rise"], row[f"{name}_stderr"] = path.rise, path.rise_stderr
        columns = ["logit", "logit_stderr", "rise", "rise_stderr"]
        columns += [f"reads_{i}{part}" for i in "kqv" for part in ("", "_rise", "_stderr")]
        heads = zip(frame["layer"], frame["head"], strict=True)
        rows = [by_head.get(head, {}) for head in heads]
        for column in columns:
            frame[column] = [row.get(column) for row in rows]
        return frame


def detect(
    target: Target,
    *,
    n_sequences: int = 32,
    repeat_lengths: Sequence[int] | None = None,
    threshold: float = 0.4,
    seed: int = 0,
    ablate: bool = False,
    compose: bool = False,
    circuit: Literal["previous", "all"] | None = None,
) -> Detection:
    """Score every head; on request ablate heads, compute K-composition and patch paths.

    Args:
        target: the model.
        n_sequences: number of repeated sequences, plus as many controls.
        repeat_lengths: lengths of the repeated block; None for lengths that fit the context.
        threshold: lowest score at which a head gets a verdict.
        seed: seed of the random tokens.
        ablate: mean-ablate the induction and previous-token heads, one at a time.
        compose: K-composition of earlier heads with the induction heads.
        circuit: path patching from previous-token heads, or from all earlier heads, to the keys,
            queries and values of the induction heads.

    Raises:
        ValueError, ProbeError: see `probes.score_heads` and `probes.find_circuit`; also for
            `ablate` and `circuit` with a model that does not predict every token.
    """
    for flag, is_given in (("--ablate", ablate), ("--circuit", circuit is not None)):
        if is_given and not target.predicts_every_token:
            raise ValueError(f"{flag} needs next-token predictions, which this model does not make")
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
    paths = None
    if circuit is not None:
        last = max((layer for layer, _ in induction), default=0)
        paths = find_circuit(
            model,
            previous if circuit == "previous" else heads_below(model, last),
            induction,
            n_sequences=min(n_sequences, 32),
            generator=generator(),
            bos=target.bos,
        )
    return Detection(target, scores, in_context, ablations, composition, paths)


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
    for path in detection.circuit.named if detection.circuit is not None else ():
        rows[f"circuit/{path}"] = path.rise
    run.log(0, rows, pictures)
    run.finish({}, exit_code=0)
    return run.location
