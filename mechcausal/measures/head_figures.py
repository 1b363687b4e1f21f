"""The figures and matrices of a probe step that scores every head on random repeated tokens."""

from torch import Tensor

from mechcausal.measures.figures import HEAD_SCORES
from probes import HeadScores, above_chance


def head_figures(scores: HeadScores) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The scores of every head, and those of the best one; `induction/score` is above chance.

    Returns:
        Figures and matrices [layer, head] by name.
    """
    best = divmod(int(scores.prefix_matching.argmax()), scores.n_heads)
    score = above_chance(scores.prefix_matching, scores.uniform_baseline)[best]
    figures = {
        "induction/score": score.item(),
        "induction/prefix_matching": scores.prefix_matching[best].item(),
        "induction/positional_control": scores.positional_control[best].item(),
        "induction/copying": scores.copying[best].item(),
    }
    matrices = {}
    for kind in HEAD_SCORES:
        values = getattr(scores, kind).float().cpu()
        matrices[f"heads/{kind}"] = values
        for layer, row in enumerate(values.tolist()):
            for head, value in enumerate(row):
                figures[f"heads/L{layer}H{head}/{kind}"] = value
    return figures, matrices
