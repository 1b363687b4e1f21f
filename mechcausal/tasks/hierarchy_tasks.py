"""Two things to learn about the trees of `mechcausal.tasks.hierarchy`: a hidden leaf, or the root.

Both are for models that see the full sequence (`attention_dir="bidirectional"`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mechcausal.tasks.base import Batch
from mechcausal.tasks.hierarchy import Hierarchy, evidence_of
from mechcausal.tasks.protocol import BAYES


@dataclass(frozen=True)
class TreeBatch(Batch):
    """Leaves with what they hide.

    Attributes:
        root: the symbol at the root of every tree.
        leaves: the symbols at the leaves, none of them hidden.
    """

    root: Int[Tensor, "batch"] | None = None
    leaves: Int[Tensor, "batch pos"] | None = None


@dataclass(frozen=True)
class MaskedLeafTask:
    """Predict the one leaf of each sequence that a mask token hides.

    The label is the exact posterior given all other leaves, by belief propagation; its last entry
    belongs to the mask token and is 0.

    Attributes:
        tree: draws the leaves.

    Example:
        >>> from mechcausal.tasks.hierarchy import Grammar
        >>> tree = Hierarchy(Grammar.random(4, generator=torch.Generator().manual_seed(0)), 3)
        >>> batch = MaskedLeafTask(tree).sample(2, generator=torch.Generator().manual_seed(0))
        >>> batch.target.shape, batch.scored.sum(1).tolist()
        (torch.Size([2, 8, 5]), [1, 1])
    """

    tree: Hierarchy

    @property
    def vocab_size(self) -> int:
        """The symbols and the mask."""
        return self.tree.grammar.n_symbols + 1

    @property
    def sequence_length(self) -> int:
        """The leaves."""
        return self.tree.n_leaves

    def sample(self, n_sequences: int, *, generator: torch.Generator) -> TreeBatch:
        """Fresh trees, each with one leaf masked, on the generator's device."""
        leaves, root = self.tree.sample(n_sequences, generator=generator)
        shape, device = (n_sequences, 1), generator.device
        masked = torch.randint(self.tree.n_leaves, shape, generator=generator, device=device)
        scored = torch.zeros_like(leaves, dtype=torch.bool).scatter_(1, masked, True)
        tokens = leaves.masked_fill(scored, self.tree.grammar.n_symbols)
        target = self._posteriors(self.tree, tokens).float()
        return TreeBatch(tokens, target, scored=scored, root=root, leaves=leaves)

    def predictions(self, batch: Batch) -> dict[str, Float[Tensor, "batch pos vocab"]]:
        """Belief propagation that knows correlations up to some scale only.

        "bp_k" takes the nodes of level k for independent given the root, from k = depth (the leaf's
        place alone, given the root) to 1; "bayes" is exact.
        """
        return {
            name: self._posteriors(tree, batch.tokens) for name, tree in filters(self.tree).items()
        }

    def _posteriors(
        self, tree: Hierarchy, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos vocab"]:
        leaves = tree.infer(evidence_of(tokens, tree.grammar.n_symbols)).leaves
        return F.pad(leaves, (0, 1))


@dataclass(frozen=True)
class RootTask:
    """Predict the root's symbol at the last position of the leaves.

    The label is the exact posterior given all leaves, by belief propagation.

    Attributes:
        tree: draws the leaves.
    """

    tree: Hierarchy

    @property
    def vocab_size(self) -> int:
        """The symbols."""
        return self.tree.grammar.n_symbols

    @property
    def sequence_length(self) -> int:
        """The leaves."""
        return self.tree.n_leaves

    def sample(self, n_sequences: int, *, generator: torch.Generator) -> TreeBatch:
        """Fresh trees on the generator's device."""
        leaves, root = self.tree.sample(n_sequences, generator=generator)
        target = self._posterior(self.tree, leaves).float()
        return TreeBatch(leaves, target, root=root, leaves=leaves)

    def predictions(self, batch: Batch) -> dict[str, Float[Tensor, "batch vocab"]]:
        """As those of `MaskedLeafTask`: "bp_k" from k = depth to 1, and the exact "bayes"."""
        return {
            name: self._posterior(tree, batch.tokens) for name, tree in filters(self.tree).items()
        }

    def _posterior(
        self, tree: Hierarchy, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch vocab"]:
        return tree.infer(evidence_of(tokens, tree.grammar.n_symbols)).root


def filters(tree: Hierarchy) -> dict[str, Hierarchy]:
    """The trees of all filters, coarse to exact, named as predictions.

    If the tree itself is filtered at level k, its own filter is "bayes", and coarser ones follow.
    """
    levels = range(tree.depth, tree.filter, -1)
    coarse = {f"bp_{level}": Hierarchy(tree.grammar, tree.depth, level) for level in levels}
    return {**coarse, BAYES: tree}


def use_of_scales(
    prediction: Float[Tensor, "row symbol"], by_filter: dict[str, Float[Tensor, "row symbol"]]
) -> dict[int, float]:
    """How much of each scale's correction a model makes: 1 at every scale is exact inference.

    The least-squares coefficients of `model − BP_depth` on the corrections `BP_k − BP_(k+1)`, over
    all predictions and symbols together.

    Args:
        prediction: the model's distributions over symbols.
        by_filter: "bp_k" from coarse to fine, and "bayes"; see `filters`.

    Returns:
        By height h of the pair of siblings that the correction joins, from 1 (neighbouring leaves)
        up; NaN where a correction vanishes. Empty for leaves that only share the root.
    """
    values = [value.double() for value in by_filter.values()]
    steps = torch.stack(values).flatten(1).diff(dim=0).T
    left = (prediction.double() - values[0]).flatten()
    used = torch.linalg.lstsq(steps, left.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    lengths = steps.norm(dim=0)
    return {
        height: used[height - 1].item() if lengths[height - 1] > 1e-9 else float("nan")
        for height in range(1, len(values))
    }
