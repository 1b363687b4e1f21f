"""The smallest set of tokens whose replacement changes what a model predicts.

CLEANN: discover a causal graph over the tokens from the deepest layer's attention, and look for
the set around the prediction's node, nearest tokens first. Source: Rohekar, Gurwicz, Nisimov,
NeurIPS 2023 (arXiv 2310.20307), section 5. The controls say what the graph is worth: they spend
the same budget of model runs without it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.attach import attach
from probes.attention import AttentionPattern
from probes.causal_discovery.counterfactuals import (
    Counterfactuals,
    Logits,
    Outcome,
    Replace,
    replace_by,
)
from probes.causal_discovery.pag import PAG
from probes.errors import ProbeError
from probes.hook_names import attention_layers
from probes.passes import checked_tokens, device_of, undisturbed

Method: TypeAlias = Literal["causal", "attention", "occlusion", "random", "exhaustive"]
METHODS: tuple[Method, ...] = get_args(Method)
