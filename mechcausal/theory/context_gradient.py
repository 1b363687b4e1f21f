"""The first gradient on the scores that compare a token with its candidate parents.

In the tailored model of in-context graphs with uniform attention and the readout V = log π, the
token at h is predicted as `p = softmax(mean_{h' < h} log π(. | x_h'))`. Of contexts that share one
graph, the descent direction on the score of candidate h' is

    -∂L/∂score(h, h') = 1/h E Σ_s (π(s | x_pa(h)) - p_s) (log π(s | x_h') - mean_{h'' < h} ...),

the covariance of a candidate's evidence with what is still unpredicted. Its largest entry in a row
names the parent, as χ²-information of the pair does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.tasks.in_context_graphs import InContextGraphTask
from mechcausal.theory.pairwise import pairwise_theory


@dataclass(frozen=True)
class FirstScoreGradient:
    """The first gradient on scores for one graph.

    Attributes:
        parents: parent of every position, -1 for position 0.
        gradient: descent direction on the score of every candidate, 0 elsewhere.
        stderr: its standard error.
        chi2: χ²-information of every position with each candidate, exact.
    """

    parents: tuple[int, ...]
    gradient: Float[Tensor, "position candidate"]
    stderr: Float[Tensor, "position candidate"]
    chi2: Float[Tensor, "position candidate"]

    @property
    def named(self) -> dict[int, bool]:
        """Whether a row's largest entry is the parent, by position, where there is a choice."""
        return {
            h: int(self.gradient[h, :h].argmax()) == self.parents[h]
            for h in range(2, len(self.parents))
        }

    @property
    def chi2_correlations(self) -> dict[int, float]:
        """Pearson correlation of a row with its χ², by position, of three candidates or more."""
        return {
            h: torch.corrcoef(torch.stack([self.gradient[h, :h], self.chi2[h, :h]]))[0, 1].item()
            for h in range(3, len(self.parents))
        }


def score_gradients(
    task: InContextGraphTask,
    tokens: Int[Tensor, "sequence position"],
    parents: Sequence[int],
) -> Float[Tensor, "sequence position candidate"]:
    """The descent direction on every score at uniform attention, of each sequence, in float64.

    Args:
        task: its kernel.
        tokens: examples of the graph.
        parents: parent of every position, -1 for position 0.
    """
    kernel = torch.tensor(task.kernel.rows, dtype=torch.float64, device=tokens.device)
    evidence = kernel.log()[tokens]  # [sequence, candidate, vocab]
    n = len(parents)
    gradients = evidence.new_zeros(len(tokens), n, n)
    for h in range(1, n):
        mean = evidence[:, :h].mean(1, keepdim=True)
        unpredicted = kernel[tokens[:, parents[h]]] - mean.squeeze(1).softmax(-1)
        centred = evidence[:, :h] - mean
        gradients[:, h, :h] = torch.einsum("bs,bcs->bc", unpredicted, centred) / h
    return gradients


def first_score_gradient(
    task: InContextGraphTask,
    parents: Sequence[int],
    *,
    generator: torch.Generator,
    n_sequences: int = 10_000,
) -> FirstScoreGradient:
    """The first gradient on scores for one graph, over sequences drawn from it.

    Args:
        task: its kernel; examples and positions are not read.
        parents: parent of every position, -1 for position 0.
        generator: of the sequences.
        n_sequences: how many; the error falls with the root of their number.

    Raises:
        GraphError: a parent that is not an earlier position.

    Example:
        >>> from mechcausal.tasks.priors import FixedTransition
        >>> task = InContextGraphTask(FixedTransition(((0.9, 0.1), (0.2, 0.8))), 4)
        >>> generator = torch.Generator().manual_seed(0)
        >>> first_score_gradient(task, (-1, 0, 0, 1), generator=generator).named
        {2: True, 3: True}
    """
    graph = CausalGraph.from_parents(list(parents))
    shared = torch.tensor([list(parents)], device=generator.device)
    tokens = task.examples_of(shared, n_sequences, generator=generator)[0]
    gradients = score_gradients(task, tokens, parents)
    return FirstScoreGradient(
        parents=tuple(parents),
        gradient=gradients.mean(0).cpu(),
        stderr=gradients.std(0).cpu() / n_sequences**0.5,
        chi2=pairwise_theory(graph, task.kernel).chi2.double().cpu().tril(-1),
    )
