"""Instruments for any TransformerLens model: hooks in, numbers out.

    with attach(model, AttentionPattern(), AttentionGradient()) as (pattern, gradient):
        model(tokens, return_type="loss").backward()
    gradient.reading().sel(layer=0, head=0)

Cost: a probe keeps only what its reading needs. `AttentionPattern` without `reduce` is the one
whose memory grows with the number of sequences squared in length.
"""

from probes.attach import Probe, attach
from probes.attention import AttentionGradient, AttentionPattern
from probes.circuits import copying_score
from probes.errors import ProbeError
from probes.induction import AttentionTo, InductionScores
from probes.labelled import LabelledTensor
from probes.repeated import repeated_tokens
from probes.scores import (
    attention_to,
    duplicate_token_score,
    prefix_matching_score,
    previous_token_score,
    uniform_baseline,
)

__all__ = [
    "AttentionGradient",
    "AttentionPattern",
    "AttentionTo",
    "InductionScores",
    "LabelledTensor",
    "Probe",
    "ProbeError",
    "attach",
    "attention_to",
    "copying_score",
    "duplicate_token_score",
    "prefix_matching_score",
    "previous_token_score",
    "repeated_tokens",
    "uniform_baseline",
]
