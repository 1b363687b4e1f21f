"""What information theory predicts: information between positions, and the gradient it implies."""

from mechcausal.theory.information import ParentInformation, parent_information
from mechcausal.theory.named_edges import named_edges
from mechcausal.theory.notes import theory_notes
from mechcausal.theory.pairwise import (
    PairDistances,
    PairwiseTheory,
    pair_distances,
    pairwise_theory,
    predicted_gradient,
)

Information = PairwiseTheory | ParentInformation
"""Theory for either task; both have `graph`, `chi2`, `shannon` and their standard errors."""

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
