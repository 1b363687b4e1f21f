"""Find a model's induction heads: scores, ablation, K-composition and the circuit."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mechcausal.pictures.static.run_figures import head_heatmap
from mechcausal.pictures.static.style import HEAD_SCORES
from mechcausal.recipes import WandbMode
from mechcausal.studies.stimuli import StimulusName, sources
from mechcausal.studies.study_runs import start_run
from mechcausal.studies.targets import Target
from mechcausal.studies.word_tasks import word_tasks
from probes import (
    AblationEffect,
    Circuit,
    FunctionVectors,
    HeadScores,
    KComposition,
    PositionLoss,
    ablation_effects,
    find_circuit,
    function_vectors,
    k_composition,
    loss_by_position,
)
from probes.heads.head_scores import score_heads_on
from probes.heads.stimuli import longest_stimulus
from probes.intervening.circuit import heads_below


@dataclass(frozen=True)
class Detection:
    """Scores of a model's heads and the requested interventions.

    Attributes:
        target: the model.
        scores: scores of every head on the first stimulus.
        in_context: loss by position; None for a model that makes no next-token predictions.
        ablations: effects of ablating induction and previous-token heads; None if not requested.
        composition: of earlier heads with the induction heads; None if not requested.
        circuit: effects of earlier heads through the induction heads' keys, queries and values;
            None if not requested.
        stimulus: name of the first stimulus, on which everything but `others` is measured.
        others: scores on further stimuli, by name.
        function_vectors: effects of mean outputs on few-shot tasks; None if not requested.
        left_out: few-shot tasks in words that the tokenizer splits, each with the reason.
    """

    target: Target
    scores: HeadScores
    in_context: PositionLoss | None
    ablations: tuple[AblationEffect, ...] | None
    composition: KComposition | None
    circuit: Circuit | None = None
    stimulus: StimulusName = "random"
    others: Mapping[StimulusName, HeadScores] = field(default_factory=dict)
    function_vectors: FunctionVectors | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    def is_previous_token(self, head: tuple[int, int]) -> bool:
        """Whether "previous_token" is among a head's verdicts."""
        return "previous_token" in self.scores.verdicts[head]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: `HeadScores.to_dict` and the requested interventions.

        Adds `in_context` (loss by position and gain, nats), `ablations`, `composition` (for each
        induction head the earlier heads, strongest first), `circuit` (`Circuit.to_dict`),
        `function_vectors` (`FunctionVectors.to_dict`, and `left_out`), and, unless random ids are
        the only stimulus, `stimulus` and `others` (`HeadScores.to_dict` by stimulus); of a revision
        on the Hub also `revision`, `commit` and `weights_sha256`.
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
        if self.function_vectors is not None:
            content["function_vectors"] = self.function_vectors.to_dict()
            content["function_vectors"]["left_out"] = dict(self.left_out)
        if self.others or self.stimulus != "random":
            content["stimulus"] = self.stimulus
            content["others"] = {
                name: s.to_dict(self.target.name) for name, s in self.others.items()
            }
        return content

    def to_frame(self) -> Any:
        """One row per head: `HeadScores.to_frame`, and columns of the circuit if requested.

        These are `logit`, `logit_stderr`, `rise`, `rise_stderr` (see `HeadEffect`), and for the
        keys, queries and values (k, q, v) of a receiver `reads_k` (the senders of named paths),
        `reads_k_rise` and `reads_k_stderr` (of the first one); empty where there is none. With
        function vectors `function_vector` (the effect) and `function_vector_stderr`; with further
        stimuli `prefix_matching_text` and so on, and `verdict_text`.
        """
        frame = self.scores.to_frame()
        heads = list(zip(frame["layer"], frame["head"], strict=True))
        if self.function_vectors is not None:
            rows = [self.function_vectors.row(head) for head in heads]
            frame["function_vector"] = [row["effect"] for row in rows]
            frame["function_vector_stderr"] = [row["stderr"] for row in rows]
        for name, scores in self.others.items():
            by_layer = [(scores.layers.index(layer), head) for layer, head in heads]
            for score in ("prefix_matching", "prefix_matching_stderr"):
                by_head = scores.score(score)
                frame[f"{score}_{name}"] = [by_head[index].item() for index in by_layer]
            frame[f"verdict_{name}"] = [list(scores.verdicts[head]) for head in heads]
        if self.circuit is None:
            return frame
        effects: dict[tuple[int, int], dict[str, Any]] = {}
        for effect in self.circuit.heads:
            values = asdict(effect)
            effects[values.pop("layer"), values.pop("head")] = values
        for path in reversed(self.circuit.named):  # so that the largest rise comes last
            row, reads = effects[path.receiver], f"reads_{path.input}"
            sender = "L{}H{}".format(*path.sender)  # 0.10 would be read as a number
            row[reads] = f"{sender} {row[reads]}" if reads in row else sender
            row[f"{reads}_rise"], row[f"{reads}_stderr"] = path.rise, path.rise_stderr
        columns = ["logit", "logit_stderr", "rise", "rise_stderr"]
        columns += [f"reads_{i}{part}" for i in "kqv" for part in ("", "_rise", "_stderr")]
        rows = [effects.get(head, {}) for head in heads]
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
    stimuli: Sequence[StimulusName] = ("random",),
    text: str | None = None,
    few_shot: bool = False,
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
        stimuli: what is repeated: random ids, frequent tokens, segments of a text. Everything but
            the scores is measured on the first.
        text: the text of frequent tokens and segments, a file or one of `CORPORA`; None for
            Python's help topics.
        few_shot: function vectors, on tasks in words, or for a model without a tokenizer on random
            mappings.

    Raises:
        TextError: the text cannot be read.
        ValueError, ProbeError: see `probes.score_heads` and `probes.find_circuit`; also for
            `ablate` and `circuit` with a model that does not predict every token.
    """
    flags = {"--ablate": ablate, "--circuit": circuit is not None, "--function-vectors": few_shot}
    for flag, is_given in flags.items():
        if is_given and not target.predicts_every_token:
            raise ValueError(f"{flag} needs next-token predictions, which this model does not make")
    model = target.model

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    words = word_tasks(target) if few_shot else None  # a tokenizer may have too few of them
    names = list(dict.fromkeys(stimuli))
    token_sources = sources(target, names, text)
    scores, *further = score_heads_on(
        model,
        token_sources,
        n_sequences=n_sequences,
        repeat_lengths=repeat_lengths,
        seed=seed,
        threshold=threshold,
        bos=target.bos,
    )
    source = token_sources[0]

    def tokens(n: int) -> Tensor | None:
        """Sequences of the first stimulus for interventions; None for random ids."""
        if source is None:
            return None
        drawing: dict[str, Any] = {"generator": generator(), "bos": target.bos, "source": source}
        return longest_stimulus(model, n_sequences=n, **drawing)[0].tokens

    induction, previous = scores.heads("induction"), scores.heads("previous_token")
    in_context = ablations = None
    if target.predicts_every_token:
        in_context = loss_by_position(
            model,
            n_sequences=min(n_sequences, 16),
            generator=generator(),
            bos=target.bos,
            source=source,
        )
    if ablate:
        heads = list(dict.fromkeys([*induction, *previous]))
        ablations = ablation_effects(
            model,
            heads,
            tokens=tokens(min(n_sequences, 32)),
            n_sequences=min(n_sequences, 32),
            generator=generator(),
            bos=target.bos,
        )
    composition = k_composition(model, induction) if compose else None
    paths = None
    if circuit is not None:
        last = max((layer for layer, _ in induction), default=0)
        paths = find_circuit(
            model,
            previous if circuit == "previous" else heads_below(model, last),
            induction,
            tokens=tokens(min(n_sequences, 32)),
            n_sequences=min(n_sequences, 32),
            generator=generator(),
            bos=target.bos,
        )
    vectors = None
    if few_shot:
        options: dict[str, Any] = {"n_shots": 4}
        if words is not None:
            options = {"tasks": words.tasks, "between": words.between, "after": words.after}
        vectors = function_vectors(model, **options, generator=generator(), bos=target.bos)
    return Detection(
        target,
        scores,
        in_context,
        ablations,
        composition,
        paths,
        names[0],
        dict(zip(names[1:], further, strict=True)),
        vectors,
        words.left_out if words is not None else {},
    )


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
