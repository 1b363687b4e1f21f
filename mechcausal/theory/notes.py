"""What a reader of averages over the prior should know of them."""

from mechcausal.theory.information import ParentInformation
from mechcausal.theory.pairwise import PairwiseTheory


def theory_notes(theory: PairwiseTheory | ParentInformation, remedy: str) -> list[str]:
    """That fewer draws than were asked for were averaged over, and what standard error results.

    Args:
        theory: of a graph.
        remedy: the setting that allows more.
    """
    if theory.n_priors >= theory.n_wanted:
        return []
    note = (
        f"theory was averaged over {theory.n_priors:,} draws of the prior in place of "
        f"{theory.n_wanted:,}, which would take too long (raise {remedy} for more)"
    )
    if theory.graph.edges:
        errors = theory.chi2_stderr
        parent, child = max(theory.graph.edges, key=lambda edge: float(errors[edge[1], edge[0]]))
        note += (
            f": the largest standard error of an edge's χ²-information is "
            f"{errors[child, parent]:.2g} ({parent} → {child}: {theory.chi2[child, parent]:.4g})"
        )
    return [note]
