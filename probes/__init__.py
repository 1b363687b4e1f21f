"""Instruments for any TransformerLens model: hooks in, numbers out.

Example::

    with attach(model, AttentionPattern(), AttentionGradient()) as (pattern, gradient):
        model(tokens, return_type="loss").backward()
    gradient.reading().sel(layer=0, head=0)

    scores = score_heads(model)  # which heads are induction heads, and what makes them so
    ablation_effects(model, scores.heads("induction"))

    track = Tracker(model, held_out, every=200, log=wandb.log)  # then track(step) in the loop

    print(discover(model, tokens[0], n_eff=64).pag)  # causal graph over one input's tokens

Cost: a probe keeps only what its reading needs. `AttentionPattern` without `reduce` is the one
whose memory grows with the number of sequences squared in length.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Score: what a head does.
from probes.heads.attention_by_class import ClassAttention, attention_by_class
from probes.heads.composition import KComposition, k_composition
from probes.heads.copying import copying_score
from probes.heads.few_shot import FewShotTask
from probes.heads.formation import Formation, track_formation
from probes.heads.head_scores import score_heads
from probes.heads.head_table import HeadScores
from probes.heads.in_context import (
    InContextScore,
    PositionLoss,
    in_context_score,
    loss_by_position,
)
from probes.heads.induction import AttentionTo, InductionScores
from probes.heads.logit_attribution import LogitAttribution, direct_logit_attribution
from probes.heads.positional_share import PositionalShare, positional_share
from probes.heads.scores import (
    above_chance,
    attention_to,
    duplicate_token_score,
    prefix_matching_score,
    previous_token_score,
    uniform_baseline,
)
from probes.heads.stimuli import repeated_tokens
from probes.heads.token_sources import TokenSource, frequent_tokens, text_segments

# Intervene: what changes without it.
from probes.intervening.ablation import mean_ablate
from probes.intervening.ablation_effects import AblationEffect, ablation_effects
from probes.intervening.attention_edits import (
    AttentionEffect,
    attention_effects,
    edit_attention,
    knock_out,
    make_uniform,
    redirect,
    replace_pattern,
)
from probes.intervening.circuit import Circuit, HeadEffect, PathEffect, find_circuit
from probes.intervening.clamps import clamp, fixed_to, forbid, frozen_pattern, previous_token
from probes.intervening.function_vectors import FunctionVectors, function_vectors
from probes.intervening.order_sensitivity import OrderSensitivity, order_sensitivity
from probes.intervening.tree_projection import TreeProjection, tree_projection

# Read: hooks in, numbers out.
from probes.reading.activation import Activation, AttentionPattern
from probes.reading.attach import Probe, attach
from probes.reading.attention_check import AttentionCheck, check_attention
from probes.reading.attention_gradient import AttentionGradient
from probes.reading.attention_view import attention_view
from probes.reading.errors import ProbeError, ProbeWarning
from probes.reading.labelled import LabelledTensor

# Watch: any training run.
from probes.watching.agreement import Agreement, agreement
from probes.watching.gradient import LossGradient, attention_gradient, next_token_loss
from probes.watching.information import PairwiseInformation, pairwise_information
from probes.watching.look import Look
from probes.watching.residual import (
    DirectPath,
    ResidualInformation,
    descent_by_lag,
    direct_path,
    residual_information,
)
from probes.watching.tracker import Tracker

# Discover: loaded when first used, since it brings networkx with it.
if TYPE_CHECKING:
    from probes.causal_discovery import (
        PAG,
        Discovery,
        Explanation,
        discover,
        discover_attention,
        explain,
        linear_edges,
        linear_effects,
        save_picture,
    )

__all__ = [
    "PAG",
    "AblationEffect",
    "Activation",
    "Agreement",
    "AttentionCheck",
    "AttentionEffect",
    "AttentionGradient",
    "AttentionPattern",
    "AttentionTo",
    "Circuit",
    "ClassAttention",
    "DirectPath",
    "Discovery",
    "Explanation",
    "FewShotTask",
    "Formation",
    "FunctionVectors",
    "HeadEffect",
    "HeadScores",
    "InContextScore",
    "InductionScores",
    "KComposition",
    "LabelledTensor",
    "LogitAttribution",
    "Look",
    "LossGradient",
    "OrderSensitivity",
    "PairwiseInformation",
    "PathEffect",
    "PositionLoss",
    "PositionalShare",
    "Probe",
    "ProbeError",
    "ProbeWarning",
    "ResidualInformation",
    "TokenSource",
    "Tracker",
    "TreeProjection",
    "ablation_effects",
    "above_chance",
    "agreement",
    "attach",
    "attention_by_class",
    "attention_effects",
    "attention_gradient",
    "attention_to",
    "attention_view",
    "check_attention",
    "clamp",
    "copying_score",
    "descent_by_lag",
    "direct_logit_attribution",
    "direct_path",
    "discover",
    "discover_attention",
    "duplicate_token_score",
    "edit_attention",
    "explain",
    "find_circuit",
    "fixed_to",
    "forbid",
    "frequent_tokens",
    "frozen_pattern",
    "function_vectors",
    "in_context_score",
    "k_composition",
    "knock_out",
    "linear_edges",
    "linear_effects",
    "loss_by_position",
    "make_uniform",
    "mean_ablate",
    "next_token_loss",
    "order_sensitivity",
    "pairwise_information",
    "positional_share",
    "prefix_matching_score",
    "previous_token",
    "previous_token_score",
    "redirect",
    "repeated_tokens",
    "replace_pattern",
    "residual_information",
    "save_picture",
    "score_heads",
    "text_segments",
    "track_formation",
    "tree_projection",
    "uniform_baseline",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # the names that no import above has set
        return getattr(import_module("probes.causal_discovery"), name)
    raise AttributeError(f"module 'probes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
