"""How a model trained on one prior performs on transition matrices outside of this prior.

`evaluate_ood` compares a model with Bayes and with an oracle on families of matrices;
`generalisation_table` tests the paper's generalisation theorem as sequences grow.
"""

from mechcausal.measures.generalisation.evaluation import (
    OODRow,
    evaluate_ood,
    sup_errors,
)
from mechcausal.measures.generalisation.families import (
    STANDARD_FAMILIES,
    MatrixFamily,
    bounded_family,
    bounded_matrices,
    dirichlet_family,
    dirichlet_matrices,
    fixed_family,
    fixed_matrices,
    lazy_matrices,
    near_deterministic_matrices,
    permutation_matrices,
    two_block_matrices,
    uniform_matrices,
)
from mechcausal.measures.generalisation.theorem import (
    GeneralisationRow,
    GeneralisationTable,
    PowerFit,
    counting_limit,
    fit_power,
    generalisation_table,
    parent_log_odds,
    transplant,
)

__all__ = [
    "STANDARD_FAMILIES",
    "GeneralisationRow",
    "GeneralisationTable",
    "MatrixFamily",
    "OODRow",
    "PowerFit",
    "bounded_family",
    "bounded_matrices",
    "counting_limit",
    "dirichlet_family",
    "dirichlet_matrices",
    "evaluate_ood",
    "fit_power",
    "fixed_family",
    "fixed_matrices",
    "generalisation_table",
    "lazy_matrices",
    "near_deterministic_matrices",
    "parent_log_odds",
    "permutation_matrices",
    "sup_errors",
    "transplant",
    "two_block_matrices",
    "uniform_matrices",
]
