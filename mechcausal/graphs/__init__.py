"""Causal graphs over sequence positions: which earlier tokens each token is drawn from.

Importing this package loads neither torch nor networkx, which the command line relies on.
"""

from mechcausal.graphs.causal_graph import CausalGraph, GraphError
from mechcausal.graphs.presets import (
    PRESETS,
    binary_tree,
    build_preset,
    chain,
    icl_pairs,
    interleaved_chains,
    k_gram,
    lag_chain,
    manual,
    random_forest,
    random_parents,
    random_tree,
    star,
    two_parents,
)

__all__ = [
    "PRESETS",
    "CausalGraph",
    "GraphError",
    "binary_tree",
    "build_preset",
    "chain",
    "icl_pairs",
    "interleaved_chains",
    "k_gram",
    "lag_chain",
    "manual",
    "random_forest",
    "random_parents",
    "random_tree",
    "star",
    "two_parents",
]
