"""Causal graphs over sequence positions: which earlier tokens each token is drawn from.

This package imports neither torch nor networkx, so that the command line starts quickly.
"""

from mechcausal.graphs.causal_graph import CausalGraph
from mechcausal.graphs.faults import GraphError
from mechcausal.graphs.presets import (
    PRESETS,
    WITH_QUERY_PARENTS,
    binary_tree,
    build_preset,
    chain,
    icl_pairs,
    interleaved_chains,
    k_gram,
    lag_chain,
    manual,
    preset_options,
    random_forest,
    random_parents,
    random_tree,
    star,
    two_parents,
)

__all__ = [
    "PRESETS",
    "WITH_QUERY_PARENTS",
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
    "preset_options",
    "random_forest",
    "random_parents",
    "random_tree",
    "star",
    "two_parents",
]
