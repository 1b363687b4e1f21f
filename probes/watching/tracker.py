"""Watch the heads of a model while somebody else trains it."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from probes.heads.formation import Formation, track_formation
from probes.heads.head_scores import score_heads
from probes.heads.head_table import HeadScores
from probes.heads.in_context import in_context_score
from probes.reading.errors import ProbeError, ProbeWarning
from probes.reading.hook_names import Layers, attention_layers
from probes.reading.labelled import LabelledTensor
from probes.reading.passes import MAX_BATCH_BYTES, checked_tokens
from probes.watching.agreement import Target, agreement
from probes.watching.gradient import Loss, attention_gradient
from probes.watching.information import PairwiseInformation, pairwise_information
from probes.watching.unwrap import is_observing_process, unwrapped

Log = Callable[..., Any]

_LOGGED_SCORES = ("induction", "previous_token", "duplicate_token")
_MAX_LOGGED_HEADS = 8


@dataclass(frozen=True, eq=False)
class Look:
    """What a tracker read at one training step.

    Attributes:
        step: the training step, as the caller counts.
        figures: the numbers that were logged, without the tracker's prefix.
        scores: every head's scores; None if the model could not be scored.
        descent: `-∂L/∂scores` summed over heads, axes ("layer", "query", "key"); None if the
            gradient could not be read.
    """

    step: int
    figures: Mapping[str, float]
    scores: HeadScores | None
    descent: LabelledTensor | None


@dataclass
class Tracker:
    """Looks at a model every so many steps: head scores, in-context learning, gradient.

    A look runs a few passes in evaluation mode with frozen parameters. It changes no weight, no
    `.grad`, no mode and no random state, so training goes on as if it had not happened. A look
    that fails warns once and never stops training.

    Figures, by their names without the prefix (`L1H0` is head 0 of layer 1):

    - `induction/max`, `induction/L1H0`, likewise `previous_token` and `duplicate_token`: head
      scores on random repeated tokens. With more than 8 heads only the 8 highest are logged.
    - `in_context/score`: loss late minus loss early in the held-out sequences, nats; below 0 when
      the model learns from context. Also `in_context/early_loss` and `in_context/late_loss`.
    - `gradient/layer0/correlation`, `.../edge_hits`, `.../chance`: see `agreement`. They are left
      out while `gradient/layer0/signal_to_noise` is below 3.

    Attributes:
        looks: every look so far, in order.
        information: of the held-out sequences, what the gradient is compared with.

    Example:
        >>> from transformer_lens import HookedTransformer
        >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8}
        >>> model = HookedTransformer({**sizes, "d_vocab": 5, "attn_only": True, "device": "cpu"})
        >>> held_out = torch.randint(5, (64, 8), generator=torch.Generator().manual_seed(0))
        >>> track = Tracker(model, held_out, every=10)
        >>> [step for step in range(25) if track(step)]
        [0, 1, 2, 4, 8, 10, 20]
        >>> sorted(track.looks[0].figures)[:3]
        ['gradient/layer0/signal_to_noise', 'in_context/early_loss', 'in_context/late_loss']
    """
