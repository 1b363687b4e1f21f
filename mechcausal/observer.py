"""One look at a model in training: all probes in one forward and backward pass.

The hooked model runs on a fixed evaluation batch, so that consecutive figures differ by what the
model learned and not by what it was shown.
"""

import torch
from torch import Tensor

from mechcausal import metrics, predictors
from mechcausal.experiments.base import Observation
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.tasks import Batch, SingleParentTask, soft_cross_entropy
from mechcausal.theory import PairwiseTheory, named_edges
from probes import (
    AttentionGradient,
    AttentionPattern,
    AttentionTo,
    InductionScores,
    attach,
    copying_score,
    repeated_tokens,
)

# Attention entries of a pass through the hooked model; larger evaluation batches are split.
_MAX_ENTRIES = 4_000_000


class Observer:
    """Looks at the same sequences again and again.

    Attributes:
        batch: the evaluation sequences.
        bayes_loss: cross entropy of the Bayes predictor on them, nats.
    """

    def __init__(
        self,
        model: SimplifiedTransformer,
        task: SingleParentTask,
        theory: PairwiseTheory,
        *,
        n_sequences: int,
        epsilon: float,
        bayes_draws: int,
        generator: torch.Generator,
    ) -> None:
        """Draw the evaluation batch and what it is compared with.

        Args:
            model: looked at, never changed.
            task: graph and prior.
            theory: of the same graph and prior.
            n_sequences: size of the evaluation batch.
            epsilon: smoothing of predictions, as in training.
            bayes_draws: see `predictors.bayes_prediction`.
            generator: of the evaluation alone.
        """
        self.model = model
        self.task = task
        self.theory = theory
        self.epsilon = epsilon
        self.batch = task.sample(n_sequences, generator=generator)
        tokens = self.batch.tokens
        bayes = predictors.bayes_prediction(task, tokens, generator=generator, n_draws=bayes_draws)
        self.bayes_loss = soft_cross_entropy(bayes, self.batch.target).item()
        self._strategies = {
            "uniform": predictors.uniform_prediction(task, tokens),
            "unigram": predictors.unigram_prediction(task, tokens),
            "bigram": predictors.bigram_prediction(task, tokens),
        }
        self._repeated = repeated_tokens(
            64, task.sequence_length // 2, task.vocab_size, generator=generator
        )

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Evaluation loss, Bayes loss and gap from the closed form alone, nats."""
        prediction = self.model(self.batch.tokens)
        return self._losses(prediction)

    def observe(self) -> Observation:
        """Run the hooked model on the evaluation batch with every probe attached.

        The matrices are `attention/layer0` and the descent directions `gradient/scores` and
        `gradient/pattern` (centred by row), each [query, key].
        """
        graph = self.task.graph
        hooked = self.model.hooked
        pattern = AttentionPattern(0, reduce="mean")
        by_scores = AttentionGradient("scores", 0)
        by_pattern = AttentionGradient("pattern", 0, centred=True)
        induction = AttentionTo(1, lambda tokens: metrics.induction_mask(tokens, graph))
        repeated = InductionScores(1)
        total = len(self.batch)
        rows = max(1, _MAX_ENTRIES // self.task.sequence_length**2)
        predictions = []
        with self.model.frozen():
            with attach(hooked, pattern, by_scores, by_pattern, induction):
                for start in range(0, total, rows):
                    part = self._part(start, start + rows)
                    prediction = hooked(part.tokens)[:, -1]
                    loss = soft_cross_entropy(prediction, part.target, epsilon=self.epsilon)
                    # Weighted, so that the parts add up to the mean loss of the whole batch.
                    (loss * (len(part) / total)).backward()
                    predictions.append(prediction.detach())
            with torch.no_grad(), attach(hooked, repeated):
                hooked(self._repeated, return_type=None)
        prediction = torch.cat(predictions)
        matrices = {
            "attention/layer0": pattern.reading().sel(layer=0, head=0).values.cpu(),
            "gradient/scores": -by_scores.reading().sel(layer=0, head=0).values.cpu(),
            "gradient/pattern": -by_pattern.reading().sel(layer=0, head=0).values.cpu(),
        }
        spread = by_pattern.stderr().sel(layer=0, head=0).values.cpu()
        figures = self._losses(prediction)
        figures |= self._graph_and_gradient(matrices, spread)
        scores = induction.reading().sel(layer=1, head=0).values
        matching = repeated.reading().sel(score="prefix_matching", layer=1, head=0).values
        figures |= {
            "induction/score": scores.nanmean().item(),
            "induction/prefix_matching": matching.nanmean().item(),
            "induction/copying": copying_score(hooked, 1)[0].item(),
        }
        figures |= metrics.strategy_figures(prediction, self._strategies, epsilon=self.epsilon)
        return Observation(figures, matrices, prediction)

    def _graph_and_gradient(self, matrices: dict[str, Tensor], spread: Tensor) -> dict[str, float]:
        graph, n = self.task.graph, self.task.graph.n_positions
        figures = metrics.graph_figures(matrices["attention/layer0"], graph)
        figures |= metrics.gradient_figures(matrices["gradient/scores"], self.theory)
        # Where attention has saturated the gradient of the scores is 0; that of the pattern, seen
        # as the gradient that uniform attention would have, still tells.
        n_keys = torch.arange(1, len(spread) + 1).unsqueeze(1)
        at_uniform = matrices["gradient/pattern"] / n_keys
        figures |= metrics.gradient_figures(at_uniform, self.theory, prefix="gradient/pattern_")
        named = named_edges(matrices["gradient/pattern"][:n, :n], spread[:n, :n])
        figures["graph/f1"] = metrics.edge_f1(named, graph)
        return figures

    def _losses(self, prediction: Tensor) -> dict[str, float]:
        loss = soft_cross_entropy(prediction, self.batch.target, epsilon=self.epsilon).item()
        gap = loss - self.bayes_loss
        return {"loss/eval": loss, "loss/bayes": self.bayes_loss, "loss/gap": gap}

    def _part(self, start: int, stop: int) -> Batch:
        b, rows = self.batch, slice(start, stop)
        return Batch(b.tokens[rows], b.target[rows], b.transition[rows])
