"""What information theory predicts: information between positions, and the gradient it implies."""

from mechcausal.theory.information import (
    Information,
    ParentInformation,
    parent_information,
    theory_notes,
)
from mechcausal.theory.named_edges import named_edges
from mechcausal.theory.pairwise import (
    PairDistances,
    PairwiseTheory,
    pair_distances,
    pairwise_theory,
    predicted_gradient,
)

__all__ = [
    "Information",
    "PairDistances",
    "PairwiseTheory",
    "ParentInformation",
    "named_edges",
    "pair_distances",
    "pairwise_theory",
    "parent_information",
    "predicted_gradient",
    "theory_notes",
]
