"""When each head of a model formed: the result of a study, as numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mechcausal.measures.figures import HEAD_SCORES
from mechcausal.studies.formation.records import Record
from mechcausal.studies.formation.series import Revision
from probes import Formation


@dataclass(frozen=True)
class HeadFormation:
    """When one score of one head rose.

    Attributes:
        layer: the layer.
        head: the head.
        score: prefix_matching, previous_token or duplicate_token.
        first_crossing: the first scored step at which the score reached the threshold.
        not_before: the scored step before it, at which it did not; None if there is none. The head
            formed between the two.
        midpoint: the middle of the fitted sigmoid; None if there is no fit.
        midpoint_low: lower end of its confidence interval.
        midpoint_high: upper end of that interval.
        last: the score at the last step.
    """

    layer: int
    head: int
    score: str
    first_crossing: int
    not_before: int | None
    midpoint: float | None
    midpoint_low: float | None
    midpoint_high: float | None
    last: float


@dataclass(frozen=True)
class FormationResult:
    """When the heads of a model formed.

    Attributes:
        model: the model's name or folder.
        kind: "hub", "folder" or "run".
        settings: how the heads were scored.
        records: the scored checkpoints, in the order of steps.
        losses: evaluation loss that a run recorded, by step; empty for other models.
        left_out: revisions that were not scored or do not count, each with its problem.
        formations: of every score in `HEAD_SCORES`, by its name.
        axis: the axis of the fit, "step" or "log".
    """

    model: str
    kind: str
    settings: Mapping[str, Any]
    records: Sequence[Record]
    losses: Mapping[int, float]
    left_out: Sequence[Revision]
    formations: Mapping[str, Formation]
    axis: str

    @property
    def threshold(self) -> float:
        """The score at which a head counts as formed."""
        return float(self.settings["threshold"])

    @property
    def steps(self) -> tuple[int, ...]:
        """The scored steps."""
        return tuple(record.step for record in self.records)

    def heads(self) -> list[HeadFormation]:
        """Every head that reached the threshold in a score, by score and then by step."""
        result = []
        for score, formation in self.formations.items():
            crossings = formation.first_crossing
            formed = (~crossings.isnan()).nonzero().tolist()
            for row, head in sorted(formed, key=lambda at: float(crossings[at[0], at[1]])):
                step = int(crossings[row, head])
                at = formation.steps.index(step)
                fit = (formation.midpoint, formation.midpoint_low, formation.midpoint_high)
                middle, low, high = (_number(values[row, head].item()) for values in fit)
                result.append(
                    HeadFormation(
                        layer=formation.layers[row],
                        head=head,
                        score=score,
                        first_crossing=step,
                        not_before=formation.steps[at - 1] if at else None,
                        midpoint=middle,
                        midpoint_low=low,
                        midpoint_high=high,
                        last=formation.scores[-1, row, head].item(),
                    )
                )
        return result

    def revision_rows(self) -> list[dict[str, Any]]:
        """One row per scored checkpoint: where it comes from, its losses and best scores."""
        rows = []
        for at, record in enumerate(self.records):
            loss = record.loss
            rows.append(
                {
                    "revision": record.name,
                    "step": record.step,
                    "commit": record.commit or None,
                    "weights_sha256": record.weights_sha256,
                    "loss": self.losses.get(record.step),
                    "loss_first_copy": _number(loss.first_copy if loss else None),
                    "loss_second_copy": _number(loss.second_copy if loss else None),
                    "in_context_gain": _number(loss.gain if loss else None),
                    "in_context_gain_stderr": _number(loss.gain_stderr if loss else None),
                    **{
                        f"best_{name}": _number(self.formations[name].scores[at].max().item())
                        for name in HEAD_SCORES
                    },
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """JSON values: settings, revisions, formed heads, scores `[step][layer][head]`."""
        first = self.formations[HEAD_SCORES[0]]
        return {
            "model": self.model,
            "kind": self.kind,
            "settings": dict(self.settings),
            "axis": self.axis,
            "confidence": first.confidence,
            "revisions": self.revision_rows(),
            "left_out": [
                {"revision": revision.name, "step": revision.step, "reason": revision.problem}
                for revision in self.left_out
            ],
            "heads": [asdict(head) for head in self.heads()],
            "layers": list(first.layers),
            "scores": {
                name: [
                    [[_number(value) for value in row] for row in step]
                    for step in formation.scores.tolist()
                ]
                for name, formation in self.formations.items()
            },
        }

    def scores_frame(self) -> Any:
        """A pandas frame with a row per step and head: its scores, and the step's losses."""
        import pandas as pd  # type: ignore[import-untyped, unused-ignore]

        first = self.formations[HEAD_SCORES[0]]
        losses = ("loss", "loss_first_copy", "loss_second_copy", "in_context_gain")
        beside = ("revision", "step", *losses)
        return pd.DataFrame(
            {
                "layer": layer,
                "head": head,
                **{
                    name: self.formations[name].scores[at, row, head].item() for name in HEAD_SCORES
                },
                **{key: line[key] for key in beside},
            }
            for at, line in enumerate(self.revision_rows())
            for row, layer in enumerate(first.layers)
            for head in range(first.scores.shape[2])
        )

    def heads_frame(self) -> Any:
        """A pandas frame of `heads`."""
        import pandas as pd  # type: ignore[import-untyped, unused-ignore]

        columns = list(HeadFormation.__dataclass_fields__)
        return pd.DataFrame([asdict(head) for head in self.heads()], columns=columns)


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
