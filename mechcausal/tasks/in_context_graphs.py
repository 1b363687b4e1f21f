"""A causal graph that a context's examples share, to be inferred from them alone.

The kernel is fixed, so a model can learn it; the graph changes from context to context. Source:
"How Transformers Learn Causal Structures In-Context", ICLR 2026.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.tasks.base import Batch
from mechcausal.tasks.priors import FixedTransition, stationary_distribution
from mechcausal.tasks.sequences import draw_rows

SMALLEST_TRANSITION = 1e-3
"""Smallest entry of a kernel that `possible_kernel` makes, before its rows are normalised."""


def possible_kernel(matrix: Float[Tensor, "vocab vocab"]) -> FixedTransition:
    """The matrix with every entry raised to `SMALLEST_TRANSITION`, rows normalised.

    With zeros, one impossible transition would rule out a parent.

    Example:
        >>> [round(p, 4) for p in possible_kernel(torch.eye(2)).rows[0]]
        [0.999, 0.001]
    """
    raised = matrix.double().clamp(min=SMALLEST_TRANSITION)
    return FixedTransition.from_matrix(raised / raised.sum(1, keepdim=True))


@dataclass(frozen=True)
class ContextBatch(Batch):
    """Contexts with their graphs.

    Attributes:
        parents: the parent of every position of an example; -1 for position 0.
    """

    parents: Int[Tensor, "batch position"] | None = None


@dataclass(frozen=True)
class InContextGraphTask:
    """Examples of one random tree each context, the last of which is to be predicted.

    In each context position h > 0 of an example has a parent drawn uniformly from 0 ... h-1.
    Position 0 is drawn from the stationary distribution, the others from the kernel's row of their
    parent's token. The examples stand one after another; in the last one, each position before the
    end predicts the next token. The label is the true row of the kernel.

    Attributes:
        kernel: the transition matrix of all contexts, without zeros.
        n_positions: H, tokens of an example.
        n_examples: L, examples before the one that is predicted.

    Raises:
        ValueError: fewer than two positions, no example, or a kernel with a zero.

    Example:
        >>> task = InContextGraphTask(FixedTransition(((0.9, 0.1), (0.2, 0.8))), 4, n_examples=2)
        >>> batch = task.sample(3, generator=torch.Generator().manual_seed(0))
        >>> batch.tokens.shape, batch.scored[0].nonzero().squeeze(1).tolist()
        (torch.Size([3, 12]), [8, 9, 10])
    """

    kernel: FixedTransition
    n_positions: int = 10
    n_examples: int = 10

    def __post_init__(self) -> None:
        if self.n_positions < 2 or self.n_examples < 1:
            raise ValueError(
                f"{self.n_positions} positions and {self.n_examples} examples; allowed: at least 2 "
                "positions and 1 example"
            )
        if min(min(row) for row in self.kernel.rows) <= 0:
            raise ValueError("the kernel has a zero: every transition must be possible")

    @property
    def vocab_size(self) -> int:
        """Number of tokens S."""
        return self.kernel.vocab_size

    @property
    def sequence_length(self) -> int:
        """Tokens of a context, (L + 1) H."""
        return (self.n_examples + 1) * self.n_positions

    def sample(self, n_sequences: int, *, generator: torch.Generator) -> ContextBatch:
        """Fresh contexts on the generator's device."""
        device, h = generator.device, self.n_positions
        parents = self.draw_parents(n_sequences, generator=generator)
        examples = self.examples_of(parents, self.n_examples + 1, generator=generator)
        kernel = self._kernel(device).float()
        target = torch.zeros(n_sequences, self.sequence_length, self.vocab_size, device=device)
        last = examples[:, -1].gather(1, parents[:, 1:])
        target[:, -h:-1] = kernel[last]
        scored = torch.zeros(n_sequences, self.sequence_length, dtype=torch.bool, device=device)
        scored[:, -h:-1] = True
        return ContextBatch(examples.flatten(1), target, scored=scored, parents=parents)

    def draw_parents(
        self, n_graphs: int, *, generator: torch.Generator
    ) -> Int[Tensor, "graph position"]:
        """Random trees: the parent of every position, uniform over earlier ones; -1 for 0."""
        device, h = generator.device, self.n_positions
        uniform = torch.rand(n_graphs, h, generator=generator, device=device)
        numbers = torch.arange(h, device=device)
        parents = (uniform * numbers).long().minimum((numbers - 1).clamp(min=0))
        parents[:, 0] = -1
        return parents

    def examples_of(
        self, parents: Int[Tensor, "graph position"], n_examples: int, *, generator: torch.Generator
    ) -> Int[Tensor, "graph example position"]:
        """Fresh examples of given trees."""
        device, (n_graphs, h) = generator.device, parents.shape
        kernel = self._kernel(device).float()
        examples = torch.empty(n_graphs, n_examples, h, dtype=torch.int64, device=device)
        start = self._stationary(device).float().expand(n_graphs * n_examples, -1)
        examples[..., 0] = draw_rows(start, generator).view(n_graphs, n_examples)
        for position in range(1, h):
            above = _at(examples, parents[:, position])
            drawn = draw_rows(kernel[above.flatten()], generator)
            examples[..., position] = drawn.view(n_graphs, n_examples)
        return examples

    def parent_posterior(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch position candidate"]:
        """The probability of each earlier position of being the parent, from the full examples.

        `P(pa(h) = h') ∝ Π_l π(x_h^l | x_h'^l)` over h' < h, float64. Row 0, which has no parent, is
        0.
        """
        h = self.n_positions
        examples = tokens.view(len(tokens), -1, h)[:, : self.n_examples]
        log_kernel = self._kernel(tokens.device).log()
        pairs = log_kernel[examples.unsqueeze(2), examples.unsqueeze(3)]  # [b, l, h, h']
        evidence = pairs.sum(1)
        later = torch.ones(h, h, dtype=torch.bool, device=tokens.device).triu()
        return evidence.masked_fill(later, -torch.inf).softmax(-1).nan_to_num(0.0)

    def predictions(self, batch: Batch) -> dict[str, Float[Tensor, "batch pos vocab"]]:
        """The strategies "stationary", "mixed_parents" (all earlier positions alike) and "bayes".

        "bayes" averages the kernel's rows of the last example's tokens over `parent_posterior`.
        """
        tokens, h = batch.tokens, self.n_positions
        rows = self._kernel(tokens.device)[tokens[:, -h:]]
        alike = torch.ones(h, h, dtype=torch.float64, device=tokens.device).tril(-1)
        alike = alike / alike.sum(1, keepdim=True).clamp(min=1)
        weights = {"mixed_parents": alike, "bayes": self.parent_posterior(tokens)}
        stationary = self._stationary(tokens.device)
        predictions = {"stationary": stationary.expand(*tokens.shape, -1)}
        for name, weight in weights.items():
            full = torch.zeros_like(predictions["stationary"])
            full[:, -h:-1] = (weight @ rows)[:, 1:]
            predictions[name] = full
        return predictions

    def _kernel(self, device: torch.device) -> Float[Tensor, "vocab vocab"]:
        return torch.tensor(self.kernel.rows, dtype=torch.float64, device=device)

    def _stationary(self, device: torch.device) -> Float[Tensor, "vocab"]:
        return stationary_distribution(self._kernel(device).unsqueeze(0))[0]


def _at(
    examples: Int[Tensor, "batch example position"], position: Int[Tensor, "batch"]
) -> Int[Tensor, "batch example"]:
    index = position.view(-1, 1, 1).expand(-1, examples.shape[1], 1)
    return examples.gather(2, index).squeeze(2)
